from __future__ import annotations

import numpy as np
import pytest

from training.corpus import CLS, MASK, SEP
from training.masking import mask_tokens


def sequences(rows: int, length: int = 128) -> np.ndarray:
    ids = np.random.default_rng(0).integers(5, 1000, (rows, length))
    ids[:, 0], ids[:, -1] = CLS, SEP
    ids[:, 60] = SEP
    return ids


def test_every_row_gets_exactly_its_share_of_masks_and_never_a_special_token() -> None:
    ids = sequences(64)
    masked = mask_tokens(ids, 0.15, 1000, np.random.default_rng(1))
    assert masked.positions.shape == (64, 19)
    assert all(len(set(row)) == 19 for row in masked.positions.tolist())
    assert not np.isin(masked.targets, (CLS, SEP)).any()
    assert (np.take_along_axis(ids, masked.positions, 1) == masked.targets).all()


def test_nothing_but_the_chosen_positions_changes() -> None:
    ids = sequences(8)
    masked = mask_tokens(ids, 0.15, 1000, np.random.default_rng(1))
    untouched = np.ones_like(ids, bool)
    np.put_along_axis(untouched, masked.positions, False, 1)
    assert (masked.inputs[untouched] == ids[untouched]).all()


def test_eight_in_ten_become_mask_one_a_random_word_and_one_stays() -> None:
    ids = sequences(2000)
    masked = mask_tokens(ids, 0.15, 1000, np.random.default_rng(1))
    shown = np.take_along_axis(masked.inputs, masked.positions, 1)
    assert (shown == MASK).mean() == pytest.approx(0.8, abs=0.01)
    assert (shown == masked.targets).mean() == pytest.approx(0.1, abs=0.01)


def test_the_same_seed_masks_the_same() -> None:
    first, second = (mask_tokens(sequences(4), 0.15, 1000, np.random.default_rng([3, 7])) for _ in range(2))
    assert (first.inputs == second.inputs).all()


def test_a_row_with_too_little_to_mask_is_an_error() -> None:
    ids = np.full((1, 10), SEP)
    with pytest.raises(ValueError, match="fewer than 1"):
        mask_tokens(ids, 0.15, 1000, np.random.default_rng(0))
