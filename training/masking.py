"""
Chooses the positions a model must predict and what it sees there instead (BERT, arXiv 1810.04805, §3.1).

Every row gets exactly the same number of predicted positions, so they form a
rectangle and only they need to pass through the output layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from training.corpus import CLS, MASK, PAD, SEP, SPECIAL_TOKENS


@dataclass(frozen=True)
class Masked:
    inputs: npt.NDArray[np.int64]
    """(B, L) what the encoder reads."""
    positions: npt.NDArray[np.int64]
    """(B, K) the predicted positions, ascending."""
    targets: npt.NDArray[np.int64]
    """(B, K) the ids that stood there."""


def mask_tokens(
    ids: npt.NDArray[np.int64], rate: float, vocabulary_size: int, rng: np.random.Generator
) -> Masked:
    """Selects round(rate·(L-2)) ordinary tokens a row: 80 % become [MASK], 10 % a random word, 10 % stay.

    Raises ValueError if a row has fewer ordinary tokens than that.
    """
    rows, length = ids.shape
    count = max(1, round(rate * (length - 2)))
    special = np.isin(ids, (PAD, CLS, SEP))
    if (~special).sum(axis=1).min() < count:
        raise ValueError(f"a row of {length} tokens has fewer than {count} that could be masked")
    keys = np.where(special, 2.0, rng.random(ids.shape))
    positions = np.sort(np.argpartition(keys, count - 1, axis=1)[:, :count], axis=1)     # (B, K)
    targets = np.take_along_axis(ids, positions, axis=1)                                  # (B, K)

    fate = rng.random((rows, count))
    words = rng.integers(len(SPECIAL_TOKENS), vocabulary_size, (rows, count))
    shown = np.where(fate < 0.8, MASK, np.where(fate < 0.9, words, targets))
    inputs = ids.copy()
    np.put_along_axis(inputs, positions, shown, axis=1)
    return Masked(inputs, positions, targets)
