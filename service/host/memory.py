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
from service.host import cgroups

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
CGROUP_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""Of both versions: the files of the limit and of what is used, and what of that can be freed, by
its name in memory.stat.
"""
UNLIMITED = 2**60
"""Version 1 writes a number near 2**63 for no limit."""
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
    limits = [limit_bytes for limit_bytes, _ in _cgroup_limits()]
    if limits:
        return f"its container is limited to {min(limits):,} bytes"
    available = _available_on_host()
    if available is not None:
        return f"this host has {available:,} bytes available"
    return "its limit is not known"


def available_bytes() -> int:
    """Return the bytes that this process may surely still take; 0 if that is not known.

    The least of the host's available memory and what the limits of address space, data and
    containers leave.
    """
    on_host = _available_on_host()
    if on_host is None:
        return 0
    available = [on_host]
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    for number, _ in LIMITS:
        soft, _ = resource.getrlimit(number)
        if soft != resource.RLIM_INFINITY:
            available.append(soft - pages * resource.getpagesize())
    available += (limit_bytes - used for limit_bytes, used in _cgroup_limits())
    return max(0, min(available))


def _available_on_host() -> int | None:
    with contextlib.suppress(OSError):
        line = re.search(r"MemAvailable:\s+(\d+) kB", MEMINFO.read_text(encoding="ascii"))
        if line is not None:
            return int(line[1]) * 1024
    return None


def _cgroup_limits() -> Iterator[tuple[int, int]]:
    """Yield the limit of each cgroup that has one, and what its processes use, in bytes.

    Cached files, which can be freed, do not count as used.
    """
    for folder in cgroups.folders("memory"):
        for limit_file, usage_file, freeable in CGROUP_FILES:
            with contextlib.suppress(OSError, ValueError):
                # Without a limit of version 2 it is the word max.
                limit_bytes = int((folder / limit_file).read_text(encoding="ascii"))
                used = int((folder / usage_file).read_text(encoding="ascii"))
                statistics = (folder / "memory.stat").read_text(encoding="ascii")
                line = re.search(rf"^{freeable} (\d+)$", statistics, re.MULTILINE)
                if limit_bytes < UNLIMITED:
                    yield limit_bytes, used - (int(line[1]) if line is not None else 0)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and those that caused it, each once."""
    visited: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in visited:
        visited.add(id(link))
        yield link
        link = link.__cause__ or link.__context__
