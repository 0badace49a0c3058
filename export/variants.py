"""
The compiled forms of one graph: how each is built, what it computes in, and how close it must come.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from service.artifact import Precision
from service.runtimes import Inputs


@dataclass(frozen=True)
class Recipe:
    runtime: Literal["openvino", "onnxruntime"]
    precision: Precision
    files: tuple[str, ...]
    build: Callable[[Path, Sequence[Inputs]], None]
    """Makes `files` in a folder that holds model.onnx, from some inputs to calibrate with."""
    tolerance: float | None
    """The largest difference of a probability that passes the gate; None: the gate counts labels, over texts of its own."""

    @property
    def calibrated(self) -> bool:
        return self.precision == "i8"


def _as_it_is(folder: Path, inputs: Sequence[Inputs]) -> None:
    """model.onnx is the variant."""


def _openvino_16_bit(folder: Path, inputs: Sequence[Inputs]) -> None:
    import openvino as ov

    # read_model, not convert_model: the latter folds zeros and ones away, so the graph would depend on the weights.
    ov.save_model(ov.Core().read_model(folder / "model.onnx"), folder / "model-bf16.xml", compress_to_fp16=True)


def _openvino_8_bit(folder: Path, inputs: Sequence[Inputs]) -> None:
    """Post-training quantisation: 8-bit weights by channel, activations by tensor, outliers smoothed and biases corrected."""
    import openvino as ov

    logging.getLogger("nncf").setLevel(logging.ERROR)
    import nncf

    quantised = nncf.quantize(
        ov.Core().read_model(folder / "model.onnx"), nncf.Dataset([dict(one) for one in inputs]),
        model_type=nncf.ModelType.TRANSFORMER, subset_size=len(inputs),
    )
    ov.save_model(quantised, folder / "model-int8.xml", compress_to_fp16=True)


RECIPES = {
    "cpu-fp32": Recipe("openvino", "f32", ("model.onnx",), _as_it_is, tolerance=1e-4),
    "cpu-bf16": Recipe("openvino", "bf16", ("model-bf16.xml", "model-bf16.bin"), _openvino_16_bit, tolerance=2e-2),
    "cpu-int8": Recipe("openvino", "i8", ("model-int8.xml", "model-int8.bin"), _openvino_8_bit, tolerance=None),
}
UNASKED = ("cpu-fp32", "cpu-bf16")
"""What is built when no variants are named; with gate texts, all are."""
