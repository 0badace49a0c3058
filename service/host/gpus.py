"""
The NVIDIA GPUs of this host, asked of the driver itself: no package is needed for it.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DRIVER = "libcuda.so.1"
VERSION = Path("/sys/module/nvidia/version")
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_…
_UUID_BYTES = 16


@dataclass(frozen=True)
class Gpu:
    name: str
    compute_capability: str
    """As 9.0."""
    memory_bytes: int
    uuid: str


@functools.cache
def visible() -> tuple[Gpu, ...]:
    """The GPUs that CUDA would use, CUDA_VISIBLE_DEVICES heeded; none where there is no driver."""
    return _ask(_driver())


def why_none() -> str:
    """Why `visible` is empty, in words."""
    if _driver() is None:
        return f"{DRIVER} is not here, so there is no NVIDIA driver"
    return "the NVIDIA driver shows no GPU to this process"


def driver_version() -> str | None:
    """The driver's, such as 580.82.07, where the kernel tells it."""
    try:
        return VERSION.read_text(encoding="utf-8").strip()
    except OSError:
        return None


def _driver() -> Any:
    try:
        return ctypes.CDLL(DRIVER)
    except OSError:
        return None


def _ask(driver: Any) -> tuple[Gpu, ...]:
    """What CUDA's driver API tells of each device; it makes no context, so it takes none of their
    memory.
    """
    count = ctypes.c_int(0)
    if driver is None or driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return ()
    return tuple(_describe(driver, number) for number in range(count.value))


def _describe(driver: Any, number: int) -> Gpu:
    device = ctypes.c_int(0)
    driver.cuDeviceGet(ctypes.byref(device), number)
    name = ctypes.create_string_buffer(256)
    driver.cuDeviceGetName(name, len(name), device)
    major, minor = (_attribute(driver, which, device) for which in (_MAJOR, _MINOR))
    memory = ctypes.c_size_t(0)
    driver.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    uuid = (ctypes.c_ubyte * _UUID_BYTES)()
    driver.cuDeviceGetUuid(uuid, device)
    text = bytes(uuid).hex()
    parts = (text[:8], text[8:12], text[12:16], text[16:20], text[20:])
    return Gpu(
        name.value.decode(errors="replace"),
        f"{major}.{minor}",
        memory.value,
        f"GPU-{'-'.join(parts)}",
    )


def _attribute(driver: Any, which: int, device: ctypes.c_int) -> int:
    value = ctypes.c_int(0)
    driver.cuDeviceGetAttribute(ctypes.byref(value), which, device)
    return value.value


def told(gpus: Iterable[Gpu]) -> list[dict[str, Any]]:
    """For /info."""
    return [
        {
            "name": gpu.name,
            "compute_capability": gpu.compute_capability,
            "memory_bytes": gpu.memory_bytes,
            "uuid": gpu.uuid,
            "driver": driver_version(),
        }
        for gpu in gpus
    ]
