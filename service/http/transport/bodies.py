"""
Large bodies: how many bytes of them are held at once, and whether their JSON is one that can be
parsed at little cost.

orjson holds the interpreter for as long as it parses: 4 MiB of texts take it 4 ms, 4 MiB of
`[],[],…` 0.6 s.
"""

from __future__ import annotations

import asyncio
from collections import deque

from starlette.types import Message, Receive

from service.errors import BodyTooSlow, Overloaded, TooLarge

# Smaller bodies are read as they come, and parsed on the event loop.
SMALL_BYTES = 65_536
# More are refused at once: of each of them up to 64 KiB have been read.
MOST_WAITING = 256
# Within which a large body must come where others wait for its room.
READ_S = 5.0
RECHECK_S = 0.5

# What separates values: a text needs at most five of it, as a pair does. The spare ones are for the
# rest of a request, and let one that is only too long be told so by the number of its texts; to
# parse them takes 2 ms at most.
MARKS = b"[{,:"
MARKS_PER_TEXT = 8
SPARE_MARKS = 16_384
_OTHERS = bytes(set(range(256)) - set(MARKS))
# Bodies below so many bytes cannot hold enough to matter.
CHECKED_FROM_BYTES = 2_048
_SLICE_BYTES = 32_768


class LargeBodies:
    """Room of `most` bytes for the bodies above SMALL_BYTES, from when they are read until they are
    answered.

    Bodies that find none wait in the order in which they came, unread, in the system's buffers. One
    body of the largest size takes all of it: its texts keep the engine busy for longer than the
    next one needs to be read.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._free = most
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @property
    def is_wanted(self) -> bool:
        """Whether others wait for room."""
        return bool(self._waiting)

    def guard(
        self, declared: bytes, receive: Receive, limit: int, wait_s: float, compressed: bool = False
    ) -> LargeBody | None:
        """What receives a body of the declared length, of at most `limit` bytes; None for one that
        needs no guard.

        What is compressed may have any length, so it takes the room of the longest.
        """
        if compressed:
            return LargeBody(self, receive, min(self._most, limit), 0, wait_s)
        size = int(declared) if declared.isdigit() and len(declared) < 20 else None
        if size is not None and not SMALL_BYTES < size <= limit:
            return None
        return LargeBody(
            self,
            receive,
            min(self._most, limit if size is None else size),
            0 if size is not None else SMALL_BYTES,
            wait_s,
        )

    async def take(self, size: int, wait_s: float) -> None:
        """Wait for room; Overloaded if there is none in time."""
        if not self._waiting and size <= self._free:
            self._free -= size
            return
        if len(self._waiting) >= MOST_WAITING:
            raise Overloaded(
                f"{MOST_WAITING} large bodies wait to be read, the limit; retry later, or send"
                " smaller requests.",
                retry_after_s=1,
            )
        entry = (size, asyncio.get_running_loop().create_future())
        self._waiting.append(entry)
        try:
            async with asyncio.timeout(wait_s):
                await entry[1]
        except BaseException as error:
            if entry in self._waiting:
                self._waiting.remove(entry)
                self._hand_on()
            elif not entry[1].cancelled():  # It got room in the same moment.
                self.give_back(size)
            if not isinstance(error, TimeoutError):
                raise
            raise Overloaded(
                f"The large bodies of other requests take all of {self._most} bytes, and did for"
                f" {wait_s:g} s; retry later, or send smaller requests.",
                retry_after_s=1,
            ) from None

    def give_back(self, size: int) -> None:
        self._free += size
        self._hand_on()

    def _hand_on(self) -> None:
        while self._waiting and self._waiting[0][0] <= self._free:
            size, future = self._waiting.popleft()
            if not future.done():
                self._free -= size
                future.set_result(None)


class LargeBody:
    """Receives a body in place of the server's `receive`: not before there is room for all of it.

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
        self._until: float | None = None

    async def __call__(self) -> Message:
        loop = asyncio.get_running_loop()
        if self._until is None and self._received >= self._unguarded:
            await self._bodies.take(self._size, self._wait_s)
            self._until = loop.time() + READ_S
        message = await (
            self._receive() if self._until is None else self._receive_in_time(self._until)
        )
        self._received += len(message.get("body", b""))
        return message

    def release(self) -> None:
        """Give the room back, if there was any."""
        if self._until is not None:
            self._until = None
            self._unguarded = 2**63
            self._bodies.give_back(self._size)

    async def _receive_in_time(self, until: float) -> Message:
        while True:
            try:
                async with asyncio.timeout_at(until):
                    return await self._receive()
            except TimeoutError:
                if self._bodies.is_wanted:
                    raise BodyTooSlow(
                        f"{self._received} bytes of the body came within {READ_S:g} s, while others"
                        " wait for the room that it takes; send it faster.",
                        param="body",
                    ) from None
                until = asyncio.get_running_loop().time() + RECHECK_S


def check_structure(body: bytes, texts: int) -> None:
    """Raise TooLarge if a JSON document holds more values than a request of so many texts can have,
    before it is parsed.

    What stands within strings does not count. Ends early, for a document of nothing but values
    after the first few thousand.
    """
    # What begins with anything else is no object, and its parsing ends at once.
    if len(body) < CHECKED_FROM_BYTES or body[:64].lstrip()[:1] not in (b"{", b"[", b""):
        return
    most = MARKS_PER_TEXT * texts + SPARE_MARKS
    marks = quotes = 0
    is_inside, half = False, b""
    for place in range(0, len(body), _SLICE_BYTES):
        data = half + body[place : place + _SLICE_BYTES]
        half = b""
        if b"\\" in data:
            # A pair of backslashes is one character of a string, and hides no quote.
            data = data.replace(b"\\\\", b"")
            if data.endswith(b"\\"):
                data, half = data[:-1], b"\\"
            data = data.replace(b'\\"', b"")
        pieces = data.split(b'"', 2 * most + 4)
        quotes += len(pieces) - 1
        marks += len(b"".join(pieces[is_inside::2]).translate(None, _OTHERS))
        is_inside ^= len(pieces) % 2 == 0
        # Every string has a mark behind it or before it.
        if max(marks, quotes // 2 - 1) > most:
            raise TooLarge(
                f"The body holds more than {most} values and fields, which no request of {texts}"
                " texts, the limit, does; send several requests.",
                param="body",
            )
