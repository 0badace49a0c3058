"""
ONNX Runtime on the CPU: the portable fallback, for fp32 graphs.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnxruntime as ort

from service.runtimes import Inputs, Logits, RuntimeUnavailable


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
        self._session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def start(self, inputs: Inputs) -> Callable[[], Logits]:
        logits: Logits = self._session.run(None, dict(inputs))[0]
        return lambda: logits
