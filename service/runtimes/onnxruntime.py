"""
ONNX Runtime: on the CPU the portable fallback, and the way to NVIDIA's GPUs (see cuda.py and
tensorrt.py).

It takes what it can get: a provider that cannot be loaded is left out with a line in the log, and
everything runs on the CPU. So what is missing is asked for before, and what is in use is asked for
after.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import io
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from service.batching.shapes import CPU
from service.host import gpus
from service.runtimes import Inputs, Logits, RuntimeUnavailable

PROVIDERS = {"cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
# What provides the libraries that a provider is linked with.
_REMEDIES = {
    "cuda": "pip install 'drbert-serve[gpu]', which brings CUDA 13 and cuDNN 9",
    "tensorrt": "pip install tensorrt-cu13==10.16.1.11 from NVIDIA's package index",
}

# The thread that runs every session on the CPU takes part in the work, and ONNX Runtime sets
# flush-to-zero only for the thread that makes a process's first session. So one thread makes and
# runs them all, and no other computes differently for it.
_thread = ThreadPoolExecutor(1, thread_name_prefix="onnxruntime")


class OnnxRuntime:
    name = "onnxruntime"
    device = "CPU"
    in_flight = 1
    grid = CPU

    def __init__(self, model: Path, precision: str, threads: int) -> None:
        if precision not in ("f32", "f16") or model.suffix != ".onnx":
            raise RuntimeUnavailable(
                f"ONNX Runtime runs .onnx files in f32, not {model.name} in {precision}."
            )
        self.precision = self.computes_in = precision
        options = session_options(threads)
        options.add_session_config_entry("session.set_denormal_as_zero", "1")
        self._session = _thread.submit(
            open_session, model, options, [("CPUExecutionProvider", {})]
        ).result()
        self._types = input_types(self._session)
        self.flush_to_zero = _thread.submit(_flushes).result()

    def start(self, inputs: Inputs) -> Callable[[], Logits]:
        return _thread.submit(self._run, inputs).result

    def _run(self, inputs: Inputs) -> Logits:
        logits: Logits = self._session.run(
            None,
            {name: inputs[name].astype(dtype, copy=False) for name, dtype in self._types.items()},
        )[0]
        return logits


def lacks(runtime: str) -> str | None:
    """What this host lacks to run models by "cuda" or "tensorrt", with the remedy; None if nothing
    is known to be missing.
    """
    if not gpus.visible():
        return f"{gpus.why_none()}; choose a variant for the CPU"
    if importlib.util.find_spec("onnxruntime") is None:
        return f"onnxruntime-gpu is not installed; {_REMEDIES['cuda']}"
    import onnxruntime as ort

    if PROVIDERS[runtime] not in ort.get_available_providers():
        return (
            "the onnxruntime that is installed is the one for CPUs; pip uninstall onnxruntime,"
            f" then {_REMEDIES['cuda']}"
        )
    missing = _missing_library("cuda") or (
        _missing_library(runtime) if runtime == "tensorrt" else None
    )
    return missing


@functools.cache
def _missing_library(runtime: str) -> str | None:
    """The library that ONNX Runtime's provider does not find, as the loader tells it."""
    import onnxruntime as ort

    # From the packages of NVIDIA where they are installed; where torch was imported before, its own
    # are there already.
    with contextlib.redirect_stdout(
        io.StringIO()
    ):  # it prints what it does not find, which is told better below
        ort.preload_dlls()
        # It looks beside itself alone; with several folders on the path, they may lie elsewhere.
        for folder in _nvidia_folders():
            ort.preload_dlls(directory=str(folder))
    capi = Path(ort.__file__).parent / "capi"
    try:
        if runtime == "tensorrt":
            for library in _tensorrt_libraries():
                ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        # The provider does without cuDNN, by slower kernels and without a word.
        ctypes.CDLL("libcudnn.so.9")
        ctypes.CDLL(str(capi / "libonnxruntime_providers_shared.so"), mode=ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(capi / f"libonnxruntime_providers_{runtime}.so"))
    except OSError as error:
        return f"{str(error).split(': cannot open')[0]} cannot be loaded; {_REMEDIES[runtime]}"
    return None


def _nvidia_folders() -> list[Path]:
    """Where NVIDIA's packages have their libraries, CUDA's before cuDNN's, which is linked with
    them.
    """
    found = importlib.util.find_spec("nvidia")
    folders = [
        folder
        for place in (found.submodule_search_locations or () if found else ())
        for folder in Path(place).glob("*/lib")
    ]
    return sorted(folders, key=lambda folder: ("cudnn" in str(folder), str(folder)))


def _tensorrt_libraries() -> list[Path]:
    """Those of the package tensorrt-cu13, which nothing else puts on the loader's path."""
    found = importlib.util.find_spec("tensorrt_libs")
    places = found.submodule_search_locations or () if found else ()
    return [
        library
        for name in ("libnvinfer.so.10", "libnvinfer_plugin.so.10", "libnvonnxparser.so.10")
        for place in places
        if (library := Path(place) / name).is_file()
    ]


def session_options(threads: int) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return options


def open_session(model: Path, options: Any, providers: list[tuple[str, Mapping[str, str]]]) -> Any:
    """A session whose first provider is in use; RuntimeUnavailable if it is not, or if the model
    cannot be loaded.
    """
    import onnxruntime as ort

    wanted = providers[0][0]
    try:
        session = ort.InferenceSession(model, options, providers=providers)
    # ONNX Runtime raises a class of its own for each of its codes, and others for wrong options.
    except Exception as error:
        raise RuntimeUnavailable(
            f"ONNX Runtime cannot run {model.name} with {wanted}:"
            f" {str(error).strip().splitlines()[0]}"
        ) from None
    in_use = session.get_providers()[0]
    if in_use != wanted:
        raise RuntimeUnavailable(
            f"ONNX Runtime was asked for {wanted} and took {in_use}; the reason is in its own lines"
            " above. Choose another --variant, or mend it."
        )
    # Providers that fail while they run are replaced by others otherwise, without a word.
    session.disable_fallback()
    return session


def input_types(session: Any) -> dict[str, Any]:
    """The element type of each input."""
    known = {"tensor(int64)": np.int64, "tensor(int32)": np.int32}
    return {value.name: known[value.type] for value in session.get_inputs()}


def _flushes() -> bool:
    """Whether this thread takes subnormal numbers for zero, asked of the processor."""
    return bool(np.float32(1e-40) * np.float32(1) == 0)
