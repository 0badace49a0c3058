"""
The compiled forms of one graph: how each is built, what it computes in, and how close it must come.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from service.artifact import Precision


@dataclass(frozen=True)
class Recipe:
    runtime: Literal["openvino", "onnxruntime"]
    precision: Precision
    files: tuple[str, ...]
    build: Callable[[Path], None]
    """Makes `files` in a folder that holds model.onnx."""
    tolerance: float
    """The largest difference of a probability that passes the gate."""


def _openvino_16_bit(folder: Path) -> None:
    import openvino as ov

    # read_model, not convert_model: the latter folds zeros and ones away, so the graph would depend on the weights.
    ov.save_model(ov.Core().read_model(folder / "model.onnx"), folder / "model-bf16.xml", compress_to_fp16=True)


RECIPES = {
    "cpu-fp32": Recipe("openvino", "f32", ("model.onnx",), lambda folder: None, tolerance=1e-4),
    "cpu-bf16": Recipe("openvino", "bf16", ("model-bf16.xml", "model-bf16.bin"), _openvino_16_bit, tolerance=2e-2),
}
