"""
One request and its answer on a connection, and what all connections of a process share.
"""

from __future__ import annotations

import ipaddress
import logging
import re
import time
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from uvicorn._types import ASGISendEvent
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from service.errors import InvalidRequest

log = logging.getLogger(__name__)

# A message of a kind is logged at most this often; its metric counts every one.
REPORT_EVERY_S = 1.0
# RFC 3986, 3.2.2 and 3.2.3; what stands between brackets is checked apart.
HOST = re.compile(
    rb"(?:\[([^\[\]]*)\]|(?:[A-Za-z0-9\-._~!$&'()*+,;=]|%[0-9A-Fa-f]{2})*)(?::[0-9]*)?"
)
IP_FUTURE = re.compile(rb"v[0-9A-Fa-f]+\.[A-Za-z0-9\-._~!$&'()*+,;=:]+")


READ_BYTES = 65_536
"""Read from a connection at once. The loop's own reads are up to 256 KiB, and what waits for its
turn keeps what was read with it.
"""


@dataclass
class ConnectionPolicy:
    """What the connections of a process share: their limits, and whether they are to end."""

    write_timeout_s: float = 30.0
    """How long a client may take nothing of an answer before its connection is aborted."""
    body_timeout_s: float = 35.0
    """How long a body may take where the application sets no limit of its own."""
    linger_bytes: int = 64 * 1024 * 1024
    """Bytes that are read and discarded after an early answer, so that the client can read it."""
    count: Callable[[str], object] = field(default=lambda reason: None)
    """Counts a message that was refused, by the error's code."""
    is_draining: bool = False
    """Whether each answer closes its connection, so that clients go elsewhere."""
    lingering: int = 0
    """Connections that are read only to be closed."""
    buffer: bytearray = field(default_factory=lambda: bytearray(READ_BYTES), repr=False)
    """What is read goes through it, one connection after the other."""
    _reports: dict[str, tuple[float, int]] = field(default_factory=dict)

    def report(self, code: str, message: str) -> None:
        """Counts an event, and logs it unless one of its kind was logged a moment ago."""
        self.count(code)
        now = time.monotonic()
        logged_at, suppressed = self._reports.get(code, (-REPORT_EVERY_S, 0))
        if now - logged_at < REPORT_EVERY_S:
            self._reports[code] = logged_at, suppressed + 1
        else:
            self._reports[code] = now, 0
            log.warning(message, extra={"suppressed": suppressed} if suppressed else None)


class Flow(FlowControl):
    """uvicorn's flow control with a hold: nothing is read, whoever asks for it, while messages of
    this connection wait.
    """

    is_held = False

    def resume_reading(self) -> None:
        if not self.is_held:
            super().resume_reading()


class Connection(Protocol):
    """What an exchange needs to know of its connection."""

    policy: ConnectionPolicy
    pipeline: deque[Any]

    def hold_next_write(self) -> None:
        """Keeps what is written next for what is written after it."""


class Exchange(RequestResponseCycle):
    """uvicorn's request and answer; when the connection ends with it, and who is told that the
    client has left.
    """

    connection: Connection
    on_leave: Callable[[], None] | None = None
    """Called once, when the client leaves."""

    def send(self, message: ASGISendEvent) -> Coroutine[Any, Any, None]:
        if not self.response_started and not self.disconnected:
            # The rest of a body would be taken for the next request, and clients of a server that
            # drains go elsewhere.
            if self.more_body or (
                self.connection.policy.is_draining and not self.connection.pipeline
            ):
                self.keep_alive = False
            # The head goes with the first piece of the body: each write is a call of the system,
            # and mostly a packet.
            self.connection.hold_next_write()
        return super().send(message)

    def whole_body(self) -> bytes | None:
        """The body, if all of it is there and none was received yet: `receive` without the wait,
        its timeout and its messages.
        """
        if self.more_body or self.disconnected or self.response_complete:
            return None
        self.message_event.clear()
        body, self.body = bytes(self.body), bytearray()
        return body

    def leave(self) -> None:
        """Tells the application that the client has left, or that the rest of the request will not
        come.
        """
        self.disconnected = True
        self.message_event.set()
        if self.on_leave is not None:
            tell, self.on_leave = self.on_leave, None
            tell()


def check_host(hosts: Sequence[bytes], version: str) -> None:
    """Raises InvalidRequest unless the Host headers are what RFC 9112, 3.2 asks for."""
    if len(hosts) > 1:
        raise InvalidRequest(f"A request has one Host header; this one has {len(hosts)}.")
    if not hosts:
        if version in ("1.0", "0.9"):
            return
        raise InvalidRequest(f"HTTP/{version} needs a Host header; there is none.")
    matched = HOST.fullmatch(hosts[0])
    if matched is None or (matched[1] is not None and not _is_ip_literal(matched[1])):
        raise InvalidRequest("The Host header is no host and port.")


def _is_ip_literal(address: bytes) -> bool:
    if IP_FUTURE.fullmatch(address):
        return True
    try:
        # A scope id has no place in a Host header (RFC 6874 takes it out before it is sent).
        return b"%" not in address and bool(ipaddress.IPv6Address(address.decode("ascii")))
    except ValueError:
        return False
