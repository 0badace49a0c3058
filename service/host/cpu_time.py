"""
The CPU time of the engine: that of the process, without the threads that do other work.

Engines compute in threads of their own, which cannot be listed from outside. The threads of the
event loop and of the executors can, so their time is subtracted.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.Lock()
_clocks: dict[int, int] = {}
"""The CPU clock of each excluded thread, by its identifier."""
_ended_ns = 0
"""CPU time of excluded threads that have ended."""


@contextmanager
def excluded_thread() -> Iterator[None]:
    """Exclude what the current thread computes in this block."""
    global _ended_ns
    thread = threading.get_ident()
    clock = time.pthread_getcpuclockid(thread)
    with _lock:
        _clocks[thread] = clock
        _ended_ns -= time.clock_gettime_ns(clock)
    try:
        yield
    finally:
        with _lock:
            del _clocks[thread]
            _ended_ns += time.clock_gettime_ns(clock)


def engine_ns() -> int:
    """Return the nanoseconds of CPU time of all threads that are not excluded."""
    # The lock keeps a thread alive while its clock is read.
    with _lock:
        others = sum([time.clock_gettime_ns(clock) for clock in _clocks.values()])
        return time.process_time_ns() - others - _ended_ns
