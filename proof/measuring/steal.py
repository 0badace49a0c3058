"""
Wait, where a plan asks for it, until other guests of the same host leave the processors alone.

Linux counts the time in which a processor had work and the hypervisor ran another guest ("steal",
proc(5)). The count grows only while there is work, so the probe keeps the processors busy for a
moment. It knows nothing of arms and answers, so waiting favours neither side.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

MOST_STOLEN = 0.03
"""Largest share of a busy processor's time that may be stolen when a restart begins."""
PROBE_S = 2.0
"""Duration of one probe in seconds."""
PAUSE_S = 5.0
"""Pause between two probes in seconds."""

STAT = Path("/proc/stat")
SPIN = (
    "import os, sys, time\nos.sched_setaffinity(0, {int(sys.argv[1])})\nend = time.monotonic() +"
    " float(sys.argv[2])\nwhile time.monotonic() < end: pass"
)


def wait_for_calm(
    most_s: float, probe: Callable[[], float | None], pause_s: float = PAUSE_S
) -> float:
    """Wait at most `most_s` seconds until `probe` reports little steal; return the seconds waited.

    A probe that returns None, because the system does not count steal, ends the wait.
    """
    began = time.monotonic()
    while most_s > 0:
        stolen = probe()
        waited = time.monotonic() - began
        if stolen is None or stolen <= MOST_STOLEN or waited >= most_s:
            return waited
        time.sleep(min(pause_s, most_s - waited))
    return 0.0


def stolen_share(cpus: Iterable[int]) -> float | None:
    """Return the share of these processors' busy time that the hypervisor takes just now.

    Keeps them busy for PROBE_S seconds. None where the system does not count steal.
    """
    cpu_set = set(cpus)
    before = _ticks(cpu_set)
    if before is None:
        return None
    spinning = [
        subprocess.Popen([sys.executable, "-S", "-E", "-c", SPIN, str(cpu), str(PROBE_S)])
        for cpu in cpu_set
    ]
    for process in spinning:
        process.wait()
    after = _ticks(cpu_set)
    if after is None:
        return None
    busy, stolen = after[0] - before[0], after[1] - before[1]
    return stolen / (busy + stolen) if busy + stolen else 0.0


def _ticks(cpus: set[int]) -> tuple[int, int] | None:
    """Return ticks of work (user, nice, system) and stolen ticks, of all the processors together.

    None if /proc/stat does not have them for each.
    """
    names = {f"cpu{number}" for number in cpus}
    rows = []
    try:
        for line in STAT.read_text(encoding="utf-8").splitlines():
            name, *ticks = line.split()
            if name in names:
                rows.append([int(count) for count in ticks])
    except OSError:
        return None
    if len(rows) != len(cpus) or any(len(row) < 8 for row in rows):
        return None
    return sum(sum(row[:3]) for row in rows), sum(row[7] for row in rows)
