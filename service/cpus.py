"""
How many processors this process may really use: a container's quota and affinity, not the host's count.
"""

from __future__ import annotations

import os
from pathlib import Path


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
