"""
Several texts in one row, so that next to nothing of what is computed is padding.

A row that holds several texts is to the engine what one long text is; each token attends to its own text's only and
has the position that it has there (Krell et al., "Efficient Sequence Packing without Cross-contamination",
arXiv 2107.02027). Where they place texts to fill rows best, this places them in the order in which they came, first fit.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

ROW = 128
"""Tokens of a row where texts fill several. A longer one costs more in attention than it saves."""
ONE_ROW = 192
"""What is less than that makes one row: an engine runs two half filled ones no faster."""
MAX_ROWS = 4
BEGINS = 0.75
"""Share of a longer row that a text has to fill to begin one; shorter ones fill what is left, for attention over a long row is dear."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the texts of a batch are."""

    length: int
    """Tokens of every row, padding counted."""
    rows: tuple[tuple[int, ...], ...]
    """Each row's texts, by their places in the batch."""


@dataclass(frozen=True)
class Packing:
    """How texts of a model share rows, whose lengths are among `lengths`: ascending, ROW and ONE_ROW among them."""

    lengths: tuple[int, ...]

    def choose(self, waiting: Sequence[int], most: int, max_tokens: int) -> list[int]:
        """Places of those that make the next batch, of texts of so many tokens that wait, oldest first; the oldest is among them.

        At most `most` of them, in rows of `max_tokens` together, padding counted, unless the oldest alone has more.
        `lay_out` of them in the order returned needs as many rows as were counted on.
        """
        oldest, shortest = waiting[0], min(waiting)
        length = self._row_for(oldest)
        fitting = [place for place, tokens in enumerate(waiting) if tokens <= length]
        max_rows = max(1, min(MAX_ROWS, max_tokens // length, sum(waiting[place] for place in fitting) // length))
        if max_rows == 1 and length == ROW:
            length = max(oldest, self._at_most(min(ONE_ROW, max_tokens)))
        least = 0
        if length > ROW and max_rows > 1:
            least = math.ceil(BEGINS * length)
            # In order of arrival still, but those first that may begin a row.
            fitting.sort(key=lambda place: place > 0 and waiting[place] < least)
        rows, room, chosen = [[0]], [length - oldest], 1
        for place in fitting[1:]:
            if chosen == most or (len(rows) == max_rows and max(room) < shortest):
                break
            tokens = waiting[place]
            for row, left in enumerate(room):
                if tokens <= left:
                    rows[row].append(place)
                    room[row] -= tokens
                    chosen += 1
                    break
            else:
                if len(rows) < max_rows and tokens >= least:
                    rows.append([place])
                    room.append(length - tokens)
                    chosen += 1
        return [place for row in rows for place in row]

    def lay_out(self, texts: Sequence[int]) -> Layout:
        """Rows for texts of so many tokens, in their order."""
        longest, together = max(texts), sum(texts)
        if longest <= ROW and together <= ONE_ROW:
            return Layout(self._at_least(together), (tuple(range(len(texts))),))
        length = self._row_for(longest)
        rows: list[list[int]] = []
        room = 0
        for place, tokens in enumerate(texts):
            if tokens > room:
                rows.append([])
                room = length
            rows[-1].append(place)
            room -= tokens
        return Layout(length, tuple(map(tuple, rows)))

    def _row_for(self, tokens: int) -> int:
        return ROW if tokens <= ROW else self._at_least(tokens)

    def _at_least(self, tokens: int) -> int:
        return self.lengths[bisect_left(self.lengths, tokens)]

    def _at_most(self, tokens: int) -> int:
        place = bisect_right(self.lengths, tokens)
        return self.lengths[place - 1] if place else 0
