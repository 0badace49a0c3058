"""
HTTP/1.1 on one connection: uvicorn's protocol with a limit for everything that a client controls.

The limits hold for the bytes, lines and seconds of a head, of a body and of its trailers, for the
requests that are pipelined, and for the time in which an answer is not read. uvicorn has no such
limits, and no hook for them.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
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

HEAD_TIMEOUT_S = 30.0
"""Seconds for a request's head, from its first byte or from the connection's start.

uvicorn waits without a limit.
"""
MAX_HEAD_BYTES = 65_536
MAX_HEADER_LINES = 100
"""Maximum number of header lines in a head, and of lines in a body's trailers."""
MAX_TARGET_BYTES = 8_192
"""Maximum length of a path with its query.

RFC 9110, 4.1 recommends at least 8,000. No path of this service has a hundred.
"""
FRAMING_ALLOWANCE_BYTES = 65_536
"""Bytes that a chunked body's framing may exceed its data by.

Framing is chunk sizes, extensions and trailers. So a small body may come in chunks of one byte,
and a large one in chunks of ten bytes.
"""
PIECE_BYTES = 1_024
"""Bytes that the parser gets at once: few messages fit in, so their bytes can be attributed."""
BODY_PIECE_BYTES = 65_536
"""Bytes that the parser gets at once of a body of known length, which has no framing to count."""
WRITE_BUFFER_BYTES = 16_384
"""Unsent bytes from which on the application's writes wait.

A client that never reads costs this much memory, and one piece of the answer.
"""
BODY_WAKE_BYTES = 8_192
"""Bytes of a body from which on its reader is woken.

Waking it costs ten times as much as a byte that arrives in a segment of its own.
"""
LINGER_S = 10.0
"""Seconds for which a connection is still read after an early answer."""
MAX_LINGERING = 256
"""Number of connections that are read after an early answer at the same time."""
ANSWER_PREFIX = b"HTTP/1.1 "
PROBE_AFTER_S = 0.002
"""Seconds until a half-closed connection is first probed for a reset.

The time doubles with each probe, up to a second.
"""
TCP_CLOSE = 7
"""State in TCP_INFO of a socket whose peer has reset the connection."""
# Phases of a connection: between two messages, in a head, in a body.
IDLE, HEAD, BODY = range(3)
# Headers that ask for another protocol on the same connection. There is none here, so they are
# ignored (RFC 9110, 7.8).
UPGRADE_HEADERS = (b"upgrade", b"http2-settings")


class LimitedHttpProtocol(HttpToolsProtocol):
    """uvicorn's HTTP/1.1 protocol with limits.

    A message that exceeds a limit is refused after the answers to the requests before it, and the
    connection is closed.

    An exchange is one request with its answer. Exchanges write to this object in place of the
    transport, so that it sees what is written and can close without a TCP reset.
    """

    cycle: Exchange
    flow: Flow

    _phase = IDLE
    """Part of a message that is read next."""
    _framing_bytes = 0
    """Bytes of the head; once the head has ended, bytes of the body's framing."""
    _body_bytes = 0
    """Bytes of the body that have arrived."""
    _piece_body_bytes = 0
    """Bytes of the body in the piece that is being parsed."""
    _body_remaining: int | None = None
    """Bytes of the body that have not arrived; None if its length is unknown."""
    _line_count = 0
    """Number of header lines in the head, or of lines in the trailers."""
    _host: bytes | None = None
    """Last valid Host header of the connection, which needs no second check."""
    _has_message_ended = False
    """Whether a message has ended in the piece that is being parsed."""
    _unparsed = b""
    """Bytes that are parsed once the requests before them are answered."""
    _active: Exchange | None = None
    """Exchange whose answer is the next one on the connection."""
    _refusal: ServiceError | None = None
    """Error that ends the connection; sent after the answers to the requests before it."""
    _is_lingering = False
    """Whether the connection is only read until it can be closed."""
    _lingered_bytes = 0
    """Bytes that were read and discarded since the connection lingers."""
    _is_half_closed = False
    """Whether the client has closed its sending side."""
    _has_sent_prefix = False
    """Whether ANSWER_PREFIX of the next answer has been sent."""
    _idle_since: float | None = None
    """Loop time of the last answer; None once something has arrived after it."""
    _idle_timer: asyncio.TimerHandle | None = None
    """Closes a connection that stays idle."""
    _receive_timer: asyncio.TimerHandle | None = None
    """Ends a head, a body or lingering that takes too long."""
    _probe_timer: asyncio.TimerHandle | None = None
    """Looks for a reset on a half-closed connection."""
    _write_timer: asyncio.TimerHandle | None = None
    """Aborts a connection whose client does not read its answer."""
    _holds_next_write = False
    """Whether the next write is held back and sent together with the write after it."""
    _held_data = b""
    """Write that was held back."""
    _answers = 0
    """Answers that were begun."""
    _kept_until, _kept_for = math.inf, math.inf
    """Loop time and number of answers after which the connection is closed."""
    _written_bytes = 0
    """Bytes of all answers of this connection."""
    _sent_bytes = -1
    """Bytes that the system had accepted at the last check of the write timer; -1 before one."""
    _progress_at = 0.0
    """Loop time of the check at which `_sent_bytes` last grew."""

    def __init__(
        self, *arguments: Any, policy: ConnectionPolicy | None = None, **more: Any
    ) -> None:
        # The parser calls the list's own method for each chunk; a Python method would cost ten
        # times as much.
        self._pieces: list[bytes] = []
        self.on_body = self._pieces.append  # type: ignore[method-assign, assignment]
        super().__init__(*arguments, **more)
        self.policy = policy or ConnectionPolicy()
        self._hosts: list[bytes] = []

    # Called by the server

    @property
    def is_writing(self) -> bool:
        """Whether an answer was begun and the system has not accepted all of it."""
        is_incomplete = (
            self._active is not None
            and self._active.response_started
            and not self._active.response_complete
        )
        if is_incomplete and not self.transport.is_closing():
            return True
        return self.transport.get_write_buffer_size() > 0

    @property
    def is_answered(self) -> bool:
        """Whether every complete request of this connection has its answer."""
        return not self.pipeline and (self._active is None or self._active.response_complete)

    def end(self) -> None:
        """Close the connection; abort it if a request or an answer is under way."""
        if self.is_answered and not self.is_writing:
            self.transport.close()
        else:
            self.transport.abort()

    # Called by the transport

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the connection; its first head must arrive within HEAD_TIMEOUT_S."""
        super().connection_made(transport)
        self.flow = Flow(transport)
        self._kept_until, self._kept_for = self.policy.lifetime(self.loop.time())
        transport.set_write_buffer_limits(WRITE_BUFFER_BYTES)
        self._start_receive_timer(HEAD_TIMEOUT_S)

    def data_received(self, data: bytes) -> None:
        """Parse what has arrived; discard it if the connection lingers or is refused."""
        if self._is_lingering:
            self._lingered_bytes += len(data)
            if self._lingered_bytes > self.policy.linger_bytes:
                self.transport.abort()
        elif self._refusal is None:
            self._parse(self._unparsed + data if self._unparsed else data)

    def eof_received(self) -> bool:  # type: ignore[override]
        """Return whether the connection stays open for the answers that the client may still read.

        A client that has closed its connection completely looks the same until something is sent
        to it. So the first bytes of the answer are sent now, and a timer looks for a reset.
        """
        # asyncio's TLS transports cannot stay half-closed.
        if self._is_lingering or self.scheme == "https":
            return False
        if self._phase == BODY:
            self._abandon_request(self.cycle)
        if self.is_answered:
            return False
        self._is_half_closed = True
        self._cancel_receive_timer()
        active = self._active
        if active is not None and not active.response_started and not active.response_complete:
            self._has_sent_prefix = True
            self.transport.write(ANSWER_PREFIX)
        self._schedule_probe(PROBE_AFTER_S)
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel the timers, and tell every unfinished exchange that its client has gone."""
        self._cancel_receive_timer()
        for timer in (self._probe_timer, self._write_timer, self._idle_timer):
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
        # The connection and its exchanges refer to each other, and the garbage collector runs
        # seldom.
        self.cycle = self._active = None  # type: ignore[assignment]

    # Called by the exchanges, to which this object is the transport

    def is_closing(self) -> bool:
        """Return whether the transport is closing or closed."""
        return self.transport.is_closing()

    def count_answer(self) -> bool:
        """Count an answer; return whether the connection has been kept for long enough."""
        self._answers += 1
        return self._answers >= self._kept_for or (
            self._kept_until != math.inf and self.loop.time() >= self._kept_until
        )

    def hold_next_write(self) -> None:
        """Hold the next write back and send it together with the write after it."""
        self._holds_next_write = True

    def write(self, data: bytes) -> None:
        """Send a part of the active exchange's answer, or hold it back if that was asked for."""
        if self._holds_next_write:
            self._holds_next_write, self._held_data = False, data
            return
        if self._held_data:
            data, self._held_data = self._held_data + data, b""
        if self._has_sent_prefix:
            self._has_sent_prefix = False
            data = data[len(ANSWER_PREFIX) :]
        self._written_bytes += len(data)
        self.transport.write(data)
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(
                self.policy.write_timeout_s / 4, self._check_write_progress
            )

    def close(self) -> None:
        """Close after the last answer.

        If the client still sends, it first gets time to read that answer.
        """
        self._flush_held_write()
        if (
            self._phase == IDLE
            and self._refusal is None
            and not self.pipeline
            and not self._unparsed
        ):
            self.transport.close()
        else:
            self._linger()

    # Called by the parser

    def on_message_begin(self) -> None:
        """Begin a head."""
        self._phase = HEAD
        self._line_count = 0
        self._hosts = []
        self._body_remaining = None
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """Append to the request's target; raises TargetTooLong."""
        super().on_url(url)
        if len(self.url) > MAX_TARGET_BYTES:
            raise TargetTooLong(
                f"The request's path and query have more than {MAX_TARGET_BYTES} bytes, the limit."
            )

    def on_header(self, name: bytes, value: bytes) -> None:
        """Add a header line, and discard a trailer; raises HeadersTooLarge."""
        self._line_count += 1
        if self._line_count > MAX_HEADER_LINES:
            raise HeadersTooLarge(
                f"A request may have {MAX_HEADER_LINES} header lines, and as many trailers; it has"
                " more."
            )
        if self._phase == BODY:
            # A trailer must not be taken for a header (RFC 9110, 6.5.1), and none is used here.
            return
        name = name.lower()
        if name == b"host":
            self._hosts.append(value)
        elif name == b"content-length":
            self._body_remaining = int(value)
        elif name == b"expect" and value.lower() == b"100-continue":
            self.expect_100_continue = True
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        """Create the request's exchange, and start the application or queue the exchange.

        Raises InvalidRequest if the method is CONNECT or the Host header is not valid.
        """
        method = self.parser.get_method()
        if method == b"CONNECT":
            raise InvalidRequest("This server is not a proxy, so it does not accept CONNECT.")
        if self.parser.should_upgrade():
            return
        version = self.parser.get_http_version()
        if len(self._hosts) != 1 or self._hosts[0] != self._host:
            check_host(self._hosts, version)
            self._host = self._hosts[0] if self._hosts else None
        self._phase = BODY
        self._cancel_receive_timer()
        self._framing_bytes = self._body_bytes = self._line_count = 0
        self._fill_scope(method, version)
        # Deadlines count from here: under overload the handler runs seconds later.
        self.scope["state"]["began"] = time.monotonic()
        previous = self.cycle
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
        if previous is None or previous.response_complete:
            self._start_asgi_task(self.cycle, self.app)
        else:
            self.pipeline.appendleft((self.cycle, self.app))
            self._pause_reading()

    def on_message_complete(self) -> None:
        """Give the exchange the rest of its body."""
        if self.parser.should_upgrade():
            return
        self.cycle.more_body = False
        self._deliver_body()
        self._phase = IDLE
        self._framing_bytes = 0
        self._has_message_ended = True
        self._cancel_receive_timer()
        self.cycle.message_event.set()
        self.flow.resume_reading()  # The body is complete, but the client may disconnect.

    def _fill_scope(self, method: bytes, version: str) -> None:
        """Set the ASGI scope's method, version, path and query, as uvicorn does."""
        target = httptools.parse_url(self.url)
        raw_path = target.path or b"/"
        path = raw_path.decode("ascii")
        self.scope["method"] = method.decode("ascii")
        self.scope["http_version"] = version
        self.scope["path"] = urllib.parse.unquote(path) if "%" in path else path
        self.scope["raw_path"] = raw_path
        self.scope["query_string"] = target.query or b""

    def _parse(self, data: bytes) -> None:
        """Feed the parser piece by piece, until a request has to wait for the answers before it."""
        self._idle_since = None
        self._unparsed = b""
        offset, size = 0, len(data)
        try:
            while offset < size and not self._is_lingering and not self.transport.is_closing():
                if self.pipeline:
                    self._unparsed = data[offset:]
                    self._pause_reading()
                    return
                piece = data[offset : offset + self._piece_size()]
                offset += len(piece)
                self._parse_piece(piece)
        except ServiceError as error:
            self._refuse(error)
        self._start_phase_timer()

    def _piece_size(self) -> int:
        """Return how many bytes the parser may get next; raises HeadersTooLarge."""
        if self._phase == BODY:
            return (
                min(self._body_remaining, BODY_PIECE_BYTES) if self._body_remaining else PIECE_BYTES
            )
        if self._framing_bytes >= MAX_HEAD_BYTES:
            raise HeadersTooLarge(f"The head is longer than {MAX_HEAD_BYTES} bytes.")
        return min(PIECE_BYTES, MAX_HEAD_BYTES - self._framing_bytes)

    def _parse_piece(self, piece: bytes) -> None:
        """Parse a piece, deliver the body's part of it, and count the rest as framing."""
        self._piece_body_bytes = 0
        self._has_message_ended = False
        data = piece
        while data:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                # The parser stops behind a head that asks for an upgrade. A new parser gets the
                # same head without the request for it.
                [offset] = upgrade.args
                data = self._head_without_upgrade() + data[offset:]
                self.parser = httptools.HttpRequestParser(self)
                # As uvicorn does.
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
            except httptools.HttpParserError as error:
                # The parser wraps an error that one of our callbacks has raised.
                if isinstance(error.__context__, ServiceError):
                    raise error.__context__ from None
                raise InvalidRequest("Invalid HTTP request received.") from None
            else:
                data = b""
        self._deliver_body()
        if self._has_message_ended and self._phase == IDLE:
            return
        self._framing_bytes += len(piece) - self._piece_body_bytes
        if self._phase == BODY and self._framing_bytes > FRAMING_ALLOWANCE_BYTES + self._body_bytes:
            raise InvalidRequest(
                "The sizes, extensions and trailers of the body's chunks take more than"
                f" {FRAMING_ALLOWANCE_BYTES} bytes and as many as its data; send larger chunks."
            )

    def _deliver_body(self) -> None:
        """Append the parsed part of the body to its exchange, and wake the reader if needed."""
        if not self._pieces:
            return
        body = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        self._pieces.clear()
        self._body_bytes += len(body)
        self._piece_body_bytes += len(body)
        if self._body_remaining is not None:
            self._body_remaining -= len(body)
        exchange = self.cycle
        if exchange.response_complete or exchange.disconnected:
            return
        exchange.body += body
        if len(exchange.body) >= BODY_WAKE_BYTES or self._body_bytes == len(body):
            exchange.message_event.set()
            if exchange.more_body:
                # Until the application asks for more. A body that waits for its turn stays in the
                # system's buffers.
                self.flow.pause_reading()

    def _head_without_upgrade(self) -> bytes:
        """Return the head that was parsed, without UPGRADE_HEADERS."""
        lines = [
            b"%b %b HTTP/%b"
            % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())
        ]
        for name, value in self.headers:
            if name == b"connection":
                tokens = value.split(b",")
                value = b",".join(t for t in tokens if t.strip().lower() not in UPGRADE_HEADERS)
            if value and name not in UPGRADE_HEADERS:
                lines.append(b"%b: %b" % (name, value))
        return b"\r\n".join([*lines, b"", b""])

    # Answers, one after the other

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._active = cast(Exchange, cycle)
        if self._receive_timer is not None and self._phase == BODY:
            # The request has waited for its turn until now, and so has its body.
            self._cancel_receive_timer()
            self._start_receive_timer(self.policy.body_timeout_s)
        self.tasks.add(self.loop.create_task(self._run_application(cycle, app)))

    async def _run_application(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        # The task removes itself: a done callback would cost a round of the event loop.
        try:
            await cycle.run_asgi(app)
        finally:
            self.tasks.discard(cast(asyncio.Task[None], asyncio.current_task()))

    def on_response_complete(self) -> None:
        """Start the next exchange, parse what has waited for this answer, or end the connection."""
        self._flush_held_write()
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
            if self._idle_timer is None:
                self._idle_timer = self.loop.call_later(self.timeout_keep_alive, self._check_idle)
        if self._unparsed and not self.pipeline:
            self._parse(self._unparsed)
        if not self.is_answered:
            return
        if self._refusal is not None:
            self._send_refusal(self._refusal)
        elif self._is_half_closed:
            self.transport.close()

    def _flush_held_write(self) -> None:
        """Write the head of an answer that has no body."""
        if self._held_data:
            self.write(b"")

    def _pause_reading(self) -> None:
        """Read no more until the requests that wait are answered."""
        self.flow.is_held = True
        self.flow.pause_reading()

    def _refuse(self, error: ServiceError) -> None:
        """Answer a message that no application sees, and end the connection.

        The answers to the requests before it are sent first.
        """
        self.policy.report(error.code, error.message)
        # The traceback's frames hold the data that was read until the garbage collector runs.
        error.__traceback__ = error.__context__ = None
        self._refusal = error
        has_answer = self._phase == BODY and self.cycle.response_started
        if self._phase == BODY:
            self._abandon_request(self.cycle)
        if has_answer:
            self.close()
        elif self.is_answered:
            self._send_refusal(error)
        else:
            self._pause_reading()

    def _send_refusal(self, error: ServiceError) -> None:
        """Write an error as the connection's last answer."""
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

    def _abandon_request(self, exchange: Exchange) -> None:
        """Tell the application that the rest of this request will not come."""
        exchange.disconnect()
        if exchange is self._active:
            self._active = None
        elif self.pipeline:
            self.pipeline.popleft()

    def _linger(self) -> None:
        """Read and discard what the client still sends, for LINGER_S at most.

        Closing a socket with unread data resets the connection, and the client may lose the answer.
        """
        self.pipeline.clear()
        self._unparsed = b""
        if self._is_half_closed or self.policy.lingering >= MAX_LINGERING:
            self.transport.close()
        elif not self.transport.is_closing():
            self._is_lingering = True
            self.policy.lingering += 1
            self._idle_since = None
            self.flow.is_held = False
            self.flow.resume_reading()
            if self.scheme == "http":  # TLS cannot close one direction alone.
                self.transport.write_eof()
            self._cancel_receive_timer()
            self._start_receive_timer(LINGER_S)

    # Timers

    def _start_phase_timer(self) -> None:
        """Limit the time in which the rest of a head or body must arrive."""
        if self.transport.is_closing() or self._is_lingering or self._refusal is not None:
            return
        if self._phase == BODY:
            self._start_receive_timer(self.policy.body_timeout_s)
        elif self._phase == HEAD or self.is_answered:
            self._start_receive_timer(HEAD_TIMEOUT_S)

    def _start_receive_timer(self, seconds: float) -> None:
        """Start the timer unless it runs: more bytes do not prolong it."""
        if self._receive_timer is None:
            self._receive_timer = self.loop.call_later(seconds, self._on_receive_timeout)

    def _cancel_receive_timer(self) -> None:
        if self._receive_timer is not None:
            self._receive_timer.cancel()
            self._receive_timer = None

    def _on_receive_timeout(self) -> None:
        """Refuse a late body with 408; close a connection without a complete head."""
        self._receive_timer = None
        if self.transport.is_closing():
            return
        if self._is_lingering:
            self.transport.close()
        elif self._phase == BODY and self.cycle is self._active:
            self._refuse(
                BodyTooSlow(
                    f"The body was not complete after {self.policy.body_timeout_s:g} s;"
                    f" {self._body_bytes} bytes of it arrived.",
                    param="body",
                )
            )
        elif not self.is_answered:
            # What has not been read yet waits for these answers, so the client is not late.
            self._start_receive_timer(HEAD_TIMEOUT_S)
        else:
            self.transport.close()

    def _check_idle(self) -> None:
        """Close a connection on which nothing has arrived for the keep-alive time.

        One timer serves many requests: setting and cancelling one for each would cost more.
        """
        self._idle_timer = None
        if self._idle_since is None or self.transport.is_closing():
            return
        remaining_s = self._idle_since + self.timeout_keep_alive - self.loop.time()
        if remaining_s <= 0:
            self.transport.close()
        else:
            self._idle_timer = self.loop.call_later(remaining_s, self._check_idle)

    def _check_write_progress(self) -> None:
        """Abort a connection whose client has read nothing of its answer for too long."""
        self._write_timer = None
        unsent = self.transport.get_write_buffer_size()
        sent, now = self._written_bytes - unsent, self.loop.time()
        if not unsent:
            self._sent_bytes = -1
            return
        if sent != self._sent_bytes:
            self._sent_bytes, self._progress_at = sent, now
        elif now - self._progress_at >= self.policy.write_timeout_s:
            self.policy.report(
                "unread_answer",
                f"A client read nothing of its answer for {self.policy.write_timeout_s:g} s; its"
                " connection was aborted.",
            )
            self.transport.abort()
            return
        self._write_timer = self.loop.call_later(
            self.policy.write_timeout_s / 4, self._check_write_progress
        )

    def _schedule_probe(self, seconds: float) -> None:
        """Probe for a reset after `seconds`."""
        self._probe_timer = self.loop.call_later(seconds, self._probe_for_reset, seconds)

    def _probe_for_reset(self, waited_s: float) -> None:
        """Abort a half-closed connection whose client has reset it, or probe again later.

        The event loop reports no reset once the reading side has ended.
        """
        with contextlib.suppress(OSError):
            state = self.transport.get_extra_info("socket").getsockopt(
                socket.IPPROTO_TCP, socket.TCP_INFO, 1
            )[0]
            if state == TCP_CLOSE:
                self.transport.abort()
                return
        self._schedule_probe(min(1.0, 2 * waited_s))


class BoundedReads(asyncio.BufferedProtocol):
    """Passes what is read to a connection, READ_BYTES at most at a time.

    All connections of a process share one buffer. The event loop's own reads are up to 256 KiB.
    """

    def __init__(self, *arguments: Any, policy: ConnectionPolicy, **more: Any) -> None:
        connection = LimitedHttpProtocol(*arguments, policy=policy, **more)
        self._buffer = policy.buffer
        self._data_received = connection.data_received
        # The event loop calls the connection's methods directly, without a call in between.
        self.connection_made = connection.connection_made  # type: ignore[assignment, method-assign]
        self.connection_lost = connection.connection_lost  # type: ignore[method-assign]
        self.eof_received = connection.eof_received  # type: ignore[method-assign]
        self.pause_writing = connection.pause_writing  # type: ignore[method-assign]
        self.resume_writing = connection.resume_writing  # type: ignore[method-assign]

    def get_buffer(self, sizehint: int) -> bytearray:
        """Return the buffer that the event loop reads into."""
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        """Pass on the bytes that were read, in a copy, as the buffer is used again."""
        self._data_received(bytes(memoryview(self._buffer)[:nbytes]))
