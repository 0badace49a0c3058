"""Subnormal weights are counted by their bits, in every form of a model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto

from graphs.subnormals import count_subnormal_weights, count_subnormals
from tests.graphs.test_canonical import small_bert


@pytest.mark.parametrize(
    ("dtype", "tiny", "normal"), [(np.float32, 1e-39, 1e-37), (np.float64, 1e-309, 1e-307)]
)
def test_only_numbers_between_zero_and_the_smallest_normal_one_count(
    dtype: type, tiny: float, normal: float
) -> None:
    values: np.ndarray = np.array(
        [[0.0, -0.0, tiny], [-tiny, normal, -normal], [1.0, np.inf, np.nan]], dtype
    )
    assert count_subnormals(values) == 2
    assert count_subnormals(values.T) == 2
    assert count_subnormals(values[:1]) == 1
    assert count_subnormals(values.astype(dtype)[:, 0]) == 1


def with_values(*values: float) -> Callable[[tuple[int, ...]], np.ndarray]:
    """Return a `fill` of ones for `small_bert`; the embedding table begins with `values`."""

    def fill(shape: tuple[int, ...]) -> np.ndarray:
        weights = np.ones(shape)
        if shape == (10, 4):
            weights.flat[: len(values)] = values
        return weights

    return fill


def saved(model: ModelProto, path: Path) -> Path:
    """Write a model and return its path."""
    onnx.save(model, path)
    return path


def test_weights_are_counted_once_each_in_an_onnx_file(tmp_path: Path) -> None:
    assert count_subnormal_weights(saved(small_bert(), tmp_path / "a.onnx")) == 0
    model = small_bert(with_values(1e-39, -1e-40, 0.0, 1e-37))
    assert count_subnormal_weights(saved(model, tmp_path / "b.onnx")) == 2


def test_in_an_openvino_ir_a_16_bit_weight_counts_by_its_widened_value(
    tmp_path: Path,
) -> None:
    import openvino as ov

    model = ov.Core().read_model(saved(small_bert(with_values(1e-39, 1e-6)), tmp_path / "a.onnx"))
    ov.save_model(model, tmp_path / "wide.xml", compress_to_fp16=False)
    ov.save_model(model, tmp_path / "half.xml", compress_to_fp16=True)
    assert count_subnormal_weights(tmp_path / "wide.xml") == 1
    # 1e-39 became zero; 1e-6 is subnormal in 16 bits and normal once it is widened.
    assert count_subnormal_weights(tmp_path / "half.xml") == 0
