"""
What this process may really use of the processors: how many, by a container's quota and affinity
and not by the host's count, and which precisions they have instructions for.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

# One of these instruction sets makes a precision native; without, it is emulated at a fraction of
# fp32's speed (bf16) or saturates and gains little (int8). The names are the kernel's, for x86-64
# and arm64.
NATIVE = {
    "bf16": ("avx512_bf16", "amx_bf16", "avx_ne_convert", "bf16"),
    "i8": ("avx512_vnni", "avx_vnni", "amx_int8", "i8mm", "asimddp"),
}
# What ONEDNN_MAX_CPU_ISA lets the engine use of these, where it is set:
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
OWN = Path("/proc/cpuinfo")


def native_precisions(cpuinfo: Path = OWN) -> set[str]:
    """The precisions that the engine has instructions for on a processor; f32 alone where it cannot
    be asked.

    On this host's own, ONEDNN_MAX_CPU_ISA may hold the engine to fewer.
    """
    instructions = set(_read(cpuinfo, "flags", "Features").split())
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()
    if cpuinfo == OWN and limit in _ALLOWED:
        instructions &= set(_ALLOWED[limit])
    return {"f32"} | {precision for precision, known in NATIVE.items() if instructions & set(known)}


def describe(cpuinfo: Path = OWN) -> str:
    """The processor's name, and the precisions that it has instructions for."""
    name = _read(cpuinfo, "model name", "CPU part") or "unknown"
    return f"{name}, instructions for {', '.join(sorted(native_precisions(cpuinfo)))}"


def _read(cpuinfo: Path, *names: str) -> str:
    """The first value in /proc/cpuinfo under one of these names; empty if there is none."""
    with contextlib.suppress(OSError):
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() in names:
                return value.strip()
    return ""


def usable(cgroup: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """The smaller of CPU affinity and cgroup quota (v2's or v1's), at least 1.

    `cgroup` is where cgroups are mounted, `own` what says which of them this process is in.
    """
    affinity = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    quotas = [quota for folder in _folders(cgroup, own) if (quota := _quota(folder)) is not None]
    return max(1, min(affinity, *map(int, quotas)) if quotas else affinity)


def _folders(cgroup: Path, own: Path) -> list[Path]:
    """Those of this process's cgroup and of all that it lies in: each of them may have a limit.

    In a container of its own namespace that is the mount's root alone; under systemd, or in the
    host's namespace, it is a path below.
    """
    try:
        lines = [line.split(":", 2) for line in own.read_text(encoding="utf-8").splitlines()]
    except OSError:
        lines = []
    places = [(cgroup, "/"), (cgroup / "cpu", "/")]
    places += [
        (cgroup if not controllers else cgroup / "cpu", path)
        for _, controllers, path in lines
        if not controllers or "cpu" in controllers.split(",")
    ]
    return list(
        dict.fromkeys(
            root / part
            for root, path in places
            for part in [Path(path.lstrip("/")), *Path(path.lstrip("/")).parents]
        )
    )


def _quota(folder: Path) -> float | None:
    """Processors' worth of time per period, by the files of v2 or of v1, or None where there is no
    limit.
    """
    try:
        limit, period = (folder / "cpu.max").read_text(encoding="utf-8").split()
        return None if limit == "max" else int(limit) / int(period)
    except (OSError, ValueError):
        pass
    try:
        limit_us = int((folder / "cpu.cfs_quota_us").read_text(encoding="utf-8"))
        return (
            None
            if limit_us <= 0
            else limit_us / int((folder / "cpu.cfs_period_us").read_text(encoding="utf-8"))
        )
    except (OSError, ValueError):
        return None
