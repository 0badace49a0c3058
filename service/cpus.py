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


def usable(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """The smaller of CPU affinity and cgroup quota (v2, then v1), at least 1."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota(cgroup)
    return max(1, affinity if quota is None else min(affinity, int(quota)))


def _quota(cgroup: Path) -> float | None:
    """Processors' worth of time per period, or None where there is no limit."""
    try:
        limit, period = (cgroup / "cpu.max").read_text().split()
        return None if limit == "max" else int(limit) / int(period)
    except (OSError, ValueError):
        pass
    try:
        limit_us = int((cgroup / "cpu/cpu.cfs_quota_us").read_text())
        return None if limit_us <= 0 else limit_us / int((cgroup / "cpu/cpu.cfs_period_us").read_text())
    except (OSError, ValueError):
        return None
