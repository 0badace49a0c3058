"""
Readings of the visible GPUs by NVML: memory, load, clocks, power and temperature.

They need nvidia-ml-py; without it there are none.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from prometheus_client.core import GaugeMetricFamily

from service.host import gpus
from service.host.gpus import Gpu

# Reasons for reduced clocks, as bits of NVML's mask. Idleness and a clock that the owner set are no
# such reasons.
SLOWED_BY = {
    "power": 0x4 | 0x80,  # the power cap in software, or the power brake in hardware
    "heat": 0x20 | 0x40,
    "hardware": 0x8,
    "sync": 0x10,
}


@dataclass(frozen=True)
class Reading:
    """The state of one GPU at one moment. None: the GPU does not report the value."""

    uuid: str
    """Identifier in nvidia-smi's form."""
    name: str
    """The product's name."""
    memory_used_bytes: int | None
    """Memory in use by all processes, in bytes."""
    utilization_ratio: float | None
    """Share of the last sampling period in which a kernel ran, 0 to 1."""
    sm_clock_hertz: float | None
    """Clock of the streaming multiprocessors, in hertz."""
    power_watts: float | None
    """Power draw in watts."""
    temperature_celsius: float | None
    """Temperature in degrees Celsius."""
    slowed_by: frozenset[str]
    """Reasons for reduced clocks, from SLOWED_BY; empty where there are none."""


def readings() -> list[Reading]:
    """Return a reading of every visible GPU; none without GPUs or without nvidia-ml-py."""
    nvml = _nvml()
    return [] if nvml is None else read(nvml, gpus.visible())


def read(nvml: Any, visible: Iterable[Gpu]) -> list[Reading]:
    """Return a reading of each GPU by the module pynvml, without GPUs that NVML does not know."""
    taken = []
    for gpu in visible:
        with contextlib.suppress(nvml.NVMLError):
            taken.append(_read(nvml, gpu))
    return taken


@functools.cache
def _nvml() -> Any:
    if not gpus.visible():
        return None
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml


def _read(nvml: Any, gpu: Gpu) -> Reading:
    handle = nvml.nvmlDeviceGetHandleByUUID(gpu.uuid)

    def query(function: Callable[..., Any], *arguments: Any) -> Any:
        # A device may not support a query: MIG instances do not report their power.
        with contextlib.suppress(nvml.NVMLError):
            return function(handle, *arguments)
        return None

    memory = query(nvml.nvmlDeviceGetMemoryInfo)
    rates = query(nvml.nvmlDeviceGetUtilizationRates)
    clock = query(nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_SM)
    power = query(nvml.nvmlDeviceGetPowerUsage)
    bits = query(nvml.nvmlDeviceGetCurrentClocksEventReasons) or 0
    return Reading(
        uuid=gpu.uuid,
        name=gpu.name,
        memory_used_bytes=None if memory is None else memory.used,
        utilization_ratio=None if rates is None else rates.gpu / 100,
        sm_clock_hertz=None if clock is None else clock * 1e6,
        power_watts=None if power is None else power / 1000,
        temperature_celsius=query(nvml.nvmlDeviceGetTemperature, nvml.NVML_TEMPERATURE_GPU),
        slowed_by=_slowed(bits),
    )


def _slowed(bits: int) -> frozenset[str]:
    return frozenset(reason for reason, mask in SLOWED_BY.items() if bits & mask)


class Collector:
    """Yields readings as metrics, taken at each scrape. A value that is None has no series."""

    def __init__(self, read: Callable[[], list[Reading]]) -> None:
        self._read = read

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yield the metrics, for prometheus_client."""
        taken = self._read()
        for name, text, value_of in _METRICS:
            family = GaugeMetricFamily(f"drbert_gpu_{name}", text, labels=["gpu"])
            for reading in taken:
                value = value_of(reading)
                if value is not None:
                    family.add_metric([reading.uuid], value)
            yield family
        slowed = GaugeMetricFamily(
            "drbert_gpu_slowed",
            "1 while the GPU's clocks are reduced for that reason.",
            labels=["gpu", "reason"],
        )
        for reading in taken:
            for reason in SLOWED_BY:
                slowed.add_metric([reading.uuid, reason], float(reason in reading.slowed_by))
        yield slowed


_METRICS: tuple[tuple[str, str, Callable[[Reading], float | None]], ...] = (
    (
        "memory_used_bytes",
        "Memory of the GPU in use by all processes.",
        lambda reading: reading.memory_used_bytes,
    ),
    (
        "utilization_ratio",
        "Share of the last sampling period in which a kernel ran.",
        lambda reading: reading.utilization_ratio,
    ),
    (
        "sm_clock_hertz",
        "Clock of the GPU's streaming multiprocessors.",
        lambda reading: reading.sm_clock_hertz,
    ),
    ("power_watts", "Power draw of the GPU.", lambda reading: reading.power_watts),
    ("temperature_celsius", "Temperature of the GPU.", lambda reading: reading.temperature_celsius),
)
