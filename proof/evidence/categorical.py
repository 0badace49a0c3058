"""
A column of text in which few words occur often, stored as codes.

Comparing and selecting cost what they cost with integers. Runs, levels, arms and instances are such
columns; as NumPy text they would take most of the judge's time and memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Mask = npt.NDArray[np.bool_]


class Categorical:
    """Behaves as a one-dimensional array of text, as far as rows of evidence need it."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, words: Sequence[str], codes: npt.NDArray[np.integer[Any]]) -> None:
        """`words` are all different; `codes` (n,) are indices into them."""
        self._words = tuple(words)
        self._codes = codes

    def __len__(self) -> int:
        return len(self._codes)

    def __getitem__(self, selection: Any) -> Any:
        """Return the word at an index, or the rows of a mask, a slice or indices."""
        codes = self._codes[selection]
        return (
            Categorical(self._words, codes) if isinstance(codes, np.ndarray) else self._words[codes]
        )

    def __eq__(self, other: object) -> Mask:  # type: ignore[override]
        """Return (n,): where a word, or the column of the same length, has the same word."""
        if isinstance(other, Categorical):
            codes = np.array([self._code(word) for word in other._words])
            return np.asarray(self._codes == codes[other._codes])
        return np.asarray(self._codes == self._code(other))

    def __ne__(self, other: object) -> Mask:  # type: ignore[override]
        return ~(self == other)

    def isin(self, words: Iterable[str]) -> Mask:
        """Return (n,): where the word is one of these."""
        return np.isin(self._codes, [self._code(word) for word in words])

    def codes_in(self, words: Sequence[str]) -> npt.NDArray[np.int64]:
        """Return (n,): the index of each word in `words`, or -1."""
        index = {word: i for i, word in enumerate(words)}
        codes = np.array([index.get(word, -1) for word in self._words], np.int64)
        return codes[self._codes] if len(codes) else np.zeros(0, np.int64)

    def unique(self) -> list[str]:
        """Return the words that occur, sorted."""
        return sorted(self._words[code] for code in np.flatnonzero(np.bincount(self._codes)))

    def _code(self, word: object) -> int:
        """Return a word's code; -1, which no row has, if it never occurs."""
        return self._words.index(word) if word in self._words else -1
