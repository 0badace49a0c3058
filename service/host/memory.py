"""
Says that memory ran out, where engines and libraries say it in words of their own, and how much
there was.
"""

from __future__ import annotations

import contextlib
import re
import resource
from collections.abc import Iterator
from pathlib import Path

from command import Unavailable

# Of C++'s allocator, of the loader, of the system, of Python's threads, and of ONNX Runtime's and
# oneDNN's allocators.
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
    """A model cannot be loaded because memory, or what threads need of it, ran out."""


def ran_out(error: BaseException) -> bool:
    """Whether an error, or one that it came from, says that memory ran out."""
    return any(isinstance(link, MemoryError) or WORDS.search(str(link)) for link in _chain(error))


def not_enough(name: str, variant: str, weight_bytes: int, error: BaseException) -> NotEnoughMemory:
    """The refusal of a model, with what there is and what it would take."""
    threads = any(THREADS.search(str(link)) for link in _chain(error))
    also = (
        " A thread could not be started, which the number of processes may forbid too (ulimit -u, a"
        " container's pids)."
        if threads
        else ""
    )
    return NotEnoughMemory(
        f"There is not enough memory to load {name}: {variant} has {weight_bytes:,} bytes of"
        f" weights, and loading takes a few times that; {limit()}. Give the process more memory, or"
        f" choose a smaller variant with --variant.{also}"
    )


def limit() -> str:
    """What limits this process's memory, in words."""
    for number, words in LIMITS:
        soft, _ = resource.getrlimit(number)
        if soft != resource.RLIM_INFINITY:
            return words.format(soft)
    for file in CGROUP_LIMITS:
        with contextlib.suppress(OSError, ValueError):
            most = int(file.read_text(encoding="ascii"))
            if most < 2**60:  # version 1 says it is unlimited by a number near 2**63
                return f"its container is limited to {most:,} bytes"
    with contextlib.suppress(OSError, AttributeError):
        available = re.search(r"MemAvailable:\s+(\d+) kB", MEMINFO.read_text(encoding="ascii"))
        if available:
            return f"this host has {int(available[1]) * 1024:,} bytes available"
    return "its limit is not known"


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    following: BaseException | None = error
    while following is not None and id(following) not in seen:
        seen.add(id(following))
        yield following
        following = following.__cause__ or following.__context__
