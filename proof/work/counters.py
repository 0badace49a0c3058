"""
Hardware counters of a process: instructions in user space, by Linux's perf_event_open(2).

A container or a virtual machine often has none. `unavailable_reason` tries.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
from pathlib import Path

from command import Unavailable

SYSCALLS = {"x86_64": 298, "aarch64": 241}
"""Number of perf_event_open by machine."""
HARDWARE, INSTRUCTIONS = 0, 1
"""PERF_TYPE_HARDWARE and PERF_COUNT_HW_INSTRUCTIONS."""
SOFTWARE, TASK_CLOCK = 1, 1
"""PERF_TYPE_SOFTWARE and PERF_COUNT_SW_TASK_CLOCK: nanoseconds of CPU time. Tests use it where
there is no hardware counter.
"""
INHERIT, PINNED, EXCLUDE_KERNEL, EXCLUDE_HV = 1 << 1, 1 << 2, 1 << 5, 1 << 6
ATTR_BYTES = 112
"""Size of perf_event_attr, version 5 (PERF_ATTR_SIZE_VER5); later fields are not needed."""
FLAGS_OFFSET = 40
FD_CLOEXEC = 1 << 3


def unavailable_reason() -> str | None:
    """Return why this process cannot count instructions; None if it can."""
    try:
        counter = Counter(os.getpid())
    except Unavailable as error:
        return str(error)
    try:
        return None if counter.read() > 0 else "the hardware counter stays at 0"
    except Unavailable as error:
        return str(error)
    finally:
        counter.close()


class Counter:
    """Counts an event in all threads of a process, and in those that it starts later."""

    def __init__(self, pid: int, kind: int = HARDWARE, event: int = INSTRUCTIONS) -> None:
        """Begin to count; Unavailable if there is no such counter here."""
        self._descriptors: list[int] = []
        try:
            for thread in sorted(int(path.name) for path in Path(f"/proc/{pid}/task").iterdir()):
                self._descriptors.append(_open(thread, kind, event))
        except OSError as error:
            self.close()
            raise Unavailable(
                f"there is no hardware counter of instructions ({error.strerror})"
            ) from None

    def read(self) -> int:
        """Return the count so far; Unavailable if the counter was not always on."""
        return sum(_read(descriptor) for descriptor in self._descriptors)

    def close(self) -> None:
        """Stop counting."""
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors = []


def _open(thread: int, kind: int, event: int) -> int:
    number = SYSCALLS.get(platform.machine())
    if number is None:
        raise OSError(0, f"unknown machine {platform.machine()}")
    attributes = bytearray(ATTR_BYTES)
    struct.pack_into("=IIQ", attributes, 0, kind, ATTR_BYTES, event)
    # A pinned event is never multiplexed with others: it counts always, or reading it fails.
    flags = INHERIT | PINNED | EXCLUDE_KERNEL | EXCLUDE_HV
    struct.pack_into("=Q", attributes, FLAGS_OFFSET, flags)
    buffer = (ctypes.c_char * ATTR_BYTES).from_buffer(attributes)
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor: int = libc.syscall(number, buffer, thread, -1, -1, ctypes.c_ulong(FD_CLOEXEC))
    if descriptor < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return descriptor


def _read(descriptor: int) -> int:
    content = os.read(descriptor, 8)
    if len(content) != 8:
        raise Unavailable("the hardware counter is in use by another program")
    return int(struct.unpack("=Q", content)[0])
