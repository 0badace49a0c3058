"""
What this process may really use of the processors: how many, by a container's quota and affinity and not by the
host's count, and which precisions they have instructions for.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

# One of these instruction sets makes a precision native; without, it is emulated at a fraction of fp32's speed (bf16) or
# saturates and gains little (int8). The names are the kernel's, for x86-64 and arm64.
NATIVE = {
    "bf16": ("avx512_bf16", "amx_bf16", "avx_ne_convert", "bf16"),
    "i8": ("avx512_vnni", "avx_vnni", "amx_int8", "i8mm", "asimddp"),
}


def native_precisions(cpuinfo: Path = Path("/proc/cpuinfo")) -> set[str]:
    """The precisions the processor has instructions for; f32 alone where it cannot be asked."""
    found: set[str] = set()
    with contextlib.suppress(OSError):
        for line in cpuinfo.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("flags", "Features"):
                found = set(value.split())
                break
    return {"f32"} | {precision for precision, instructions in NATIVE.items() if found & set(instructions)}


def usable(cgroup: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """The smaller of CPU affinity and cgroup quota (v2's or v1's), at least 1.

    `cgroup` is where cgroups are mounted, `own` what says which of them this process is in.
    """
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [quota for folder in _folders(cgroup, own) if (quota := _quota(folder)) is not None]
    return max(1, min(affinity, *map(int, quotas)) if quotas else affinity)


def _folders(cgroup: Path, own: Path) -> list[Path]:
    """Those of this process's cgroup and of all that it lies in: each of them may have a limit.

    In a container of its own namespace that is the mount's root alone; under systemd, or in the host's namespace, it is a path below.
    """
    try:
        lines = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:
        lines = []
    places = [(cgroup, "/"), (cgroup / "cpu", "/")]
    places += [(cgroup if not controllers else cgroup / "cpu", path) for _, controllers, path in lines if not controllers or "cpu" in controllers.split(",")]
    return list(dict.fromkeys(root / part for root, path in places for part in [Path(path.lstrip("/")), *Path(path.lstrip("/")).parents]))


def _quota(folder: Path) -> float | None:
    """Processors' worth of time per period, by the files of v2 or of v1, or None where there is no limit."""
    try:
        limit, period = (folder / "cpu.max").read_text().split()
        return None if limit == "max" else int(limit) / int(period)
    except (OSError, ValueError):
        pass
    try:
        limit_us = int((folder / "cpu.cfs_quota_us").read_text())
        return None if limit_us <= 0 else limit_us / int((folder / "cpu.cfs_period_us").read_text())
    except (OSError, ValueError):
        return None
