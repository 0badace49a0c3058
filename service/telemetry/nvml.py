"""
What the visible GPUs do just now, by NVML, where nvidia-ml-py is installed: memory, load, clocks,
power.
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

# The clocks are held back for one of these reasons; NVML gives them as bits. An idle GPU and one
# that its owner set to a clock are not slowed down by anything.
SLOWED_BY = {
    "power": 0x4 | 0x80,  # the cap on power, in software or by the brake in hardware
    "heat": 0x20 | 0x40,
    "hardware": 0x8,
    "sync": 0x10,
}


@dataclass(frozen=True)
class Reading:
    """What one GPU does just now; None where it does not say."""

    uuid: str
    name: str
    memory_used_bytes: int | None
    utilization_ratio: float | None
    """Share of the last sampling period in which a kernel ran."""
    sm_clock_hertz: float | None
    power_watts: float | None
    temperature_celsius: float | None
    slowed_by: frozenset[str]


def readings() -> list[Reading]:
    """What the visible GPUs do; empty where there are none of them, or no nvidia-ml-py."""
    nvml = _nvml()
    return [] if nvml is None else read(nvml, gpus.visible())


def read(nvml: Any, seen: Iterable[Gpu]) -> list[Reading]:
    """What each of those GPUs does, by the module pynvml; a GPU that it does not know is
    left out.
    """
    found = []
    for gpu in seen:
        with contextlib.suppress(nvml.NVMLError):
            found.append(_read(nvml, gpu))
    return found


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

    def asked(question: Callable[..., Any], *more: Any) -> Any:
        with contextlib.suppress(
            nvml.NVMLError
        ):  # What a device does not tell, as MIG's parts do not their power.
            return question(handle, *more)
        return None

    memory = asked(nvml.nvmlDeviceGetMemoryInfo)
    rates = asked(nvml.nvmlDeviceGetUtilizationRates)
    clock = asked(nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_SM)
    power = asked(nvml.nvmlDeviceGetPowerUsage)
    bits = asked(nvml.nvmlDeviceGetCurrentClocksEventReasons) or 0
    return Reading(
        uuid=gpu.uuid,
        name=gpu.name,
        memory_used_bytes=None if memory is None else memory.used,
        utilization_ratio=None if rates is None else rates.gpu / 100,
        sm_clock_hertz=None if clock is None else clock * 1e6,
        power_watts=None if power is None else power / 1000,
        temperature_celsius=asked(nvml.nvmlDeviceGetTemperature, nvml.NVML_TEMPERATURE_GPU),
        slowed_by=_slowed(bits),
    )


def _slowed(bits: int) -> frozenset[str]:
    return frozenset(reason for reason, mask in SLOWED_BY.items() if bits & mask)


class Collector:
    """The readings as metrics, taken when they are scraped. A GPU that does not tell a value has no
    series of it.
    """

    def __init__(self, read: Callable[[], list[Reading]]) -> None:
        self._read = read

    def collect(self) -> Iterator[GaugeMetricFamily]:
        taken = self._read()
        for name, text, value in _METRICS:
            family = GaugeMetricFamily(f"drbert_gpu_{name}", text, labels=["gpu"])
            for reading in taken:
                if (found := value(reading)) is not None:
                    family.add_metric([reading.uuid], found)
            yield family
        slowed = GaugeMetricFamily(
            "drbert_gpu_slowed",
            "1 while the GPU's clocks are held back for that reason.",
            labels=["gpu", "reason"],
        )
        for reading in taken:
            for reason in SLOWED_BY:
                slowed.add_metric([reading.uuid, reason], float(reason in reading.slowed_by))
        yield slowed


_METRICS: tuple[tuple[str, str, Callable[[Reading], float | None]], ...] = (
    (
        "memory_used_bytes",
        "Memory of the GPU that is in use, by whomever.",
        lambda reading: reading.memory_used_bytes,
    ),
    (
        "utilization_ratio",
        "Share of the last moment in which the GPU computed.",
        lambda reading: reading.utilization_ratio,
    ),
    ("sm_clock_hertz", "Clock of the GPU's processors.", lambda reading: reading.sm_clock_hertz),
    ("power_watts", "Power that the GPU draws.", lambda reading: reading.power_watts),
    ("temperature_celsius", "Temperature of the GPU.", lambda reading: reading.temperature_celsius),
)
