"""
Chooses the positions that a model must predict, and what it reads there instead.

The method is BERT's (arXiv 1810.04805, §3.1). Every row gets exactly the same number of predicted
positions, so they form a rectangle, and only they need to pass through the output layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from command import BadInput
from training.vocabulary import Vocabulary

Ids = npt.NDArray[np.int64]
Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class MaskingSplit:
    """What replaces a selected token: [MASK], a random word, or nothing."""

    masked: float
    """The share of selected tokens that [MASK] replaces."""
    random: float
    """The share of selected tokens that a random word replaces."""

    @property
    def unchanged(self) -> float:
        """The share of selected tokens that stay as they are."""
        return 1 - self.masked - self.random


MASKING_SPLITS = {
    "mlm": MaskingSplit(masked=0.8, random=0.1),
    "rtd": MaskingSplit(masked=0.85, random=0.0),
}
"""By objective: BERT's for masked language modelling, the released ELECTRA's for its generator."""


def loss_without_context(split: MaskingSplit, training: Counts, targets: Counts) -> float:
    """Return the loss, in nats, of a model that uses no context.

    It knows how frequent words are and what stands at the predicted position, and answers by
    Bayes' rule: at [MASK] with the words' frequencies, at a word with the odds that it was left
    unchanged. `training` (V) counts the ordinary words that it learns from, `targets` (V) those
    that it must predict.
    """
    unchanged, random = split.unchanged, split.random / len(training)
    frequency = (training + 1) / (training + 1).sum()
    target_share = targets / targets.sum()
    loss_at_mask = -target_share @ np.log(frequency)
    shown = unchanged * frequency + random  # how often each word is shown, for either reason
    loss_at_unchanged = 0.0
    if unchanged:
        loss_at_unchanged = -target_share @ np.log((unchanged + random) * frequency / shown)
    loss_at_random = 0.0
    if random:  # once in V times the random word is the target itself
        loss_at_random = (
            loss_at_mask
            - np.log(random)
            + np.mean(np.log(shown))
            - np.log(1 + unchanged / random) / len(training)
        )
    return float(
        split.masked * loss_at_mask + unchanged * loss_at_unchanged + split.random * loss_at_random
    )


@dataclass(frozen=True)
class MaskedBatch:
    """A batch as the model reads it, and what it must predict."""

    inputs: Ids
    """The ids that the encoder reads, (B, L)."""
    positions: Ids
    """The predicted positions of each row, (B, K), ascending."""
    targets: Ids
    """The original ids at the predicted positions, (B, K)."""

    def part(self, rows: slice) -> MaskedBatch:
        """Return some rows of the batch."""
        return MaskedBatch(self.inputs[rows], self.positions[rows], self.targets[rows])


def mask_tokens(
    ids: Ids,
    rate: float,
    vocabulary: Vocabulary,
    rng: np.random.Generator,
    *,
    split: MaskingSplit = MASKING_SPLITS["mlm"],
    whole_words: bool = False,
) -> MaskedBatch:
    """Select round(rate·(L-2)) tokens a row, none of them special, and replace them by `split`.

    Whole words are cut only where no single-token word is left to fill the row's count. Raises
    BadInput if a row has too few ordinary tokens.
    """
    rows, length = ids.shape
    count = max(1, round(rate * (length - 2)))
    special = np.isin(ids, (vocabulary.pad, vocabulary.cls, vocabulary.sep))
    if (~special).sum(axis=1).min() < count:
        raise BadInput(
            f"A sequence of {length} tokens has fewer than {count} that can be masked; the text is"
            " mostly empty documents."
        )
    if whole_words:
        keys = _whole_word_keys(ids, special, count, vocabulary.is_continuation, rng)
    else:
        keys = rng.random(ids.shape)
    keys = np.where(special, np.inf, keys)
    positions = np.sort(np.argpartition(keys, count - 1, axis=1)[:, :count], axis=1)  # (B, K)
    targets = np.take_along_axis(ids, positions, axis=1)  # (B, K)

    draws = rng.random((rows, count))
    random_words = rng.choice(vocabulary.ordinary, (rows, count))
    unmasked = np.where(draws < split.masked + split.random, random_words, targets)
    shown = np.where(draws < split.masked, vocabulary.mask, unmasked)
    inputs = ids.copy()
    np.put_along_axis(inputs, positions, shown, axis=1)
    return MaskedBatch(inputs, positions, targets)


def _whole_word_keys(
    ids: Ids,
    special: npt.NDArray[np.bool_],
    count: int,
    is_continuation: npt.NDArray[np.bool_],
    rng: np.random.Generator,
) -> npt.NDArray[np.float64]:
    """Return keys (B, L) whose `count` smallest are whole words drawn at random.

    Words come in a random order while they fit, then single tokens.
    """
    begins = special | ~is_continuation[ids]
    begins[:, 1:] |= special[:, :-1]
    word = np.cumsum(begins, axis=1) - 1  # (B, L), the word's number in its row
    drawn = np.take_along_axis(rng.random(ids.shape), word, axis=1)
    drawn = np.where(special, np.inf, drawn)
    order = np.argsort(drawn, axis=1, kind="stable")  # word by word, the first drawn first
    ranked = np.take_along_axis(word, order, axis=1)
    # A word fits if its last token is still among the first `count` in that order.
    sizes = np.stack([np.bincount(row, minlength=ids.shape[1]) for row in word])  # (B, L)
    starts = np.ones_like(ranked, bool)
    starts[:, 1:] = ranked[:, 1:] != ranked[:, :-1]
    first = np.maximum.accumulate(np.where(starts, np.arange(ids.shape[1]), 0), axis=1)
    size = np.take_along_axis(sizes, ranked, axis=1)
    # Tier 0 fits, tier 1 is a single token that fills up, tier 2 may be cut.
    tier = np.where(first + size <= count, 0, np.where(size == 1, 1, 2))
    keys = np.empty(ids.shape)
    np.put_along_axis(keys, order, tier + np.take_along_axis(drawn, order, axis=1), axis=1)
    return keys
