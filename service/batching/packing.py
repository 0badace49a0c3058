"""
Several texts in one row, so that little of what is computed is padding.

A row that holds several texts is to the engine what one long text is; each token attends to its own
text's only and has the position that it has there (Krell et al., "Efficient Sequence Packing
without Cross-contamination", arXiv 2107.02027). Where they place texts to fill rows best, this
places them in the order in which they came, first fit; only where a row is long, those that may
begin one come before those that fill it.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

ROW = 128
"""Tokens of a row that texts share. A longer one costs more in attention, so it has to save
padding.
"""
LONGEST = 224
"""The longest row for texts of up to ROW tokens: of any length, two or more of them leave little of
one of these.
"""
MAX_ROWS = 4
MAX_TEXTS = 32
PADDING = 0.05
"""With no more than this share of padding a shorter row is taken, whatever a longer one would hold.
"""
A_BATCH = 40
"""What a batch costs beside its tokens, in tokens."""
BEGINS = 0.75
"""Share of a row that a text has to fill to begin one, where the oldest made it longer than ROW."""
SLOTS = (1, 8, 32)
"""For how many texts' first tokens an engine is asked: a number of its own for each batch would be
one more shape.
"""


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the texts of a batch are."""

    length: int
    """Tokens of every row, padding counted."""
    rows: tuple[tuple[int, ...], ...]
    """Each row's texts, by their places in the batch."""

    @property
    def tokens(self) -> int:
        """Of all rows, padding counted."""
        return self.length * len(self.rows)


@dataclass(frozen=True)
class Packing:
    """How texts of a model share rows, whose lengths are among `lengths`: ascending, ROW and
    LONGEST among them.

    A batch is at most `max_texts` texts, in rows of at most `max_tokens` tokens together, padding
    counted; only a text alone may have more.
    """

    lengths: tuple[int, ...]
    max_texts: int = MAX_TEXTS
    max_tokens: int = 4096

    def choose(self, waiting: Sequence[int], most_tokens: int | None = None) -> list[int]:
        """Places of those that make the next batch, of texts of so many tokens that wait, oldest
        first; the oldest is among them.

        `most_tokens` is for a smaller batch than `max_tokens` allows. `lay_out` of the texts in the
        order returned needs no more tokens than were counted on.
        """
        max_tokens = self.max_tokens if most_tokens is None else min(most_tokens, self.max_tokens)
        oldest, shortest = waiting[0], min(waiting)
        most = ROW if oldest <= ROW else self._at_least(oldest)
        fitting = [place for place, tokens in enumerate(waiting) if tokens <= most]
        together = sum(waiting[place] for place in fitting)
        best: list[int] = []
        best_worth = 0.0
        for length in self._row_lengths(oldest, together, max_tokens):
            max_rows = max(1, min(MAX_ROWS, max_tokens // length, together // length))
            begins = 0
            if oldest > ROW and max_rows > 1:
                begins = math.ceil(BEGINS * length)
                fitting.sort(key=lambda place: place > 0 and waiting[place] < begins)
            rows = self._fill(waiting, fitting, length, max_rows, begins, shortest)
            chosen = [place for row in rows for place in row]
            tokens = sum(waiting[place] for place in chosen)
            computed = self._at_least(tokens) if len(rows) == 1 else len(rows) * length
            if (worth := tokens / (A_BATCH + computed)) > best_worth:
                best, best_worth = chosen, worth
            if tokens >= (1 - PADDING) * length * len(rows):
                break
        return best

    def lay_out(self, texts: Sequence[int]) -> Layout:
        """Rows for texts of so many tokens, in their order; as many as it takes, whatever the
        limits are.
        """
        longest, together = max(texts), sum(texts)
        if longest > ROW:
            return _next_fit(texts, self._at_least(longest))
        if together <= LONGEST:
            return Layout(self._at_least(together), (tuple(range(len(texts))),))
        best: Layout | None = None
        for length in self._shared():
            layout = _next_fit(texts, length)
            if best is None or _demand(layout) < _demand(best):
                best = layout
            if len(layout.rows) <= MAX_ROWS and together >= (1 - PADDING) * layout.tokens:
                break
        assert best is not None
        return best

    def _row_lengths(self, oldest: int, together: int, max_tokens: int) -> Sequence[int]:
        """Of the rows that might hold the next batch, shortest first."""
        if oldest > ROW:
            return [self._at_least(oldest)]
        allowed = [length for length in self._shared() if length <= max_tokens]
        if not allowed:
            return [max(oldest, self._at_most(max_tokens))]
        # What fills no two rows is one, as long as need be.
        return allowed if together >= 2 * ROW else allowed[-1:]

    def _fill(
        self,
        waiting: Sequence[int],
        fitting: Sequence[int],
        length: int,
        max_rows: int,
        begins: int,
        shortest: int,
    ) -> list[list[int]]:
        """Each row's places, first fit in the order of `fitting`; only a text of `begins` tokens
        begins another row.
        """
        rows, room, chosen = [[0]], [length - waiting[0]], 1
        for place in fitting[1:]:
            if chosen == self.max_texts or (len(rows) == max_rows and max(room) < shortest):
                break
            tokens = waiting[place]
            for row, left in enumerate(room):
                if tokens <= left:
                    rows[row].append(place)
                    room[row] -= tokens
                    chosen += 1
                    break
            else:
                if len(rows) < max_rows and tokens >= begins:
                    rows.append([place])
                    room.append(length - tokens)
                    chosen += 1
        return rows

    def _shared(self) -> Iterator[int]:
        return (length for length in self.lengths if ROW <= length <= LONGEST)

    def _at_least(self, tokens: int) -> int:
        return self.lengths[bisect_left(self.lengths, tokens)]

    def _at_most(self, tokens: int) -> int:
        place = bisect_right(self.lengths, tokens)
        return self.lengths[place - 1] if place else 0


def slots(texts: int) -> int:
    """For how many first tokens the engine is asked where a batch has so many texts; what is beyond
    the texts' own is not read.
    """
    place = bisect_left(SLOTS, texts)
    return SLOTS[place] if place < len(SLOTS) else texts


def _next_fit(texts: Sequence[int], length: int) -> Layout:
    """Rows of that length, each filled before the next is begun."""
    rows: list[list[int]] = []
    room = 0
    for place, tokens in enumerate(texts):
        if tokens > room:
            rows.append([])
            room = length
        rows[-1].append(place)
        room -= tokens
    return Layout(length, tuple(map(tuple, rows)))


def _demand(layout: Layout) -> tuple[bool, int]:
    """Few rows before many, and then little of them."""
    return len(layout.rows) > MAX_ROWS, layout.tokens
