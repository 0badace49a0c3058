from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.training import Run, measure, prepare_run, table
from tests.training.factories import TEXT


@pytest.fixture
def runs(tmp_path: Path) -> list[Run]:
    return [
        prepare_run(name, TEXT, tmp_path) for name in ("tiny-none", "tiny-plain", "tiny-convbert")
    ]


def test_the_products_that_are_run_again_are_those_of_a_step(runs: list[Run]) -> None:
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        runs[0].multiply()
    config, rows, length = runs[0].config, 8, 32
    d, f, masked, words = 32, 64, 8 * 4, len(runs[0].corpus.vocabulary)
    attention = 2 * (2 * rows * length * length * d)  # scores and mixing
    forward = config.encoder.layers * (
        2 * rows * length * (4 * d * d + 2 * d * f) + attention
    ) + 2 * masked * (d * d + d * words)
    assert counter.get_total_flops() == pytest.approx(3 * forward, rel=0.02)


def test_every_config_has_a_row_with_its_ratio_to_the_first(runs: list[Run]) -> None:
    rows = measure(runs, 3)
    assert rows.shape == (3, 3, 3)
    assert (rows > 0).all()
    seconds = np.array([[[1.0, 0.01, 0.5], [1.5, 0.03, 0.6], [2.0, 0.02, 0.5]]] * 3)
    text = table(runs, seconds)
    assert "| tiny-plain | 1500 | 171 | 1.50 (1.50 to 1.50) | 0.40 (0.40 to 0.40) | 2.00% |" in text
