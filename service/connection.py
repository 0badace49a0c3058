"""
What comes over a connection: headers that steer a request, its body, and the client's leaving.

Everything is bounded: a head and a body in bytes and in time, all bodies together in bytes, a deadline by the service's own.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable
from typing import TypeVar

import httptools
from starlette.types import Message, Receive
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.errors import BodyTooSlow, InvalidInput, Overloaded, TooLarge

Result = TypeVar("Result")

# When it is first looked whether the client is still there.
WATCH_AFTER_S = 0.02


# Within which a request's head must be there, from its first byte or from the connection's beginning; uvicorn waits for ever.
HEAD_WITHIN_S = 30.0
HEAD_BYTES = 65_536
# What asks for another protocol on the same connection. There is none here, so it is as if nobody had asked (RFC 9110, 7.8).
UPGRADING = (b"upgrade", b"http2-settings")


class Impatient(HttpToolsProtocol):
    """uvicorn's HTTP/1.1, but for connections that never say what they want, or go on at length: those are closed."""

    _late: asyncio.TimerHandle | None = None
    _within_head = True
    _head_bytes = 0

    @property
    def writes(self) -> bool:
        """Whether an answer was begun that the client has not taken yet."""
        begun = self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete
        return (begun and not self.transport.is_closing()) or self.transport.get_write_buffer_size() > 0

    def connection_made(self, transport: asyncio.Transport) -> None:    # type: ignore[override]
        super().connection_made(transport)
        self._close_later()

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        self._head_bytes += len(data)
        try:
            self._parse(data)
        except httptools.HttpParserError:
            self._refuse("Invalid HTTP request received.")
        if self.transport.is_closing():
            return
        if self._within_head and self._head_bytes > HEAD_BYTES:
            self._refuse(f"The head is longer than {HEAD_BYTES} bytes.")
        elif self._within_head or self.cycle.response_complete:
            # Half a head, or the rest of a body that was answered already.
            self._close_later()

    def on_message_begin(self) -> None:
        self._within_head = True
        self._head_bytes = 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        if self.parser.get_method() == b"CONNECT":
            self._refuse("This is no proxy.")
        elif not self.parser.should_upgrade():
            self._within_head = False
            self._in_time()
            super().on_headers_complete()

    def on_message_complete(self) -> None:
        if not self.parser.should_upgrade():
            super().on_message_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._in_time()
        super().connection_lost(exc)

    def _parse(self, data: bytes) -> None:
        while not self.transport.is_closing():
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as behind:
                # The parser ends with such a head, and would take the body for another protocol.
                [place] = behind.args
                data = self._head_without_upgrade() + data[place:]
                self.parser = httptools.HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)    # as uvicorn does
            else:
                return

    def _head_without_upgrade(self) -> bytes:
        lines = [b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())]
        for name, value in self.headers:
            kept = b",".join(token for token in value.split(b",") if token.strip().lower() not in UPGRADING) if name == b"connection" else value
            if kept and name not in UPGRADING:
                lines.append(b"%b: %b" % (name, kept))
        return b"\r\n".join([*lines, b"", b""])

    def _refuse(self, why: str) -> None:
        self.logger.warning(why)
        self.send_400_response(why)

    def _close_later(self) -> None:
        if self._late is None:
            self._late = self.loop.call_later(HEAD_WITHIN_S, self._close)

    def _in_time(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _close(self) -> None:
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


class Room:
    """How many bytes the bodies of all requests may hold together."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._held = 0

    def take(self, size: int) -> None:
        if self._held + size > self._most:
            raise Overloaded(f"The bodies of all requests hold {self._held} bytes, the limit is {self._most}; retry later.", retry_after_s=1)
        self._held += size

    def give_back(self, size: int) -> None:
        self._held -= size


async def read_body(declared: bytes, receive: Receive, limit: int, within_s: float, room: Room) -> bytes:
    """The body of the length that is `declared`, if it is; TooLarge as soon as it is known to pass `limit` bytes.

    BodyTooSlow if it is not all there in time. What is returned has taken `room`, and is to be given back.
    """
    if declared.isdigit() and len(declared) < 20 and int(declared) > limit:
        await forget_body(receive, limit, within_s)
        raise TooLarge(f"The body has {int(declared)} bytes, the limit is {limit}.", param="body")
    chunks: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(within_s):
            async for chunk in body_chunks(receive):
                if size + len(chunk) > limit:
                    raise TooLarge(f"The body has more than {limit} bytes, the limit.", param="body")
                room.take(len(chunk))
                size += len(chunk)
                chunks.append(chunk)
    except BaseException as error:
        room.give_back(size)
        if not isinstance(error, TimeoutError):
            raise
        raise BodyTooSlow(f"{size} bytes of the body came within {within_s:g} s, and no end of it.", param="body") from None
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


async def forget_body(receive: Receive, limit: int, within_s: float) -> None:
    """Reads a body and keeps nothing, within reason: most clients read no answer before they have sent all."""
    size = 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(within_s):
            async for chunk in body_chunks(receive):
                size += len(chunk)
                if size > 16 * limit:
                    return


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
