"""
One request and its answer on a connection, and what all connections of a process share.
"""

from __future__ import annotations

import ipaddress
import logging
import math
import random
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
"""Bytes read from a connection at once.

The event loop's own reads are up to 256 KiB, and a message that waits holds the whole read.
"""


@dataclass
class ConnectionPolicy:
    """The limits that all connections of a process share, and whether the process is draining."""

    write_timeout_s: float = 30.0
    """Seconds after which a connection is aborted if its client reads nothing of the answer."""
    body_timeout_s: float = 35.0
    """Seconds that a body may take if the application sets no limit of its own."""
    linger_bytes: int = 64 * 1024 * 1024
    """Bytes that are read and discarded after an early answer, so that the client can read it."""
    count: Callable[[str], object] = field(default=lambda reason: None)
    """Called with the error's code for each refused message."""
    max_age_s: float | None = None
    """Seconds after which a connection is closed with its next answer, longer or shorter by up to
    a tenth; None: never.
    """
    max_requests: int | None = None
    """Requests after which a connection is closed, more or less by up to a tenth; None: never."""
    is_draining: bool = False
    """Whether each answer closes its connection, so that clients connect to another replica."""
    lingering: int = 0
    """Number of connections that are read only until they can be closed."""
    buffer: bytearray = field(default_factory=lambda: bytearray(READ_BYTES), repr=False)
    """The buffer for all reads, one connection after the other."""
    _reports: dict[str, tuple[float, int]] = field(default_factory=dict)

    def lifetime(self, now: float) -> tuple[float, float]:
        """Return until when a new connection is kept, and for how many requests.

        They differ by chance: connections that were opened together would end together too, and
        come back together.
        """
        varied = random.uniform(0.9, 1.1)
        return (
            math.inf if self.max_age_s is None else now + varied * self.max_age_s,
            math.inf if self.max_requests is None else max(1, round(varied * self.max_requests)),
        )

    def report(self, code: str, message: str) -> None:
        """Count an event, and log it unless one of its kind was logged less than a second ago."""
        self.count(code)
        now = time.monotonic()
        logged_at, suppressed = self._reports.get(code, (-REPORT_EVERY_S, 0))
        if now - logged_at < REPORT_EVERY_S:
            self._reports[code] = logged_at, suppressed + 1
        else:
            self._reports[code] = now, 0
            log.warning(message, extra={"suppressed": suppressed} if suppressed else None)


class Flow(FlowControl):
    """uvicorn's flow control with a hold: nothing is read while messages of the connection wait."""

    is_held = False

    def resume_reading(self) -> None:
        """Read on, unless messages of the connection wait."""
        if not self.is_held:
            super().resume_reading()


class Connection(Protocol):
    """What an exchange needs of its connection."""

    policy: ConnectionPolicy
    pipeline: deque[Any]

    def count_answer(self) -> bool:
        """Count an answer; return whether the connection has been kept for long enough."""
        ...

    def hold_next_write(self) -> None:
        """Hold the next write back and send it together with the write after it."""


class Exchange(RequestResponseCycle):
    """uvicorn's request and answer, with a callback for a client that disconnects.

    It decides whether the connection closes after the answer.
    """

    connection: Connection
    on_disconnect: Callable[[], None] | None = None
    """Called once, when the client disconnects."""

    def send(self, message: ASGISendEvent) -> Coroutine[Any, Any, None]:
        """Write a part of the answer; the head waits for the first piece of the body."""
        if not self.response_started and not self.disconnected:
            # The rest of an unread body would be parsed as the next request. A draining server
            # closes its connections, so that clients connect to another one. An old connection is
            # closed so that new servers get their share.
            is_last = self.connection.count_answer() or self.connection.policy.is_draining
            if self.more_body or (is_last and not self.connection.pipeline):
                self.keep_alive = False
            # The head is sent with the first piece of the body: each write is a system call, and
            # usually a packet.
            self.connection.hold_next_write()
        return super().send(message)

    def whole_body(self) -> bytes | None:
        """Return the body if all of it has arrived and none was received yet, else None.

        It saves the wait, the timeout and the messages of `receive`.
        """
        if self.more_body or self.disconnected or self.response_complete:
            return None
        self.message_event.clear()
        body, self.body = bytes(self.body), bytearray()
        return body

    def disconnect(self) -> None:
        """Tell the application that the client disconnected, or will not send the rest."""
        self.disconnected = True
        self.message_event.set()
        if self.on_disconnect is not None:
            callback, self.on_disconnect = self.on_disconnect, None
            callback()


def check_host(hosts: Sequence[bytes], version: str) -> None:
    """Raise InvalidRequest unless the Host headers comply with RFC 9112, 3.2."""
    if len(hosts) > 1:
        raise InvalidRequest(f"A request has one Host header; this one has {len(hosts)}.")
    if not hosts:
        if version in ("1.0", "0.9"):
            return
        raise InvalidRequest(f"HTTP/{version} needs a Host header; there is none.")
    match = HOST.fullmatch(hosts[0])
    if match is None or (match[1] is not None and not _is_ip_literal(match[1])):
        raise InvalidRequest("The Host header is not a host and port.")


def _is_ip_literal(address: bytes) -> bool:
    if IP_FUTURE.fullmatch(address):
        return True
    try:
        # A scope id has no place in a Host header (RFC 6874 takes it out before it is sent).
        return b"%" not in address and bool(ipaddress.IPv6Address(address.decode("ascii")))
    except ValueError:
        return False
