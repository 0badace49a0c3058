"""
Chooses the positions a model must predict and what it sees there instead (BERT, arXiv 1810.04805,
§3.1).

Every row gets exactly the same number of predicted positions, so they form a
rectangle and only they need to pass through the output layer.
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
class Fates:
    """What becomes of a selected token: hidden, replaced by a random word, or left as it is (the
    rest).
    """

    hidden: float
    random: float


FATES = {"mlm": Fates(hidden=0.8, random=0.1), "rtd": Fates(hidden=0.85, random=0.0)}
"""BERT's for masked language modelling; the released ELECTRA's for its generator."""


def loss_without_context(fates: Fates, seen: Counts, due: Counts) -> float:
    """The loss, in nats, of a model that knows how frequent words are and what stands at a
    position, and nothing of its neighbours.

    It answers by Bayes' rule: where [MASK] stands, with the words' frequencies; where a word
    stands, with the odds that it was left there. `seen` (V) counts the ordinary words that it
    learns from, `due` (V) those that it must predict.
    """
    kept, random = 1 - fates.hidden - fates.random, fates.random / len(seen)
    known, asked = (seen + 1) / (seen + 1).sum(), due / due.sum()
    hidden = -asked @ np.log(known)
    shown = kept * known + random  # how often each word is seen, for either reason
    left = -asked @ np.log((kept + random) * known / shown) if kept else 0.0
    drawn = 0.0
    if random:  # once in V times the word drawn is the word due
        drawn = (
            hidden - np.log(random) + np.mean(np.log(shown)) - np.log(1 + kept / random) / len(seen)
        )
    return float(fates.hidden * hidden + kept * left + fates.random * drawn)


@dataclass(frozen=True)
class Masked:
    inputs: Ids
    """(B, L) what the encoder reads."""
    positions: Ids
    """(B, K) the predicted positions, ascending."""
    targets: Ids
    """(B, K) the ids that stood there."""

    def part(self, rows: slice) -> Masked:
        return Masked(self.inputs[rows], self.positions[rows], self.targets[rows])


def mask_tokens(
    ids: Ids,
    rate: float,
    vocabulary: Vocabulary,
    rng: np.random.Generator,
    *,
    fates: Fates = FATES["mlm"],
    whole_words: bool = False,
) -> Masked:
    """Selects round(rate·(L-2)) tokens a row, none of them special, and decides each one's fate.

    BadInput if a row has fewer than that. Whole words are cut short only where no word of one token
    is left to fill the row's count.
    """
    rows, length = ids.shape
    count = max(1, round(rate * (length - 2)))
    special = np.isin(ids, (vocabulary.pad, vocabulary.cls, vocabulary.sep))
    if (~special).sum(axis=1).min() < count:
        raise BadInput(
            f"A sequence of {length} tokens has fewer than {count} that could be masked; the text"
            " is little but empty documents."
        )
    keys = (
        _keys_of_words(ids, special, count, vocabulary.continues, rng)
        if whole_words
        else rng.random(ids.shape)
    )
    keys = np.where(special, np.inf, keys)
    positions = np.sort(np.argpartition(keys, count - 1, axis=1)[:, :count], axis=1)  # (B, K)
    targets = np.take_along_axis(ids, positions, axis=1)  # (B, K)

    fate = rng.random((rows, count))
    words = rng.choice(vocabulary.ordinary, (rows, count))
    shown = np.where(
        fate < fates.hidden,
        vocabulary.mask,
        np.where(fate < fates.hidden + fates.random, words, targets),
    )
    inputs = ids.copy()
    np.put_along_axis(inputs, positions, shown, axis=1)
    return Masked(inputs, positions, targets)


def _keys_of_words(
    ids: Ids,
    special: npt.NDArray[np.bool_],
    count: int,
    continues: npt.NDArray[np.bool_],
    rng: np.random.Generator,
) -> npt.NDArray[np.float64]:
    """Keys (B, L) whose `count` smallest are whole words drawn at random: words in a random order
    while they fit, then single tokens.
    """
    begins = special | ~continues[ids]
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
    tier = np.where(
        first + size <= count, 0, np.where(size == 1, 1, 2)
    )  # fits · fills up · may be cut
    keys = np.empty(ids.shape)
    np.put_along_axis(keys, order, tier + np.take_along_axis(drawn, order, axis=1), axis=1)
    return keys
