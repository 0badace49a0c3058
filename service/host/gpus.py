"""
The NVIDIA GPUs of this host, as CUDA's driver reports them. No package is needed.

NVML cannot replace this: it ignores CUDA_VISIBLE_DEVICES.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DRIVER = "libcuda.so.1"
VERSION = Path("/sys/module/nvidia/version")
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_…
_UUID_BYTES = 16


@dataclass(frozen=True)
class Gpu:
    """One GPU that CUDA would use."""

    name: str
    """The product's name, such as NVIDIA H100 80GB HBM3."""
    compute_capability: str
    """Version of the GPU's instruction set, such as 9.0."""
    memory_bytes: int
    """Total memory in bytes."""
    uuid: str
    """Identifier in nvidia-smi's form: GPU- and 32 hexadecimal digits in five groups."""

    def to_dict(self) -> dict[str, Any]:
        """Return the GPU and the driver's version for /info."""
        return {
            "name": self.name,
            "compute_capability": self.compute_capability,
            "memory_bytes": self.memory_bytes,
            "uuid": self.uuid,
            "driver": driver_version(),
        }


@functools.cache
def visible() -> tuple[Gpu, ...]:
    """Return the GPUs that CUDA would use, by CUDA_VISIBLE_DEVICES; none without a driver."""
    return _query(_driver())


def unavailable_reason() -> str:
    """Return why `visible` is empty, in words."""
    if _driver() is None:
        return f"{DRIVER} is not here, so there is no NVIDIA driver"
    return "the NVIDIA driver shows no GPU to this process"


def driver_version() -> str | None:
    """Return the driver's version, such as 580.82.07; None where the kernel does not report it."""
    try:
        return VERSION.read_text(encoding="utf-8").strip()
    except OSError:
        return None


def _driver() -> Any:
    try:
        return ctypes.CDLL(DRIVER)
    except OSError:
        return None


def _query(driver: Any) -> tuple[Gpu, ...]:
    """Return the devices of CUDA's driver API. No context is made, so no GPU memory is used."""
    count = ctypes.c_int(0)
    if driver is None or driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return ()
    return tuple(_describe(driver, number) for number in range(count.value))


def _describe(driver: Any, number: int) -> Gpu:
    device = ctypes.c_int(0)
    driver.cuDeviceGet(ctypes.byref(device), number)
    name = ctypes.create_string_buffer(256)
    driver.cuDeviceGetName(name, len(name), device)
    major, minor = _attribute(driver, _MAJOR, device), _attribute(driver, _MINOR, device)
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


def _attribute(driver: Any, attribute: int, device: ctypes.c_int) -> int:
    value = ctypes.c_int(0)
    driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
    return value.value
