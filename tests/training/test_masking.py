"""Exactly the configured share of tokens is masked, by the configured split."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from command import BadInput
from tests.training.factories import vocabulary
from training.masking import MASKING_SPLITS, MaskingSplit, loss_without_context, mask_tokens

WORDS = vocabulary()
PIECES = vocabulary(continued=400)


def sequences(rows: int, length: int = 128) -> npt.NDArray[np.int64]:
    ids = np.random.default_rng(0).integers(5, 1000, (rows, length))
    ids[:, 0], ids[:, -1] = WORDS.cls, WORDS.sep
    ids[:, 60] = WORDS.sep
    return ids


@pytest.mark.parametrize("whole_words", [False, True])
def test_every_row_gets_the_exact_number_of_masks_and_never_a_special_token(
    whole_words: bool,
) -> None:
    ids = sequences(64)
    masked = mask_tokens(ids, 0.15, PIECES, np.random.default_rng(1), whole_words=whole_words)
    assert masked.positions.shape == (64, 19)
    assert all(len(set(row)) == 19 for row in masked.positions.tolist())
    assert (np.diff(masked.positions, axis=1) > 0).all()
    assert not np.isin(masked.targets, (WORDS.cls, WORDS.sep)).any()
    assert (np.take_along_axis(ids, masked.positions, 1) == masked.targets).all()


def test_nothing_but_the_chosen_positions_changes() -> None:
    ids = sequences(8)
    masked = mask_tokens(ids, 0.15, WORDS, np.random.default_rng(1))
    untouched = np.ones_like(ids, bool)
    np.put_along_axis(untouched, masked.positions, False, 1)
    assert (masked.inputs[untouched] == ids[untouched]).all()


def test_eight_in_ten_become_mask_one_a_random_word_and_one_stays() -> None:
    masked = mask_tokens(sequences(2000), 0.15, WORDS, np.random.default_rng(1))
    inputs = np.take_along_axis(masked.inputs, masked.positions, 1)
    assert (inputs == WORDS.mask).mean() == pytest.approx(0.8, abs=0.01)
    assert (inputs == masked.targets).mean() == pytest.approx(0.1, abs=0.01)
    assert np.isin(inputs, (WORDS.mask, *WORDS.ordinary)).all()


def test_electras_generator_sees_no_random_word() -> None:
    masked = mask_tokens(
        sequences(2000), 0.15, WORDS, np.random.default_rng(1), split=MASKING_SPLITS["rtd"]
    )
    inputs = np.take_along_axis(masked.inputs, masked.positions, 1)
    assert (inputs == WORDS.mask).mean() == pytest.approx(0.85, abs=0.01)
    assert ((inputs == WORDS.mask) | (inputs == masked.targets)).all()


def test_whole_words_are_masked_whole() -> None:
    ids = sequences(500)
    masked = mask_tokens(ids, 0.15, PIECES, np.random.default_rng(1), whole_words=True)
    chosen = np.zeros_like(ids, bool)
    np.put_along_axis(chosen, masked.positions, True, 1)
    begins = ~PIECES.is_continuation[ids] | np.isin(ids, (PIECES.cls, PIECES.sep))
    cut = (
        (chosen[:, 1:] != chosen[:, :-1])
        & ~begins[:, 1:]
        & ~np.isin(ids[:, :-1], (PIECES.cls, PIECES.sep))
    )
    assert not cut.any()


def test_a_word_is_cut_only_where_nothing_shorter_is_left() -> None:
    ids = np.full((4, 12), 999)  # one word of ten pieces
    ids[:, 0], ids[:, 1], ids[:, 2], ids[:, -1] = PIECES.cls, 5, 6, PIECES.sep
    masked = mask_tokens(ids, 0.3, PIECES, np.random.default_rng(1), whole_words=True)
    # The word of one token is taken whichever is drawn first; only the rest is cut out of the long
    # one.
    assert masked.positions.shape == (4, 3)
    assert ((masked.targets == 5).sum(axis=1) == 1).all()


def test_long_words_are_masked_about_as_often_as_short_ones() -> None:
    row = [
        WORDS.cls,
        *[word for i in range(25) for word in (5 + i, 100 + i, 999)],
        WORDS.sep,
    ]  # a word of one token, a word of two
    chosen = mask_tokens(
        np.tile(np.array([row]), (4000, 1)), 0.2, PIECES, np.random.default_rng(1), whole_words=True
    ).positions
    shares = (
        np.bincount(chosen.ravel(), minlength=len(row))[1:-1].reshape(25, 3).mean(axis=0) / 4000
    )
    assert shares[1] == shares[2]
    assert shares == pytest.approx(np.full(3, 0.2), abs=0.02)


def test_the_same_seed_masks_the_same() -> None:
    first, second = (
        mask_tokens(sequences(4), 0.15, WORDS, np.random.default_rng([3, 7])) for _ in range(2)
    )
    assert (first.inputs == second.inputs).all()


def test_a_row_with_too_little_to_mask_is_an_error() -> None:
    with pytest.raises(BadInput, match="fewer than 1"):
        mask_tokens(np.full((1, 10), WORDS.sep), 0.15, WORDS, np.random.default_rng(0))


@pytest.mark.parametrize(
    "split",
    [*MASKING_SPLITS.values(), MaskingSplit(masked=1.0, random=0.0)],
    ids=["mlm", "rtd", "all masked"],
)
def test_the_loss_without_context_is_that_of_bayes_rule(split: MaskingSplit) -> None:
    counts, size = np.array([50, 30, 15, 5]), 4
    p = (counts + 1) / (counts + 1).sum()
    joint = (split.unchanged * np.eye(size) + split.random / size) * p[:, None]  # (target, shown)
    joint = np.column_stack([joint, split.masked * p])  # and [MASK]
    answers = joint / np.maximum(joint.sum(axis=0), 1e-300)
    targets = np.array([40, 40, 15, 5])
    loss = -sum(
        targets[i] / targets.sum() * joint[i, j] / p[i] * np.log(answers[i, j])
        for i, j in zip(*joint.nonzero(), strict=True)
    )
    assert loss_without_context(split, counts, targets) == pytest.approx(loss)
