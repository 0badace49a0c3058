"""
What comes over a connection: headers that steer a request, its body, and the client's leaving.

Everything is bounded: a head in time, a body in bytes and in time, a deadline by the service's own.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from typing import TypeVar

from starlette.types import Message, Receive
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.errors import BodyTooSlow, InvalidInput, TooLarge

Result = TypeVar("Result")

# When it is first looked whether the client is still there.
WATCH_AFTER_S = 0.02


# Within which a request's head must be there, from its first byte or from the connection's beginning; uvicorn waits for ever.
HEAD_WITHIN_S = 30.0


class Impatient(HttpToolsProtocol):
    """uvicorn's HTTP/1.1, but for connections that never say what they want: those are closed."""

    _late: asyncio.TimerHandle | None = None
    _within_head = True

    def connection_made(self, transport: asyncio.Transport) -> None:    # type: ignore[override]
        super().connection_made(transport)
        self._late = self.loop.call_later(HEAD_WITHIN_S, self._give_up)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._within_head and self._late is None and not self.transport.is_closing():
            self._late = self.loop.call_later(HEAD_WITHIN_S, self._give_up)

    def on_message_begin(self) -> None:
        self._within_head = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._within_head = False
        self._in_time()
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._in_time()
        super().connection_lost(exc)

    def _in_time(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _give_up(self) -> None:
        if not self.transport.is_closing():
            self.transport.close()


class ClientLeft(Exception):
    """The client closed the connection before its request was answered."""


def read_timeout(given: bytes | None, limit_s: float) -> float:
    """Seconds the request may take: what X-Request-Timeout-Ms asks for, at most `limit_s`, which holds without one."""
    if given is None:
        return limit_s
    try:
        asked_ms = float(given)
    except ValueError:
        asked_ms = 0.0
    if not asked_ms > 0:
        raise InvalidInput("X-Request-Timeout-Ms must be a number of milliseconds above 0.", param="X-Request-Timeout-Ms")
    return min(limit_s, asked_ms / 1000)


def read_busy_wait(given: bytes | None, allowed: bool) -> float:
    """The share in X-Busy-Wait by which a proof's control is to take longer, 0 to 1; InvalidInput where that is not allowed."""
    if given is None:
        return 0.0
    if not allowed:
        raise InvalidInput("X-Busy-Wait is for latency proofs and off here; DRBERT_BUSY_WAIT=loopback turns it on.", param="X-Busy-Wait")
    try:
        share = float(given)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise InvalidInput("X-Busy-Wait must be a number from 0 to 1, the share by which its batch takes longer.", param="X-Busy-Wait")
    return share


async def read_body(declared: bytes, receive: Receive, limit: int, within_s: float) -> bytes:
    """The body of the length that is `declared`, if it is; TooLarge as soon as it is known to pass `limit` bytes.

    BodyTooSlow if it is not all there in time.
    """
    chunks: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(within_s):
            if declared.isdigit() and int(declared) > limit:
                await drain(receive, int(declared), limit)
                raise TooLarge(f"The body has {int(declared)} bytes, the limit is {limit}.", param="body")
            async for chunk in body_chunks(receive):
                size += len(chunk)
                if size > limit:
                    raise TooLarge(f"The body has more than {limit} bytes, the limit.", param="body")
                chunks.append(chunk)
    except TimeoutError:
        raise BodyTooSlow(f"{size} bytes of the body came within {within_s:g} s, and no end of it.", param="body") from None
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


async def drain(receive: Receive, declared: int, limit: int) -> None:
    """Reads and forgets a body that is too large, within reason: most clients read no answer before they have sent all."""
    if declared <= 16 * limit:
        async for _ in body_chunks(receive):
            pass


async def body_chunks(receive: Receive) -> AsyncIterator[bytes]:
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientLeft
        yield message.get("body", b"")
        if not message.get("more_body"):
            return


async def unless_the_client_leaves(receive: Receive, work: Awaitable[Result]) -> Result:
    """What `work` returns or raises; ClientLeft, and the work cancelled, if the connection closes first.

    Nobody looks in the first WATCH_AFTER_S: most answers are there by then, and looking takes a task.
    """
    loop, this = asyncio.get_running_loop(), asyncio.current_task()
    assert this is not None, "a request is answered in a task"
    watching: asyncio.Task[Message] | None = None
    waiting, left = True, False

    def watch() -> None:
        nonlocal watching
        # After the body, the only message there can be is that the client has gone.
        watching = loop.create_task(receive())    # type: ignore[arg-type]
        watching.add_done_callback(leave)

    def leave(_: asyncio.Task[Message]) -> None:
        nonlocal left
        if waiting:
            left = True
            this.cancel()

    later = loop.call_later(WATCH_AFTER_S, watch)
    try:
        return await work
    except asyncio.CancelledError:
        if not left:
            raise
        this.uncancel()
        raise ClientLeft from None
    finally:
        waiting = False
        later.cancel()
        if watching is not None:
            watching.cancel()
