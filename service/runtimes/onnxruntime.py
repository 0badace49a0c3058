"""
ONNX Runtime on the CPU: the portable fallback, for fp32 graphs.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime as ort

from service.runtimes import Inputs, Logits, RuntimeUnavailable

# The thread that runs every session takes part in the work, and ONNX Runtime sets flush-to-zero only for the thread
# that makes a process's first session. So one thread makes and runs them all, and no other computes differently for it.
_thread = ThreadPoolExecutor(1, thread_name_prefix="onnxruntime")


class OnnxRuntime:
    name = "onnxruntime"
    device = "CPU"
    precision = "f32"
    in_flight = 1

    def __init__(self, model: Path, precision: str, threads: int) -> None:
        if precision != "f32" or model.suffix != ".onnx":
            raise RuntimeUnavailable(f"ONNX Runtime runs model.onnx in f32, not {model.name} in {precision}.")
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.add_session_config_entry("session.set_denormal_as_zero", "1")
        self._session = _thread.submit(
            ort.InferenceSession, model, options, providers=["CPUExecutionProvider"]
        ).result()
        self.flush_to_zero = _thread.submit(_flushes).result()

    def start(self, inputs: Inputs) -> Callable[[], Logits]:
        return _thread.submit(self._run, inputs).result

    def _run(self, inputs: Inputs) -> Logits:
        logits: Logits = self._session.run(None, dict(inputs))[0]
        return logits


def _flushes() -> bool:
    """Whether this thread takes subnormal numbers for zero, asked of the processor."""
    return bool(np.float32(1e-40) * np.float32(1) == 0)
