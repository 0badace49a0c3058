"""
Waits, where a plan asks for it, until the other machines of the same host leave this one alone.

Linux counts the time in which a processor had work and the hypervisor ran somebody else instead
("steal", proc(5)). It grows only while there is work, so the probe keeps the processors busy for a
moment. It knows nothing of arms and answers: waiting favours neither side.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

MOST_STOLEN = 0.03
"""Of a busy processor's time; beyond it a restart does not begin while there is time to wait."""
PROBE_S = 2.0
PAUSE_S = 5.0

STAT = Path("/proc/stat")
SPIN = (
    "import os, sys, time\nos.sched_setaffinity(0, {int(sys.argv[1])})\nend = time.monotonic() +"
    " float(sys.argv[2])\nwhile time.monotonic() < end: pass"
)


def wait_for_calm(
    most_s: float, probe: Callable[[], float | None], pause_s: float = PAUSE_S
) -> float:
    """Waits until `probe` says that little is stolen, at most `most_s` seconds; returns the seconds
    waited.
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
    """What share of these processors' busy time the hypervisor takes just now; None where the
    system does not say.
    """
    wanted = set(cpus)
    before = _ticks(wanted)
    if before is None:
        return None
    spinning = [
        subprocess.Popen([sys.executable, "-S", "-E", "-c", SPIN, str(cpu), str(PROBE_S)])
        for cpu in wanted
    ]
    for process in spinning:
        process.wait()
    after = _ticks(wanted)
    if after is None:
        return None
    busy, stolen = after[0] - before[0], after[1] - before[1]
    return stolen / (busy + stolen) if busy + stolen else 0.0


def _ticks(cpus: set[int]) -> tuple[int, int] | None:
    """Ticks in which the processors worked (user, nice, system), and ticks in which they would
    have.
    """
    try:
        lines = [line.split() for line in STAT.read_text(encoding="utf-8").splitlines()]
    except OSError:
        return None
    rows = [
        [int(field) for field in line[1:]] for line in lines if line[0] in {f"cpu{n}" for n in cpus}
    ]
    if len(rows) != len(cpus) or any(len(row) < 8 for row in rows):
        return None
    return sum(sum(row[:3]) for row in rows), sum(row[7] for row in rows)
