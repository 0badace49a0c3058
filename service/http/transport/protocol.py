"""
What comes over a connection: messages, headers that steer a request, its body, and the client's
leaving.

Everything is bounded: a message in bytes, lines and time, what waits behind it, how long an answer
stays unread, all bodies together in bytes, a deadline by the service's own.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
import urllib.parse
from typing import Any, cast

import httptools
import orjson
from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

from service.errors import (
    BodyTooSlow,
    HeadersTooLarge,
    InvalidRequest,
    ServiceError,
    TargetTooLong,
)
from service.http.transport.exchange import ConnectionPolicy, Exchange, Flow, check_host

# Within which a request's head must be there, from its first byte or from the connection's
# beginning; uvicorn waits for ever.
HEAD_WITHIN_S = 30.0
HEAD_BYTES = 65_536
HEAD_LINES = 100
"""Header lines of a head, and lines of a body's trailers."""
TARGET_BYTES = 8_192
"""RFC 9110, 4.1 asks for 8,000 at least; no path here has a hundred."""
# What of a chunked body is not data (sizes, extensions, trailers) may take so many bytes, and as
# many more as the data itself: a small body may come in chunks of one byte, a large one in chunks
# of ten.
FRAMING_BYTES = 65_536
# The parser is given so much at once, so that few messages fit in and their bytes can be told
# apart; a body of known length has no framing.
PIECE_BYTES = 1_024
BODY_PIECE_BYTES = 65_536
# The application writes on until so much waits to be taken by the system; a client that never reads
# costs that and a piece of the answer.
UNSENT_BYTES = 16_384
# A body is handed on when so much of it is there: each time costs ten times what a byte in a
# segment of its own costs.
BODY_WAKE_BYTES = 8_192
# After an early answer the client may still send for so long, and so many clients may at once.
LINGER_S = 10.0
LINGERING = 256
# What every answer begins with.
ANSWER_BEGINS = b"HTTP/1.1 "
# How soon it is first looked whether a client that says no more has closed altogether; then at
# twice the time, up to a second.
LOOK_AFTER_S = 0.002
TCP_CLOSE = 7
"""In TCP_INFO: the state of a socket whose peer has reset the connection."""
# The part of a message that is being read.
IDLE, HEAD, BODY = range(3)
# What asks for another protocol on the same connection. There is none here, so it is as if nobody
# had asked (RFC 9110, 7.8).
UPGRADING = (b"upgrade", b"http2-settings")


class LimitedHttpProtocol(HttpToolsProtocol):
    """uvicorn's HTTP/1.1 within bounds; who does not keep them is refused, and the connection
    closed.

    Its exchanges write to it as to a transport, so that it sees what is written and can close
    without a reset.
    """

    cycle: Exchange
    flow: Flow

    _part = IDLE
    _framing_bytes = 0
    """Bytes of this message that are not its body; from the head's end on, of the body's framing.
    """
    _body_bytes = 0
    _piece_body_bytes = 0
    _body_left: int | None = None
    """Bytes still to come of a body whose length is known."""
    _lines = 0
    _host: bytes | None = None
    """The last Host header, which was valid."""
    _is_complete = False
    """Whether a message has ended in the piece that is being parsed."""
    _unparsed = b""
    """What waits until the messages before it are answered."""
    _active: Exchange | None = None
    """The exchange whose answer is next on the connection."""
    _refusal: ServiceError | None = None
    _is_lingering = False
    _lingered_bytes = 0
    _is_half_closed = False
    _has_begun_early = False
    """Whether the first bytes of the next answer have been sent."""
    _idle_since: float | None = None
    """When the last answer was given, by the loop's clock, and nothing has come since."""
    _idle_watch: asyncio.TimerHandle | None = None
    _late: asyncio.TimerHandle | None = None
    _probe: asyncio.TimerHandle | None = None
    _write_watch: asyncio.TimerHandle | None = None
    _is_holding = False
    """Whether the next write waits for the one after it."""
    _held = b""
    _written_bytes = 0
    _taken_bytes = -1
    _taken_at = 0.0

    def __init__(
        self, *arguments: Any, policy: ConnectionPolicy | None = None, **more: Any
    ) -> None:
        # The parser calls the list itself for each chunk: a call of ours for each would cost ten
        # times as much.
        self._pieces: list[bytes] = []
        self.on_body = self._pieces.append  # type: ignore[method-assign, assignment]
        super().__init__(*arguments, **more)
        self.policy = policy or ConnectionPolicy()
        self._hosts: list[bytes] = []

    # What the server asks

    @property
    def writes(self) -> bool:
        """Whether an answer was begun that the client has not taken yet."""
        begun = (
            self._active is not None
            and self._active.response_started
            and not self._active.response_complete
        )
        return (
            begun and not self.transport.is_closing()
        ) or self.transport.get_write_buffer_size() > 0

    @property
    def is_answered(self) -> bool:
        """Whether every whole request of this connection has its answer."""
        return not self.pipeline and (self._active is None or self._active.response_complete)

    def end(self) -> None:
        """Closes the connection; what is under way on it is aborted."""
        if self.is_answered and not self.writes:
            self.transport.close()
        else:
            self.transport.abort()

    # From the transport

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.flow = Flow(transport)
        transport.set_write_buffer_limits(UNSENT_BYTES)
        self._expire_in(HEAD_WITHIN_S)

    def data_received(self, data: bytes) -> None:
        if self._is_lingering:
            self._lingered_bytes += len(data)
            if self._lingered_bytes > self.policy.linger_bytes:
                self.transport.abort()
        elif self._refusal is None:
            self._parse(self._unparsed + data if self._unparsed else data)

    def eof_received(self) -> bool:  # type: ignore[override]
        """Whether the connection stays: a client that will say no more may still read its answers.

        One that has closed altogether looks the same from here, until something is sent to it.
        """
        if (
            self._is_lingering or self.scheme == "https"
        ):  # transports over TLS do not stay half closed
            return False
        if self._part == BODY:
            self._abandon(self.cycle)
        if self.is_answered:
            return False
        self._is_half_closed = True
        self._cancel_late()
        active = self._active
        if active is not None and not active.response_started and not active.response_complete:
            self._has_begun_early = True
            self.transport.write(ANSWER_BEGINS)
        self._look_in(LOOK_AFTER_S)
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_late()
        for timer in (self._probe, self._write_watch, self._idle_watch):
            if timer is not None:
                timer.cancel()
        if self._is_lingering:
            self.policy.lingering -= 1
        for exchange in (self._active, *(cast(Exchange, queued) for queued, _ in self.pipeline)):
            if exchange is not None and not exchange.response_complete:
                exchange.disconnect()
        self.pipeline.clear()
        self._unparsed = b""
        super().connection_lost(exc)
        # It and its exchanges know each other, and the garbage collector comes round seldom.
        self.cycle = self._active = None  # type: ignore[assignment]

    # As a transport, from the exchanges

    def is_closing(self) -> bool:
        return self.transport.is_closing()

    def hold_next_write(self) -> None:
        self._is_holding = True

    def write(self, data: bytes) -> None:
        if self._is_holding:
            self._is_holding, self._held = False, data
            return
        if self._held:
            data, self._held = self._held + data, b""
        if self._has_begun_early:
            self._has_begun_early = False
            data = data[len(ANSWER_BEGINS) :]
        self._written_bytes += len(data)
        self.transport.write(data)
        if self._write_watch is None:
            self._write_watch = self.loop.call_later(
                self.policy.write_timeout_s / 4, self._check_progress
            )

    def close(self) -> None:
        """Closes after the last answer; where the client has more to say, only once it has had time
        to read that answer.
        """
        self._write_held()
        if (
            self._part == IDLE
            and self._refusal is None
            and not self.pipeline
            and not self._unparsed
        ):
            self.transport.close()
        else:
            self._linger()

    # From the parser

    def on_message_begin(self) -> None:
        self._part = HEAD
        self._lines = 0
        self._hosts = []
        self._body_left = None
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        if len(self.url) > TARGET_BYTES:
            raise TargetTooLong(
                f"The request's path and query have more than {TARGET_BYTES} bytes, the limit."
            )

    def on_header(self, name: bytes, value: bytes) -> None:
        self._lines += 1
        if self._lines > HEAD_LINES:
            raise HeadersTooLarge(
                f"A request may have {HEAD_LINES} header lines, and as many trailers; there are"
                " more."
            )
        if self._part == BODY:
            # a trailer: it must not pass for a header (RFC 9110, 6.5.1), and nothing here has a use
            # for it
            return
        name = name.lower()
        if name == b"host":
            self._hosts.append(value)
        elif name == b"content-length":
            self._body_left = int(value)
        elif name == b"expect" and value.lower() == b"100-continue":
            self.expect_100_continue = True
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        method = self.parser.get_method()
        if method == b"CONNECT":
            raise InvalidRequest("This is no proxy.")
        if self.parser.should_upgrade():
            return
        version = self.parser.get_http_version()
        if len(self._hosts) != 1 or self._hosts[0] != self._host:
            check_host(self._hosts, version)
            self._host = self._hosts[0] if self._hosts else None
        self._part = BODY
        self._cancel_late()
        self._framing_bytes = self._body_bytes = self._lines = 0
        self._describe(method, version)
        self.scope["state"]["began"] = (
            time.monotonic()
        )  # deadlines count from here: the handler may run seconds later
        before = self.cycle
        self.cycle = Exchange(
            scope=self.scope,
            transport=cast(asyncio.Transport, self),
            flow=self.flow,
            logger=self.logger,
            access_logger=self.access_logger,
            access_log=self.access_log,
            default_headers=self.server_state.default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=self.expect_100_continue,
            keep_alive=version != "1.0" and self.parser.should_keep_alive(),
            on_response=self.on_response_complete,
        )
        self.cycle.connection = self
        if before is None or before.response_complete:
            self._start_asgi_task(self.cycle, self.app)
        else:
            self.pipeline.appendleft((self.cycle, self.app))
            self._hold()

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        self.cycle.more_body = False
        self._hand_on()
        self._part = IDLE
        self._framing_bytes = 0
        self._is_complete = True
        self._cancel_late()
        self.cycle.message_event.set()
        self.flow.resume_reading()  # There is no more of the body, but the client may leave.

    def _describe(self, method: bytes, version: str) -> None:
        """Fills in the scope, as uvicorn does."""
        target = httptools.parse_url(self.url)
        raw_path = target.path or b"/"
        path = raw_path.decode("ascii")
        self.scope["method"] = method.decode("ascii")
        self.scope["http_version"] = version
        self.scope["path"] = urllib.parse.unquote(path) if "%" in path else path
        self.scope["raw_path"] = raw_path
        self.scope["query_string"] = target.query or b""

    def _parse(self, data: bytes) -> None:
        """Gives the parser what came, in pieces, as long as no message waits for its turn."""
        self._idle_since = None
        self._unparsed = b""
        place, size = 0, len(data)
        try:
            while place < size and not self._is_lingering and not self.transport.is_closing():
                if self.pipeline:
                    self._unparsed = data[place:]
                    self._hold()
                    return
                piece = data[place : place + self._piece_size()]
                place += len(piece)
                self._parse_piece(piece)
        except ServiceError as error:
            self._refuse(error)
        self._wait_for_more()

    def _piece_size(self) -> int:
        if self._part == BODY:
            return min(self._body_left, BODY_PIECE_BYTES) if self._body_left else PIECE_BYTES
        if self._framing_bytes >= HEAD_BYTES:
            raise HeadersTooLarge(f"The head is longer than {HEAD_BYTES} bytes.")
        return min(PIECE_BYTES, HEAD_BYTES - self._framing_bytes)

    def _parse_piece(self, piece: bytes) -> None:
        self._piece_body_bytes = 0
        self._is_complete = False
        data = piece
        while data:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as behind:
                # The parser ends with such a head, and would take the body for another protocol.
                [place] = behind.args
                data = self._head_without_upgrade() + data[place:]
                self.parser = httptools.HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(
                    lenient_data_after_close=True
                )  # as uvicorn does
            except httptools.HttpParserError as error:
                if isinstance(error.__context__, ServiceError):  # of a callback of ours
                    raise error.__context__ from None
                raise InvalidRequest("Invalid HTTP request received.") from None
            else:
                data = b""
        self._hand_on()
        if self._is_complete and self._part == IDLE:
            return
        self._framing_bytes += len(piece) - self._piece_body_bytes
        if self._part == BODY and self._framing_bytes > FRAMING_BYTES + self._body_bytes:
            raise InvalidRequest(
                "The sizes, extensions and trailers of the body's chunks take more than"
                f" {FRAMING_BYTES} bytes and as many as its data; send larger chunks."
            )

    def _hand_on(self) -> None:
        """Gives the exchange what has come of its body."""
        if not self._pieces:
            return
        body = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        self._pieces.clear()
        self._body_bytes += len(body)
        self._piece_body_bytes += len(body)
        if self._body_left is not None:
            self._body_left -= len(body)
        exchange = self.cycle
        if exchange.response_complete or exchange.disconnected:
            return
        exchange.body += body
        if len(exchange.body) >= BODY_WAKE_BYTES or self._body_bytes == len(body):
            exchange.message_event.set()
            if exchange.more_body:
                # Until it is asked for more: a body that waits for room waits in the system's
                # buffers.
                self.flow.pause_reading()

    def _head_without_upgrade(self) -> bytes:
        lines = [
            b"%b %b HTTP/%b"
            % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())
        ]
        for name, value in self.headers:
            kept = (
                b",".join(
                    token for token in value.split(b",") if token.strip().lower() not in UPGRADING
                )
                if name == b"connection"
                else value
            )
            if kept and name not in UPGRADING:
                lines.append(b"%b: %b" % (name, kept))
        return b"\r\n".join([*lines, b"", b""])

    # One answer after the other

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._active = cast(Exchange, cycle)
        if (
            self._late is not None and self._part == BODY
        ):  # it has waited for its turn until now, and its body with it
            self._cancel_late()
            self._expire_in(self.policy.body_timeout_s)
        self.tasks.add(self.loop.create_task(self._run(cycle, app)))

    async def _run(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        # A task that takes itself out: a callback behind it would cost a round of the event loop.
        try:
            await cycle.run_asgi(app)
        finally:
            self.tasks.discard(cast(asyncio.Task[None], asyncio.current_task()))

    def on_response_complete(self) -> None:
        self._write_held()
        if self._is_lingering:
            return
        self.flow.is_held = len(self.pipeline) > 1 or self._refusal is not None
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
        else:
            self._idle_since = self.loop.time()
            if self._idle_watch is None:
                self._idle_watch = self.loop.call_later(self.timeout_keep_alive, self._check_idle)
        if self._unparsed and not self.pipeline:
            self._parse(self._unparsed)
        if not self.is_answered:
            return
        if self._refusal is not None:
            self._answer_refusal(self._refusal)
        elif self._is_half_closed:
            self.transport.close()

    def _write_held(self) -> None:
        """Writes the head of an answer that has no body."""
        if self._held:
            self.write(b"")

    def _hold(self) -> None:
        """Reads no more until the messages that wait are answered."""
        self.flow.is_held = True
        self.flow.pause_reading()

    def _refuse(self, error: ServiceError) -> None:
        """Answers a message that no application sees, after the answers to those before it, and
        ends the connection.
        """
        self.policy.report(error.code, error.message)
        # Its frames hold what was read, and would until the garbage collector comes round.
        error.__traceback__ = error.__context__ = None
        self._refusal = error
        has_answer = self._part == BODY and self.cycle.response_started
        if self._part == BODY:
            self._abandon(self.cycle)
        if has_answer:
            self.close()
        elif self.is_answered:
            self._answer_refusal(error)
        else:
            self._hold()

    def _answer_refusal(self, error: ServiceError) -> None:
        body = orjson.dumps(error.body())
        headers = [
            *self.server_state.default_headers,
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        lines = b"".join(b"%b: %b\r\n" % header for header in headers)
        self.write(b"%b%b\r\n%b" % (STATUS_LINE[error.status], lines, body))
        self._linger()

    def _abandon(self, exchange: Exchange) -> None:
        """Tells the application that the rest of this request will not come."""
        exchange.disconnect()
        if exchange is self._active:
            self._active = None
        elif self.pipeline:
            self.pipeline.popleft()

    def _linger(self) -> None:
        """Reads what the client still sends and drops it, for a while: a close with something
        unread is a reset, and may take the answer with it.
        """
        self.pipeline.clear()
        self._unparsed = b""
        if self._is_half_closed or self.policy.lingering >= LINGERING:
            self.transport.close()
        elif not self.transport.is_closing():
            self._is_lingering = True
            self.policy.lingering += 1
            self._idle_since = None
            self.flow.is_held = False
            self.flow.resume_reading()
            if self.scheme == "http":  # over TLS there is no end of one side alone
                self.transport.write_eof()
            self._cancel_late()
            self._expire_in(LINGER_S)

    # What takes too long

    def _wait_for_more(self) -> None:
        """Sets the time within which the rest of what has begun must come."""
        if self.transport.is_closing() or self._is_lingering or self._refusal is not None:
            return
        if self._part == BODY:
            self._expire_in(self.policy.body_timeout_s)
        elif self._part == HEAD or self.is_answered:
            self._expire_in(HEAD_WITHIN_S)

    def _expire_in(self, seconds: float) -> None:
        if self._late is None:
            self._late = self.loop.call_later(seconds, self._expire)

    def _cancel_late(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _expire(self) -> None:
        self._late = None
        if self.transport.is_closing():
            return
        if self._is_lingering:
            self.transport.close()
        elif self._part == BODY and self.cycle is self._active:
            self._refuse(
                BodyTooSlow(
                    f"The body was not complete after {self.policy.body_timeout_s:g} s;"
                    f" {self._body_bytes} bytes of it came.",
                    param="body",
                )
            )
        elif not self.is_answered:
            self._expire_in(
                HEAD_WITHIN_S
            )  # what is not read yet waits for our answers, not for the client
        else:
            self.transport.close()

    def _check_idle(self) -> None:
        """Closes a connection on which nothing has come for too long. One timer serves many
        requests: each does not set one and take it back.
        """
        self._idle_watch = None
        if self._idle_since is None or self.transport.is_closing():
            return
        left_s = self._idle_since + self.timeout_keep_alive - self.loop.time()
        if left_s <= 0:
            self.transport.close()
        else:
            self._idle_watch = self.loop.call_later(left_s, self._check_idle)

    def _check_progress(self) -> None:
        """Aborts a connection whose client has taken nothing of its answer for too long."""
        self._write_watch = None
        waiting = self.transport.get_write_buffer_size()
        taken, now = self._written_bytes - waiting, self.loop.time()
        if not waiting:
            self._taken_bytes = -1
            return
        if taken != self._taken_bytes:
            self._taken_bytes, self._taken_at = taken, now
        elif now - self._taken_at >= self.policy.write_timeout_s:
            self.policy.report(
                "unread_answer",
                f"A client took nothing of its answer for {self.policy.write_timeout_s:g} s; its"
                " connection was aborted.",
            )
            self.transport.abort()
            return
        self._write_watch = self.loop.call_later(
            self.policy.write_timeout_s / 4, self._check_progress
        )

    def _look_in(self, seconds: float) -> None:
        self._probe = self.loop.call_later(seconds, self._look_for_reset, seconds)

    def _look_for_reset(self, waited_s: float) -> None:
        """Aborts a half-closed connection whose client turned out to have closed it: no event says
        so once there is nothing to read.
        """
        with contextlib.suppress(OSError):
            state = self.transport.get_extra_info("socket").getsockopt(
                socket.IPPROTO_TCP, socket.TCP_INFO, 1
            )[0]
            if state == TCP_CLOSE:
                self.transport.abort()
                return
        self._look_in(min(1.0, 2 * waited_s))


class BoundedReads(asyncio.BufferedProtocol):
    """Hands on to a connection what was read for it, READ_BYTES at most at a time."""

    def __init__(self, *arguments: Any, policy: ConnectionPolicy, **more: Any) -> None:
        connection = LimitedHttpProtocol(*arguments, policy=policy, **more)
        self._buffer = policy.buffer
        self._data_received = connection.data_received
        # The loop looks them up once or not at all: nothing stands between.
        self.connection_made = connection.connection_made  # type: ignore[assignment, method-assign]
        self.connection_lost = connection.connection_lost  # type: ignore[method-assign]
        self.eof_received = connection.eof_received  # type: ignore[method-assign]
        self.pause_writing = connection.pause_writing  # type: ignore[method-assign]
        self.resume_writing = connection.resume_writing  # type: ignore[method-assign]

    def get_buffer(self, sizehint: int) -> bytearray:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        self._data_received(bytes(memoryview(self._buffer)[:nbytes]))
