"""
Logs: one line for each event, with its facts: JSON, or text for a person at a terminal. Texts and
keys are never logged.

A thread of its own writes the lines, so a stuck collector (a full pipe that nobody reads) blocks
nothing else. When its queue is full, the oldest lines are dropped and counted. Warnings and errors
are limited for each place in the code, because callers without a key can cause them as fast as they
can send.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import select
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

log = logging.getLogger(__name__)

QUEUED_LINES = 1_000
"""Lines that may wait to be written."""
FIELD_CHARS = 8_192
"""Characters in a field of a line. With QUEUED_LINES it limits the memory."""
ACCESS = "service.access"
"""Name of the logger of requests."""
LINES_PER_S = 10.0
"""Warnings and errors a second from one place in the code, after its burst."""
BURST = 50.0
"""Lines that one place may log at once: loading many models may warn once for each."""
SUMMARY_EVERY_S = 1.0
"""Seconds between two summaries of suppressed lines."""
FLUSH_S = 2.0
"""Seconds that `flush` waits at most."""

_ORDINARY = set(vars(logging.makeLogRecord({}))) | {"message", "taskName", "color_message"}

LOST = {"queue_full": 0, "write_failed": 0, "rate_limited": 0}
"""Number of lines since the start that were not written, by reason; /metrics shows it."""


LineFormat = Callable[[float, dict[str, Any]], str]
"""Formats an event: the time in seconds since 1970, and the fields, `level` and `event` first."""


class EventFormatter(logging.Formatter):
    """Formats a log record as the line of its event."""

    def __init__(self, line: LineFormat) -> None:
        super().__init__()
        self.line = line

    def format(self, record: logging.LogRecord) -> str:
        """Return the record's level, event and extra fields, and its traceback if it has one."""
        fields = {"level": record.levelname.lower(), "event": record.getMessage()}
        fields |= {name: value for name, value in vars(record).items() if name not in _ORDINARY}
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return self.line(record.created, fields)


def json_line(at: float, fields: dict[str, Any]) -> str:
    """Return one line of the log; `at` is in seconds since 1970."""
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(at)) + f".{int(at % 1 * 1000):03d}Z"
    return json.dumps(
        {"time": stamp} | {name: _bounded(value) for name, value in fields.items()},
        default=_bounded_text,
    )


def text_line(at: float, fields: dict[str, Any]) -> str:
    """Return one event for a person; `at` is in seconds since 1970, shown in local time.

    Control characters are escaped, so that no value can move a terminal's cursor.
    """
    fields = dict(fields)
    level, event = fields.pop("level"), fields.pop("event")
    trace = fields.pop("traceback", None)
    facts = [f"{name}={_plain(value)}" for name, value in fields.items()]
    stamp = time.strftime("%H:%M:%S", time.localtime(at))
    line = " ".join([stamp, level.upper().ljust(7), _printable(_bounded_text(event)), *facts])
    if trace is None:
        return line
    rows = (_printable(row) for row in _bounded_text(trace).splitlines())
    return "\n    ".join([line, *rows])


def _plain(value: Any) -> str:
    """Return a fact as it is, or quoted if it has spaces or control characters."""
    text = value if isinstance(value, str) else json.dumps(value, default=_bounded_text)
    text = _bounded_text(text)
    if not isinstance(value, str) or (text.isprintable() and text and not set(text) & set(' "')):
        return text
    return '"' + _printable(text).replace('"', '\\"') + '"'


def _printable(text: str) -> str:
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def _bounded(value: Any) -> Any:
    return _bounded_text(value) if isinstance(value, str) else value


def _bounded_text(value: object) -> str:
    """Return a value as text; its middle is cut out if it exceeds FIELD_CHARS characters."""
    text = str(value)
    if len(text) <= FIELD_CHARS:
        return text
    # The end is kept, because the end of a traceback names the error.
    half = FIELD_CHARS // 2
    return f"{text[:half]} … {len(text) - 2 * half} characters left out … {text[-half:]}"


@dataclass
class _Bucket:
    tokens: float
    filled: float
    event: str = ""
    suppressed: int = 0


class RateLimit(logging.Filter):
    """Limits the warnings and errors of each place in the code to LINES_PER_S after a BURST.

    The place is the key and not the message: a message may contain what a caller sent, so each new
    message would have an allowance of its own. CRITICAL always passes, and so does INFO, which no
    request causes except in the access log.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._buckets: dict[tuple[str, int], _Bucket] = {}
        # Reentrant: the garbage collector may run a __del__ that logs while the lock is held.
        self._lock = threading.RLock()

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the record is logged; one that is not is counted."""
        if not logging.WARNING <= record.levelno < logging.CRITICAL:
            return True
        with self._lock:
            now = self._clock()
            bucket = self._buckets.setdefault((record.pathname, record.lineno), _Bucket(BURST, now))
            bucket.tokens = min(BURST, bucket.tokens + LINES_PER_S * (now - bucket.filled))
            bucket.filled = now
            if bucket.tokens >= 1:
                bucket.tokens -= 1
                return True
            bucket.event = record.msg if isinstance(record.msg, str) else type(record.msg).__name__
            bucket.suppressed += 1
            LOST["rate_limited"] += 1
            return False

    def summaries(self) -> list[dict[str, Any]]:
        """Return the fields of a line for each place that was limited since the last call."""
        with self._lock:
            limited = [bucket for bucket in self._buckets.values() if bucket.suppressed]
            lines = [
                {
                    "level": "warning",
                    "event": "log lines suppressed",
                    "of": bucket.event,
                    "lines": bucket.suppressed,
                    "limit_per_s": LINES_PER_S,
                }
                for bucket in limited
            ]
            for bucket in limited:
                bucket.suppressed = 0
            return lines


class LineWriter(logging.Handler):
    """Passes lines to a thread that writes them to a file descriptor. It never blocks the caller.

    It uses SimpleQueue because Queue's lock is not reentrant: a __del__ that logs, run by the
    garbage collector inside put(), would deadlock. It uses os.write because a thread that hangs
    could hold sys.stderr's lock when the process ends.
    """

    def __init__(
        self,
        descriptor: int = 2,
        limit: RateLimit | None = None,
        line: LineFormat = json_line,
    ) -> None:
        super().__init__()
        self.setFormatter(EventFormatter(line))
        self._line = line
        self._limit = limit or RateLimit()
        self.addFilter(self._limit)
        self._descriptor = descriptor
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._queued = self._dropped = self._taken = self._reported = 0
        self._thread = threading.Thread(target=self._write_lines, name="log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Queue a record's line."""
        if record.name == ACCESS and self._lines.qsize() >= QUEUED_LINES // 2:
            # Callers decide how many of these there are; they must not push out other events.
            LOST["queue_full"] += 1
            return
        try:
            self._put(self.format(record))
        except Exception:  # A value's own __str__ may raise anything; the caller only logs.
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Count a line that could not be formatted. The base class would print it to sys.stderr,
        which may block.
        """
        LOST["write_failed"] += 1

    def flush(self) -> None:
        """Wait until all earlier lines are written, for at most FLUSH_S: a reader may be stuck."""
        self.acquire()
        try:
            for fields in self._limit.summaries():
                self._put(self._line(time.time(), fields))
            target = self._queued
        finally:
            self.release()
        give_up = time.monotonic() + FLUSH_S
        while self._taken + self._dropped < target and time.monotonic() < give_up:
            time.sleep(0.002)

    def close(self) -> None:
        """End the thread after the lines that are queued."""
        self._lines.put(None)
        super().close()

    def _put(self, line: str) -> None:
        """Append a line; called with the handler's lock held."""
        while self._lines.qsize() >= QUEUED_LINES:
            try:
                self._lines.get_nowait()
            except queue.Empty:
                break
            # The oldest line is dropped, so that the events before an end are kept.
            self._dropped += 1
            LOST["queue_full"] += 1
        self._queued += 1
        self._lines.put(line)

    def _write_lines(self) -> None:
        next_summary = time.monotonic() + SUMMARY_EVERY_S
        while True:
            try:
                line = self._lines.get(timeout=SUMMARY_EVERY_S)
            except queue.Empty:
                pass
            else:
                if line is None:
                    return
                self._write(line)
                self._taken += 1
            self._report_dropped()
            if time.monotonic() >= next_summary:
                next_summary = time.monotonic() + SUMMARY_EVERY_S
                for fields in self._limit.summaries():
                    self._write(self._line(time.time(), fields))

    def _report_dropped(self) -> None:
        dropped = self._dropped
        if dropped > self._reported:
            lost = {"lines": dropped - self._reported, "why": "nobody read them in time"}
            self._write(
                self._line(time.time(), {"level": "warning", "event": "log lines dropped"} | lost)
            )
            self._reported = dropped

    def _write(self, line: str) -> None:
        # A lone surrogate, of a path that is not UTF-8, must not end this thread.
        unwritten = line.encode(errors="backslashreplace") + b"\n"
        while unwritten:
            try:
                unwritten = unwritten[os.write(self._descriptor, unwritten) :]
            except BlockingIOError:
                select.select([], [self._descriptor], [], 1.0)
            except OSError:
                # The reader is gone, or the disk is full. The next line is tried again.
                LOST["write_failed"] += 1
                return


def set_up(level: str, log_format: Literal["auto", "json", "text"] = "json") -> None:
    """Write every log line of the process to stderr.

    `auto` is text if stderr is a terminal, and JSON otherwise. Python's warnings and uncaught
    exceptions of threads are included.
    """
    is_text = log_format == "text" or (log_format == "auto" and os.isatty(2))
    writer = LineWriter(line=text_line if is_text else json_line)
    logging.basicConfig(level=level, handlers=[writer], force=True)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = name != "uvicorn.access"
    logging.getLogger("uvicorn.error").setLevel("WARNING")
    # Python itself would print these to stderr, from any thread.
    logging.captureWarnings(True)
    threading.excepthook = _log_thread_failure
    sys.unraisablehook = _log_unraisable


def flush() -> None:
    """Write all earlier lines, within FLUSH_S. Call it before os._exit, which runs no handlers."""
    for handler in logging.getLogger().handlers:
        handler.flush()


def _log_thread_failure(failure: threading.ExceptHookArgs) -> None:
    name = None if failure.thread is None else failure.thread.name
    log.error("a thread failed", exc_info=failure.exc_value, extra={"thread_name": name})


def _log_unraisable(failure: sys.UnraisableHookArgs) -> None:
    log.error(
        "an exception could not be raised",
        exc_info=failure.exc_value,
        extra={"during": failure.err_msg},
    )
