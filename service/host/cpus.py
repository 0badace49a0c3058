"""
The processors that this process may use: their number, by affinity and a container's CPU quota, and
the precisions that they have instructions for.

CPython's `os.process_cpu_count` is said to honour cgroup quotas from Python 3.14 (python/cpython
#120078). Once 3.14 is the oldest supported version and that is verified, `usable` and its helpers
can go.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from service.host import cgroups

# Instruction sets that make a precision native; one is enough. Without them bf16 is emulated at a
# fraction of fp32's speed, and int8 saturates and is little faster. The names are the Linux
# kernel's, for x86-64 and arm64.
NATIVE = {
    "bf16": ("avx512_bf16", "amx_bf16", "avx_ne_convert", "bf16"),
    "i8": ("avx512_vnni", "avx_vnni", "amx_int8", "i8mm", "asimddp"),
}
# Instruction sets among these that each value of ONEDNN_MAX_CPU_ISA allows the engine to use:
# https://uxlfoundation.github.io/oneDNN/dev_guide_cpu_dispatcher_control.html
_AVX_512 = ("avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
_ALLOWED = {
    "SSE41": (),
    "AVX": (),
    "AVX2": (),
    "AVX2_VNNI": ("avx_vnni",),
    "AVX2_VNNI_2": ("avx_vnni", "avx_ne_convert"),
    "AVX512_CORE": (),
    "AVX512_CORE_VNNI": _AVX_512[:1],
    "AVX512_CORE_BF16": _AVX_512[:2],
    "AVX512_CORE_FP16": _AVX_512[:2],
    "AVX10_1_512": _AVX_512[:2],
}
CPUINFO = Path("/proc/cpuinfo")


def native_precisions(cpuinfo: Path = CPUINFO) -> set[str]:
    """Return the precisions that a processor has instructions for; only f32 if it is unknown.

    On this host's own processor, ONEDNN_MAX_CPU_ISA may limit the engine to fewer.
    """
    instructions = set(_read(cpuinfo, "flags", "Features").split())
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()
    if cpuinfo == CPUINFO and limit in _ALLOWED:
        instructions &= set(_ALLOWED[limit])
    native = {precision for precision, sets in NATIVE.items() if instructions & set(sets)}
    return {"f32"} | native


def describe(cpuinfo: Path = CPUINFO) -> str:
    """Return the processor's name and the precisions that it has instructions for."""
    name = _read(cpuinfo, "model name", "CPU part") or "unknown"
    return f"{name}, instructions for {', '.join(sorted(native_precisions(cpuinfo)))}"


def model_numbers(cpuinfo: Path = CPUINFO) -> str:
    """Return the numbers of the processor's model, which many clouds hide from its name."""
    names = ("cpu family", "model", "stepping", "CPU implementer", "CPU part")
    return ", ".join(f"{name} {value}" for name in names if (value := _read(cpuinfo, name)))


def _read(cpuinfo: Path, *names: str) -> str:
    """Return the first value in /proc/cpuinfo under one of these names; empty if there is none."""
    with contextlib.suppress(OSError):
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() in names:
                return value.strip()
    return ""


def usable(cgroup: Path = cgroups.MOUNT, membership: Path = cgroups.MEMBERSHIP) -> int:
    """Return the smaller of CPU affinity and cgroup quota (v2's or v1's), rounded down, at least 1.

    `cgroup` is where cgroups are mounted. `membership` lists the cgroups of this process.
    """
    if hasattr(os, "sched_getaffinity"):
        limits = [len(os.sched_getaffinity(0))]
    else:
        limits = [os.cpu_count() or 1]
    for folder in cgroups.folders("cpu", cgroup, membership):
        quota = _quota(folder)
        if quota is not None:
            limits.append(int(quota))
    return max(1, min(limits))


def _quota(folder: Path) -> float | None:
    """Return a cgroup's CPU seconds per second; None where there is no limit."""
    try:
        limit, period = (folder / "cpu.max").read_text(encoding="utf-8").split()
        return None if limit == "max" else int(limit) / int(period)
    except (OSError, ValueError):
        pass  # No cgroup of version 2.
    try:
        limit_us = int((folder / "cpu.cfs_quota_us").read_text(encoding="utf-8"))
        period_us = int((folder / "cpu.cfs_period_us").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return None if limit_us <= 0 else limit_us / period_us
