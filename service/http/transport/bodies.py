"""
Large bodies: how many bytes of them are held at once.
"""

from __future__ import annotations

import asyncio
from collections import deque

from starlette.types import Message, Receive

from service.errors import BodyTooSlow, Overloaded

# Smaller bodies are read as they come, and parsed on the event loop.
SMALL_BYTES = 65_536
# More waiting bodies are refused at once: up to 64 KiB of each have been read.
MAX_WAITING = 256
# Within so many seconds a large body must arrive if others wait for its room.
READ_TIMEOUT_S = 5.0
RECHECK_S = 0.5


class LargeBodies:
    """A budget of bytes for bodies above SMALL_BYTES, from when they are read until their answer.

    Bodies without room wait in order of arrival, unread, in the system's buffers. One body of the
    largest size takes the whole budget: its texts keep the engine busy for longer than the next
    body takes to be read.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._free = max_bytes
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @property
    def is_contended(self) -> bool:
        """Whether other bodies wait for room."""
        return bool(self._waiting)

    def guard(
        self, declared: bytes, receive: Receive, limit: int, wait_s: float, compressed: bool = False
    ) -> LargeBody | None:
        """Return a receiver for a body of the declared length, of at most `limit` bytes.

        Return None for a body that needs none. A compressed body may have any length, so it takes
        the room of the longest.
        """
        if compressed:
            return LargeBody(self, receive, min(self._max_bytes, limit), 0, wait_s)
        size = int(declared) if declared.isdigit() and len(declared) < 20 else None
        if size is not None and not SMALL_BYTES < size <= limit:
            return None
        return LargeBody(
            self,
            receive,
            min(self._max_bytes, limit if size is None else size),
            0 if size is not None else SMALL_BYTES,
            wait_s,
        )

    async def acquire(self, size: int, wait_s: float) -> None:
        """Wait for `size` bytes of the budget; raises Overloaded if they are not free in time."""
        if not self._waiting and size <= self._free:
            self._free -= size
            return
        if len(self._waiting) >= MAX_WAITING:
            raise Overloaded(
                f"{MAX_WAITING} large bodies wait to be read, the limit; retry later, or send"
                " smaller requests.",
                retry_after_s=1,
            )
        future = asyncio.get_running_loop().create_future()
        entry = (size, future)
        self._waiting.append(entry)
        try:
            async with asyncio.timeout(wait_s):
                await future
        except BaseException as error:
            if entry in self._waiting:
                self._waiting.remove(entry)
                self._wake_waiting()
            elif not future.cancelled():  # It got room in the same moment.
                self.release(size)
            if not isinstance(error, TimeoutError):
                raise
            raise Overloaded(
                f"The large bodies of other requests took all of {self._max_bytes} bytes for"
                f" {wait_s:g} s; retry later, or send smaller requests.",
                retry_after_s=1,
            ) from None

    def release(self, size: int) -> None:
        """Return `size` bytes to the budget."""
        self._free += size
        self._wake_waiting()

    def _wake_waiting(self) -> None:
        while self._waiting and self._waiting[0][0] <= self._free:
            size, future = self._waiting.popleft()
            if not future.done():
                self._free -= size
                future.set_result(None)


class LargeBody:
    """Receives a body in place of the server's `receive`, once there is room for all of it.

    A body without a declared length takes its room when it turns out to be large.
    """

    def __init__(
        self, bodies: LargeBodies, receive: Receive, size: int, unguarded: int, wait_s: float
    ) -> None:
        self._bodies = bodies
        self._receive = receive
        self._size = size
        self._unguarded = unguarded
        self._wait_s = wait_s
        self._received = 0
        self._deadline: float | None = None

    async def __call__(self) -> Message:
        loop = asyncio.get_running_loop()
        if self._deadline is None and self._received >= self._unguarded:
            await self._bodies.acquire(self._size, self._wait_s)
            self._deadline = loop.time() + READ_TIMEOUT_S
        message = await (
            self._receive() if self._deadline is None else self._receive_in_time(self._deadline)
        )
        self._received += len(message.get("body", b""))
        return message

    def release(self) -> None:
        """Return its room, if it had any."""
        if self._deadline is not None:
            self._deadline = None
            self._unguarded = 2**63
            self._bodies.release(self._size)

    async def _receive_in_time(self, deadline: float) -> Message:
        while True:
            try:
                async with asyncio.timeout_at(deadline):
                    return await self._receive()
            except TimeoutError:
                if self._bodies.is_contended:
                    raise BodyTooSlow(
                        f"{self._received} bytes of the body arrived within {READ_TIMEOUT_S:g} s,"
                        " while others wait for the room that it takes; send it faster.",
                        param="body",
                    ) from None
                deadline = asyncio.get_running_loop().time() + RECHECK_S
