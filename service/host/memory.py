"""
Recognises errors of engines and libraries that mean that memory ran out, and finds out the limit.
"""

from __future__ import annotations

import contextlib
import re
import resource
from collections.abc import Iterator
from pathlib import Path

from command import Unavailable

# Messages of C++'s allocator, the loader, the system, Python's threads, ONNX Runtime and oneDNN.
WORDS = re.compile(
    r"bad_alloc|failed to map segment|cannot allocate memory|can't start new thread|cannot create"
    r" thread|"
    r"failed to allocate memory|out of memory|not enough memory|could not allocate",
    re.IGNORECASE,
)
THREADS = re.compile("can't start new thread|cannot create thread", re.IGNORECASE)
LIMITS = (
    (resource.RLIMIT_AS, "its address space is limited to {:,} bytes (ulimit -v)"),
    (resource.RLIMIT_DATA, "its data is limited to {:,} bytes (ulimit -d)"),
)
CGROUP_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)
MEMINFO = Path("/proc/meminfo")


class NotEnoughMemory(Unavailable):
    """Raised where a model cannot be loaded because memory, or memory for threads, ran out."""


def ran_out(error: BaseException) -> bool:
    """Return whether an error, or one that caused it, means that memory ran out."""
    return any(isinstance(link, MemoryError) or WORDS.search(str(link)) for link in _chain(error))


def not_enough(name: str, variant: str, weight_bytes: int, error: BaseException) -> NotEnoughMemory:
    """Return the error for a model that does not fit, with its weights' size and the limit."""
    hint = ""
    if any(THREADS.search(str(link)) for link in _chain(error)):
        hint = (
            " A thread could not be started; a limit of processes may be the cause too (ulimit -u,"
            " a container's pids)."
        )
    return NotEnoughMemory(
        f"There is not enough memory to load {name}: {variant} has {weight_bytes:,} bytes of"
        f" weights, and loading takes a few times that; {limit()}. Give the process more memory, or"
        f" choose a smaller variant with --variant.{hint}"
    )


def limit() -> str:
    """Return what limits this process's memory, in words."""
    for number, words in LIMITS:
        soft, _ = resource.getrlimit(number)
        if soft != resource.RLIM_INFINITY:
            return words.format(soft)
    for file in CGROUP_LIMITS:
        with contextlib.suppress(OSError, ValueError):
            limit_bytes = int(file.read_text(encoding="ascii"))
            if limit_bytes < 2**60:  # Version 1 writes a number near 2**63 for no limit.
                return f"its container is limited to {limit_bytes:,} bytes"
    with contextlib.suppress(OSError, AttributeError):
        available = re.search(r"MemAvailable:\s+(\d+) kB", MEMINFO.read_text(encoding="ascii"))
        if available:
            return f"this host has {int(available[1]) * 1024:,} bytes available"
    return "its limit is not known"


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and those that caused it, each once."""
    visited: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in visited:
        visited.add(id(link))
        yield link
        link = link.__cause__ or link.__context__
