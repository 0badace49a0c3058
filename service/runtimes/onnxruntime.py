"""
ONNX Runtime: the portable fallback on the CPU, and the way to NVIDIA GPUs (cuda.py, tensorrt.py).

ONNX Runtime leaves out a provider that it cannot load, logs a line, and runs everything on the CPU.
So this module checks before a session is opened what is missing, and after it which provider is in
use.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import io
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from command import how_to_install
from service.batching.shapes import CPU, ONE_TEXT
from service.host import gpus
from service.runtimes import Inputs, Logits, RuntimeUnavailable

PROVIDERS = {"cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
# How to install the libraries that a provider is linked with.
_REMEDIES = {
    "cuda": f"{how_to_install('gpu')}, which brings CUDA 13 and cuDNN 9",
    "tensorrt": "pip install tensorrt-cu13==10.16.1.11 from NVIDIA's package index",
}

# The thread that runs a session on the CPU does a part of the computation, and ONNX Runtime sets
# flush-to-zero only in the thread that opens a process's first session. So one thread opens the
# first session and runs all of them. Other threads keep their own floating-point mode.
_thread = ThreadPoolExecutor(1, thread_name_prefix="onnxruntime")
_opening = threading.Lock()
_is_first = True


class OnnxRuntime:
    """A model's session on the CPU, in f32, f16 or i8; in i8 it computes text by text."""

    name = "onnxruntime"
    device = "CPU"
    graph_digest: str | None = None
    in_flight = 1

    def __init__(self, model: Path, precision: str, threads: int) -> None:
        if precision not in ("f32", "f16", "i8") or model.suffix != ".onnx":
            raise RuntimeUnavailable(
                f"ONNX Runtime runs .onnx files in f32 or i8, not {model.name} in {precision}."
            )
        self.precision = precision
        # It computes in f32 what an int8 graph does not quantize.
        self.computes_in = "f32" if precision == "i8" else precision
        self.grid = ONE_TEXT if precision == "i8" else CPU
        options = session_options(threads)
        options.add_session_config_entry("session.set_denormal_as_zero", "1")
        # Idle threads would take the processor from the event loop, and from another engine.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = _open(model, options)
        self._types = input_types(self._session)
        self.flush_to_zero = _thread.submit(_flushes).result()

    def start(self, inputs: Inputs) -> Callable[[], Logits]:
        """Start a batch in the sessions' thread and return a function that waits for its logits."""
        return _thread.submit(self._run, inputs).result

    def _run(self, inputs: Inputs) -> Logits:
        arrays = {
            name: inputs[name].astype(dtype, copy=False) for name, dtype in self._types.items()
        }
        if self.precision != "i8":
            logits: Logits = self._session.run(None, arrays)[0]
            return logits
        # The activations of a run are quantised with one scale. So each text is run alone, without
        # its padding: in a batch its answer would depend on the others.
        rows, length = inputs["input_ids"].shape
        mask = inputs.get("attention_mask")
        lengths = [length] * rows if mask is None else mask.sum(axis=1)
        answers = [
            self._session.run(
                None, {name: array[row : row + 1, :length] for name, array in arrays.items()}
            )[0]
            for row, length in enumerate(lengths)
        ]
        if answers[0].ndim == 2:
            return np.concatenate(answers)
        # (1, L, labels) each: of labels for tokens, those of the padding are not read.
        padded = np.zeros((rows, length, answers[0].shape[2]), np.float32)
        for row, answer in enumerate(answers):
            padded[row, : answer.shape[1]] = answer[0]
        return padded


def _open(model: Path, options: Any) -> Any:
    """Open a session on the CPU.

    The first one is opened by the thread that runs sessions. Later ones are opened by the caller:
    to optimise a large graph takes seconds, in which that thread answers requests.
    """
    global _is_first
    providers: list[tuple[str, Mapping[str, str]]] = [("CPUExecutionProvider", {})]
    with _opening:
        if _is_first:
            session = _thread.submit(open_session, model, options, providers).result()
            _is_first = False
            return session
    return open_session(model, options, providers)


def missing_requirement(runtime: str) -> str | None:
    """Return what this host lacks to run models by "cuda" or "tensorrt", with the remedy.

    None means that nothing is known to be missing.
    """
    if not gpus.visible():
        return f"{gpus.unavailable_reason()}; choose a variant for the CPU"
    if importlib.util.find_spec("onnxruntime") is None:
        return f"onnxruntime-gpu is not installed; {_REMEDIES['cuda']}"
    import onnxruntime as ort

    if PROVIDERS[runtime] not in ort.get_available_providers():
        return (
            "the onnxruntime that is installed is the one for CPUs; pip uninstall onnxruntime,"
            f" then {_REMEDIES['cuda']}"
        )
    missing = _missing_library("cuda")
    if missing is None and runtime == "tensorrt":
        missing = _missing_library("tensorrt")
    return missing


@functools.cache
def _missing_library(runtime: str) -> str | None:
    """Return the library that a provider needs and the loader does not find, with the remedy."""
    import onnxruntime as ort

    # Libraries come from NVIDIA's packages where these are installed. After an import of torch,
    # torch's own are loaded already. preload_dlls prints what it does not find; the error below
    # names it with the remedy.
    with contextlib.redirect_stdout(io.StringIO()):
        ort.preload_dlls()
        # It searches only its own site-packages. With several on the path, the packages may be in
        # another one.
        for folder in _nvidia_folders():
            ort.preload_dlls(directory=str(folder))
    capi = Path(ort.__file__).parent / "capi"
    try:
        if runtime == "tensorrt":
            for library in _tensorrt_libraries():
                ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        # Without cuDNN the provider silently uses slower kernels.
        ctypes.CDLL("libcudnn.so.9")
        ctypes.CDLL(str(capi / "libonnxruntime_providers_shared.so"), mode=ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(capi / f"libonnxruntime_providers_{runtime}.so"))
    except OSError as error:
        return f"{str(error).split(': cannot open')[0]} cannot be loaded; {_REMEDIES[runtime]}"
    return None


def _nvidia_folders() -> list[Path]:
    """Return the library folders of NVIDIA's packages; cuDNN's come last, as it needs CUDA's."""
    folders = [
        folder for place in _package_folders("nvidia") for folder in Path(place).glob("*/lib")
    ]
    return sorted(folders, key=lambda folder: ("cudnn" in str(folder), str(folder)))


def _tensorrt_libraries() -> list[Path]:
    """Return the libraries of tensorrt-cu13, which nothing else puts on the loader's path."""
    libraries = []
    for name in ("libnvinfer.so.10", "libnvinfer_plugin.so.10", "libnvonnxparser.so.10"):
        paths = [Path(place) / name for place in _package_folders("tensorrt_libs")]
        libraries += [path for path in paths if path.is_file()]
    return libraries


def _package_folders(package: str) -> list[str]:
    """Return the folders of a package; none if it is not installed."""
    spec = importlib.util.find_spec(package)
    return [] if spec is None else list(spec.submodule_search_locations or ())


def session_options(threads: int) -> Any:
    """Return the options of a session that computes in so many threads and logs errors only."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return options


def open_session(model: Path, options: Any, providers: list[tuple[str, Mapping[str, str]]]) -> Any:
    """Return a session that uses the first of the providers.

    Raises RuntimeUnavailable if it uses another one, or if the model cannot be loaded.
    """
    import onnxruntime as ort

    requested = providers[0][0]
    try:
        session = ort.InferenceSession(model, options, providers=providers)
    # ONNX Runtime raises a class of its own for each of its codes, and others for wrong options.
    except Exception as error:
        raise RuntimeUnavailable(
            f"ONNX Runtime cannot run {model.name} with {requested}:"
            f" {str(error).strip().splitlines()[0]}"
        ) from None
    in_use = session.get_providers()[0]
    if in_use != requested:
        raise RuntimeUnavailable(
            f"ONNX Runtime was asked for {requested} and uses {in_use}; its own lines above have"
            " the reason. Fix it, or choose another --variant."
        )
    # Otherwise ONNX Runtime silently replaces a provider that fails while it runs.
    session.disable_fallback()
    return session


def input_types(session: Any) -> dict[str, Any]:
    """Return the element type of each input by name."""
    known = {"tensor(int64)": np.int64, "tensor(int32)": np.int32}
    return {value.name: known[value.type] for value in session.get_inputs()}


def _flushes() -> bool:
    """Return whether the processor takes subnormal numbers for zero in this thread."""
    return bool(np.float32(1e-40) * np.float32(1) == 0)
