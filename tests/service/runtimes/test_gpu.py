"""
GPU support before a GPU is used: missing requirements, the choice of a variant, the shapes, and the
readings of the driver and NVML. Fakes stand in for the driver and NVML.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from command import BadInput
from service.artifact import Artifact
from service.batching.shapes import CPU, GPU, Grid, Shapes, read_grid, write_grid
from service.host import gpus
from service.host.gpus import Gpu
from service.http.info import service_info
from service.runtimes import RuntimeUnavailable, onnxruntime
from service.runtimes.auto import Host, candidates, choose
from service.settings import Settings
from service.state import ServiceState
from service.telemetry import nvml
from service.telemetry.metrics import Metrics
from tests.factories import write_artifact

H100 = Gpu("NVIDIA H100 80GB HBM3", "9.0", 85_000_000_000, "GPU-0011")


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    return write_artifact(tmp_path / "bag")


@pytest.fixture
def uncached_libraries() -> Iterator[None]:
    """Search for libraries again; the result is otherwise cached for the process."""
    onnxruntime._missing_library.cache_clear()
    yield
    onnxruntime._missing_library.cache_clear()


# Missing requirements


def test_a_missing_driver_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "visible", tuple)
    monkeypatch.setattr(gpus, "DRIVER", "libcuda-that-is-not-here.so.1")
    assert (
        onnxruntime.missing_requirement("cuda")
        == "libcuda-that-is-not-here.so.1 is not here, so there is no NVIDIA driver; choose a"
        " variant for the CPU"
    )


def test_an_onnxruntime_for_cpus_is_reported_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gpus, "visible", lambda: (H100,))
    reason = onnxruntime.missing_requirement("cuda")
    assert reason is not None
    assert (
        "pip uninstall onnxruntime, then run `pip install '.[gpu]'` in the checkout of DrBERT Serve"
        in reason
    )


@pytest.mark.usefixtures("uncached_libraries")
def test_a_library_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(path: str, mode: int = 0) -> None:
        if "providers_cuda" in path:
            raise OSError(
                "libcublasLt.so.13: cannot open shared object file: No such file or directory"
            )

    monkeypatch.setattr(ctypes, "CDLL", load)
    assert (
        onnxruntime._missing_library("cuda")
        == "libcublasLt.so.13 cannot be loaded; run `pip install '.[gpu]'` in the checkout of"
        " DrBERT Serve, which brings CUDA 13 and cuDNN 9"
    )


@pytest.mark.usefixtures("uncached_libraries")
def test_nvidias_libraries_are_found_in_every_folder_of_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("nvidia/cudnn/lib", "nvidia/cu13/lib", "tensorrt_libs"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("libnvinfer.so.10", "libnvonnxparser.so.10"):
        (tmp_path / "tensorrt_libs" / name).touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert [
        str(folder.relative_to(tmp_path))
        for folder in onnxruntime._nvidia_folders()
        if tmp_path in folder.parents
    ] == ["nvidia/cu13/lib", "nvidia/cudnn/lib"]
    assert [library.name for library in onnxruntime._tensorrt_libraries()] == [
        "libnvinfer.so.10",
        "libnvonnxparser.so.10",
    ]
    loaded: list[str] = []

    def load(path: str, mode: int = 0) -> None:
        loaded.append(Path(path).name)

    monkeypatch.setattr(ctypes, "CDLL", load)
    assert onnxruntime._missing_library("tensorrt") is None
    assert loaded[-5:] == [
        "libnvinfer.so.10",
        "libnvonnxparser.so.10",
        "libcudnn.so.9",
        "libonnxruntime_providers_shared.so",
        "libonnxruntime_providers_tensorrt.so",
    ]


@pytest.mark.usefixtures("uncached_libraries")
def test_a_missing_cudnn_is_reported_though_the_provider_runs_without_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load(path: str, mode: int = 0) -> None:
        if "cudnn" in path:
            raise OSError(
                "libcudnn.so.9: cannot open shared object file: No such file or directory"
            )

    monkeypatch.setattr(ctypes, "CDLL", load)
    assert (
        onnxruntime._missing_library("cuda")
        == "libcudnn.so.9 cannot be loaded; run `pip install '.[gpu]'` in the checkout of"
        " DrBERT Serve, which brings CUDA 13 and cuDNN 9"
    )


# The choice


def with_gpu_variants(artifact: Artifact, status: str = "passed") -> Artifact:
    variant = artifact.manifest.variants["cpu-fp32"]
    gate = variant.gate.model_copy(update={"status": status})
    gpu_variants = {
        f"{runtime}-fp16": variant.model_copy(
            update={"runtime": runtime, "precision": "f16", "gate": gate}
        )
        for runtime in ("cuda", "tensorrt")
    }
    return Artifact(
        artifact.directory,
        artifact.manifest.model_copy(
            update={"variants": artifact.manifest.variants | gpu_variants}
        ),
    )


def host(missing: Mapping[str, str] = {}, has_gpu: bool = True) -> Host:
    return Host(missing_requirement=missing.get, has_gpu=has_gpu)


NO_TENSORRT = {"tensorrt": "libnvinfer.so.10 cannot be loaded"}
NO_GPU = {"cuda": "no driver", "tensorrt": "no driver"}


def test_auto_chooses_tensorrt_then_cuda_then_the_cpu(artifact: Artifact) -> None:
    exported = with_gpu_variants(artifact)
    assert choose(exported, host=host()).runtime == "tensorrt"
    second = choose(exported, host=host(NO_TENSORRT))
    assert (second.variant, second.runtime) == ("cuda-fp16", "cuda")
    assert "libnvinfer.so.10" in second.reason
    third = choose(exported, host=host(NO_GPU, has_gpu=False))
    assert (third.variant, third.runtime) == ("cpu-fp32", "openvino")
    assert "cuda-fp16: no driver" in third.reason


def test_a_gpu_that_cannot_be_used_is_an_error_and_not_the_cpu(artifact: Artifact) -> None:
    broken = host(NO_TENSORRT | {"cuda": "libcudart.so.13 cannot be loaded; pip install it"})
    with pytest.raises(
        RuntimeUnavailable,
        match=r"There is a GPU, and cuda-fp16 cannot be run: libcudart.*pass --variant cpu-fp32",
    ):
        choose(with_gpu_variants(artifact), host=broken)
    assert choose(with_gpu_variants(artifact), "cpu-fp32", host=broken).runtime == "openvino"
    assert choose(artifact, host=broken).variant == "cpu-fp32"


def test_a_gpu_whose_answers_are_wrong_is_an_error_and_not_the_cpu(artifact: Artifact) -> None:
    rejected = {("tensorrt-fp16", "tensorrt"): "wrong", ("cuda-fp16", "cuda"): "answers differ"}
    with pytest.raises(RuntimeUnavailable, match="cuda-fp16 cannot be run: answers differ"):
        candidates(with_gpu_variants(artifact), host=host(), rejected=rejected)


def test_on_a_gpu_there_is_no_second_engine_to_measure(artifact: Artifact) -> None:
    [choice] = candidates(with_gpu_variants(artifact), host=host())
    assert choice.runtime == "tensorrt"


def test_a_gpu_variant_that_failed_its_gate_is_passed_over(artifact: Artifact) -> None:
    assert choose(with_gpu_variants(artifact, "failed"), host=host()).variant == "cpu-fp32"


@pytest.mark.parametrize(
    ("variant", "runtime", "message"),
    [
        ("cuda-fp16", "auto", "cuda-fp16 cannot be run here: no driver"),
        ("cuda-fp16", "openvino", "cuda-fp16 runs by cuda, and openvino was asked for"),
        ("cpu-fp32", "cuda", "cpu-fp32 is for the CPU, and cuda was asked for"),
        ("auto", "cuda", "nothing that this host can run by cuda"),
        ("auto", "tensorrt", "tensorrt-fp16: no driver"),
    ],
)
def test_a_requested_variant_or_runtime_that_cannot_run_is_an_error(
    variant: str, runtime: str, message: str, artifact: Artifact
) -> None:
    with pytest.raises(RuntimeUnavailable, match=message):
        choose(with_gpu_variants(artifact), variant, runtime, host(NO_GPU, has_gpu=False))


# The grid


@pytest.mark.parametrize(
    ("tokens", "length"), [(1, 8), (9, 16), (64, 64), (65, 80), (129, 160), (257, 320), (500, 512)]
)
def test_on_a_gpu_lengths_are_multiples_of_eight(tokens: int, length: int) -> None:
    assert Shapes(512, grid=GPU).length(tokens) == length
    assert all(length % 8 == 0 for length in Shapes(512, grid=GPU).lengths)


@pytest.mark.parametrize(("items", "rows"), [(1, 1), (3, 4), (5, 8), (100, 128), (128, 128)])
def test_on_a_gpu_a_batch_takes_all_waiting_texts_and_is_padded_with_rows(
    items: int, rows: int
) -> None:
    shapes = Shapes(512, grid=GPU)
    assert shapes.batch_size(items) == items
    assert shapes.rows(items) == rows
    assert shapes.batch_size(1000) == 128
    assert Shapes(512, 40, GPU).batch_size(1000) == 32


def test_no_shape_beyond_the_token_budget_is_warmed_up() -> None:
    shapes = list(Shapes(512, grid=GPU).by_work())
    assert max(size * length for size, length in shapes) <= GPU.max_batch_tokens
    assert (1, 512) in shapes


def test_a_measured_grid_is_read_back_and_refused_on_another_gpu(tmp_path: Path) -> None:
    path = tmp_path / "h100.json"
    measured = Grid(
        (1, 4, 16), (), 64, 8192, padded_rows=True, warm_up_all=True, lengths=(16, 64, 256)
    )
    write_grid(path, H100.name, measured, [(1, 16, 0.4), (4, 16, 0.41)])
    assert read_grid(path, H100.name) == measured
    assert Shapes(128, grid=measured).lengths == (16, 64, 128)
    with pytest.raises(
        BadInput,
        match=(
            "was measured on NVIDIA H100 80GB HBM3, and this is NVIDIA L4; measure it here, or"
            " leave it out"
        ),
    ):
        read_grid(path, "NVIDIA L4")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "Invalid JSON"),
        ('{"device": "x"}', "batch_sizes: Field required"),
        (
            (
                '{"device": "x", "batch_sizes": [1], "lengths": [9], "max_batch_tokens": 1,'
                ' "measured": []}'
            ),
            "lengths are multiples of 8",
        ),
    ],
)
def test_a_file_that_is_no_grid_is_refused_with_its_field(
    text: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "grid.json"
    path.write_text(text)
    with pytest.raises(BadInput, match=message):
        read_grid(path, "x")
    with pytest.raises(BadInput, match="benchmarks gpu --calibrate"):
        read_grid(tmp_path / "none.json", "x")


def test_a_checkout_that_is_not_installed_knows_its_version(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    installed = importlib.metadata.version("drbert-serve")
    monkeypatch.setattr(importlib.metadata, "version", version)
    assert ServiceState({"bag": artifact}, Settings()).version == installed


def test_the_batcher_has_the_engines_limits_unless_settings_lower_them(
    artifact: Artifact,
) -> None:
    service = ServiceState({"bag": artifact}, Settings())
    service.lifecycle.load()
    assert (service.batcher.limits.size, service.batcher.limits.tokens) == (
        16,
        CPU.max_batch_tokens,
    )
    limited = ServiceState({"bag": artifact}, Settings(max_batch_size=4, max_batch_tokens=64))
    limited.lifecycle.load()
    assert (limited.batcher.limits.size, limited.batcher.limits.tokens) == (4, 64)
    assert service_info(limited)["batching"] == {
        "max_batch_size": 4,
        "max_batch_tokens": 64,
        "in_flight": 1,
    }


# The driver and NVML


class Driver:
    """CUDA's driver API with one device, as ctypes wraps it."""

    def __init__(self, status: int = 0) -> None:
        self.status = status

    def cuInit(self, flags: int) -> int:  # noqa: N802
        return self.status

    def cuDeviceGetCount(self, count: Any) -> int:  # noqa: N802
        count._obj.value = 1
        return 0

    def cuDeviceGet(self, device: Any, number: int) -> int:  # noqa: N802
        device._obj.value = number
        return 0

    def cuDeviceGetName(self, name: Any, size: int, device: Any) -> int:  # noqa: N802
        name.value = H100.name.encode()
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: Any) -> int:  # noqa: N802
        value._obj.value = {75: 9, 76: 0}[attribute]
        return 0

    def cuDeviceTotalMem_v2(self, memory: Any, device: Any) -> int:  # noqa: N802
        memory._obj.value = H100.memory_bytes
        return 0

    def cuDeviceGetUuid(self, uuid: Any, device: Any) -> int:  # noqa: N802
        ctypes.memmove(uuid, bytes(range(16)), 16)
        return 0


def test_gpus_are_read_from_the_driver() -> None:
    [gpu] = gpus._query(Driver())
    assert gpu == Gpu(
        H100.name, "9.0", H100.memory_bytes, "GPU-00010203-0405-0607-0809-0a0b0c0d0e0f"
    )
    assert gpus._query(Driver(status=100)) == ()
    assert gpus._query(None) == ()


def test_the_drivers_version_is_read_where_the_kernel_reports_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpus, "VERSION", tmp_path / "version")
    assert H100.to_dict()["driver"] is None
    (tmp_path / "version").write_text("580.82.07\n")
    assert H100.to_dict()["driver"] == "580.82.07"


class NotSupported(Exception):
    pass


def fake_nvml(**changes: Any) -> SimpleNamespace:
    def power(handle: object) -> int:
        raise NotSupported

    return SimpleNamespace(
        **(
            {
                "NVMLError": NotSupported,
                "NVML_CLOCK_SM": 1,
                "NVML_TEMPERATURE_GPU": 0,
                "nvmlDeviceGetHandleByUUID": lambda uuid: uuid,
                "nvmlDeviceGetMemoryInfo": lambda handle: SimpleNamespace(used=2**30),
                "nvmlDeviceGetUtilizationRates": lambda handle: SimpleNamespace(gpu=50),
                "nvmlDeviceGetClockInfo": lambda handle, clock: 1980,
                "nvmlDeviceGetPowerUsage": power,
                "nvmlDeviceGetCurrentClocksEventReasons": lambda handle: 0x1 | 0x4,
                "nvmlDeviceGetTemperature": lambda handle, sensor: 61,
            }
            | changes
        )
    )


def test_a_gpus_reading_leaves_out_values_that_it_does_not_report() -> None:
    [reading] = nvml.read(fake_nvml(), [H100])
    assert (
        reading.memory_used_bytes,
        reading.utilization_ratio,
        reading.sm_clock_hertz,
        reading.power_watts,
    ) == (2**30, 0.5, 1.98e9, None)
    assert reading.slowed_by == {"power"}
    metrics = Metrics(CollectorRegistry(), readings=lambda: [reading])
    text = generate_latest(metrics.registry).decode()
    assert 'drbert_gpu_memory_used_bytes{gpu="GPU-0011"} 1.073741824e+09' in text
    assert 'drbert_gpu_slowed{gpu="GPU-0011",reason="power"} 1.0' in text
    assert 'drbert_gpu_slowed{gpu="GPU-0011",reason="heat"} 0.0' in text
    assert "drbert_gpu_power_watts{" not in text


def test_a_gpu_that_nvml_does_not_know_has_no_reading() -> None:
    def unknown(uuid: str) -> str:
        raise NotSupported

    assert nvml.read(fake_nvml(nvmlDeviceGetHandleByUUID=unknown), [H100]) == []
