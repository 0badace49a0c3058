"""
Sequence packing: several short texts in one row of a batch, so that little of it is padding.

To the engine, a row with several texts is one long text. A block-diagonal attention mask keeps the
texts independent, and each has its own positions (Krell et al., "Efficient Sequence Packing without
Cross-contamination", arXiv 2107.02027). They place texts so that rows are filled best. Here two
steps decide:

    choose   selects the texts of a batch, first fit in order of arrival. Only where a row is long,
             the texts that may open a row come before those that fill it.
    lay_out  places them, next fit in that order, in rows of the length that costs least. It never
             needs more tokens than `choose` counted.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

ROW_TOKENS = 128
"""Tokens of a packed row. A longer row costs more in attention, so it has to save padding."""
MAX_ROW_TOKENS = 224
"""Tokens of the longest packed row. Two or more texts of up to ROW_TOKENS leave little of it."""
MAX_ROWS = 4
MAX_TEXTS = 32
MAX_PADDING = 0.05
"""Share of padding up to which a shorter row is taken, whatever a longer one would hold."""
BATCH_OVERHEAD_TOKENS = 40
"""What a batch costs in addition to its tokens, in tokens."""
MIN_FILL_TO_OPEN_ROW = 0.75
"""Share of a row that a text must fill to open it, where the oldest text made rows longer than
ROW_TOKENS.
"""
MIN_TOKENS = 3
"""Tokens of the shortest ordinary text: one between two special ones."""
UNEVEN = 1.5
"""By how much a row of a batch may have more texts than the others, as a factor."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the texts of a batch are."""

    length: int
    """Tokens of every row, padding included."""
    rows: tuple[tuple[int, ...], ...]
    """For each row, the indices of its texts in the batch."""

    @property
    def tokens(self) -> int:
        """Tokens of all rows, padding included."""
        return self.length * len(self.rows)


@dataclass(frozen=True)
class Packing:
    """How a model's texts are packed.

    A batch has at most `max_texts` texts, and rows of at most `max_tokens` tokens together, padding
    included. Only a text that is alone may have more.
    """

    lengths: tuple[int, ...]
    """The row lengths to choose from, ascending; ROW_TOKENS and MAX_ROW_TOKENS are among them."""
    max_texts: int = MAX_TEXTS
    max_tokens: int = 4096

    def choose(
        self, waiting: Sequence[int], max_tokens: int | None = None
    ) -> tuple[list[int], Layout]:
        """Return the next batch of the texts that wait: their indices, and their layout.

        `waiting` holds each text's token count, oldest first; the oldest is always in the batch.
        `max_tokens` asks for a smaller batch than `Packing.max_tokens` allows.
        """
        limit = self.max_tokens if max_tokens is None else min(max_tokens, self.max_tokens)
        chosen = self._best_filled(waiting, limit)
        return chosen, self.lay_out([waiting[index] for index in chosen])

    def lay_out(self, texts: Sequence[int]) -> Layout:
        """Return rows for texts of these token counts, in their order.

        It takes as many rows as the texts need, whatever the limits are.
        """
        longest, total = max(texts), sum(texts)
        if longest > ROW_TOKENS:
            return _next_fit(texts, self._at_least(longest))
        if total <= MAX_ROW_TOKENS:
            return Layout(self._at_least(total), (tuple(range(len(texts))),))
        best: Layout | None = None
        for length in self._packed_lengths():
            layout = _next_fit(texts, length)
            if best is None or _cost(layout) < _cost(best):
                best = layout
            if len(layout.rows) <= MAX_ROWS and total >= (1 - MAX_PADDING) * layout.tokens:
                break
        assert best is not None
        return best

    def _best_filled(self, waiting: Sequence[int], limit: int) -> list[int]:
        """Return the indices of the batch with the most tokens for its cost."""
        oldest, shortest = waiting[0], min(waiting)
        longest = ROW_TOKENS if oldest <= ROW_TOKENS else self._at_least(oldest)
        fitting = [index for index, tokens in enumerate(waiting) if tokens <= longest]
        total = sum(waiting[index] for index in fitting)
        best: list[int] = []
        best_worth = 0.0
        for length in self._candidate_lengths(oldest, total, limit):
            max_rows = max(1, min(MAX_ROWS, limit // length, total // length))
            opens = 0
            if oldest > ROW_TOKENS and max_rows > 1:
                opens = math.ceil(MIN_FILL_TO_OPEN_ROW * length)
                fitting.sort(key=lambda index: index > 0 and waiting[index] < opens)
            rows = self._first_fit(waiting, fitting, length, max_rows, opens, shortest)
            chosen = [index for row in rows for index in row]
            tokens = sum(waiting[index] for index in chosen)
            computed = self._at_least(tokens) if len(rows) == 1 else len(rows) * length
            worth = tokens / (BATCH_OVERHEAD_TOKENS + computed)
            if worth > best_worth:
                best, best_worth = chosen, worth
            if tokens >= (1 - MAX_PADDING) * length * len(rows):
                break
        return best

    def _candidate_lengths(self, oldest: int, total: int, limit: int) -> Sequence[int]:
        """Return the row lengths that may suit the next batch, shortest first."""
        if oldest > ROW_TOKENS:
            return [self._at_least(oldest)]
        allowed = [length for length in self._packed_lengths() if length <= limit]
        if not allowed:
            return [max(oldest, self._at_most(limit))]
        # Texts that do not fill two rows go into one row, as long as it needs to be.
        return allowed if total >= 2 * ROW_TOKENS else allowed[-1:]

    def _first_fit(
        self,
        waiting: Sequence[int],
        fitting: Sequence[int],
        length: int,
        max_rows: int,
        opens: int,
        shortest: int,
    ) -> list[list[int]]:
        """Return each row's indices, first fit in the order of `fitting`.

        Only a text of at least `opens` tokens opens another row. `shortest` ends the search early.
        """
        rows, room, chosen = [[0]], [length - waiting[0]], 1
        for index in fitting[1:]:
            if chosen == self.max_texts or (len(rows) == max_rows and max(room) < shortest):
                break
            tokens = waiting[index]
            for row, free in enumerate(room):
                if tokens <= free:
                    rows[row].append(index)
                    room[row] -= tokens
                    chosen += 1
                    break
            else:
                if len(rows) < max_rows and tokens >= opens:
                    rows.append([index])
                    room.append(length - tokens)
                    chosen += 1
        return rows

    def _packed_lengths(self) -> Iterator[int]:
        return (length for length in self.lengths if ROW_TOKENS <= length <= MAX_ROW_TOKENS)

    def _at_least(self, tokens: int) -> int:
        return self.lengths[bisect_left(self.lengths, tokens)]

    def _at_most(self, tokens: int) -> int:
        index = bisect_right(self.lengths, tokens)
        return self.lengths[index - 1] if index else 0


def first_token_slots(rows: int, length: int, texts: int) -> int:
    """Return for how many first tokens of each row the engine is asked.

    `texts` is the largest number of texts in a row. The number decides the shape of the last layer,
    so it follows from the rows and their length: one for a text alone, else as many as there
    usually are at most. Results of further first tokens are not read.
    """
    if rows == texts == 1:
        return 1
    usual = min(math.ceil(length / MIN_TOKENS), math.ceil(UNEVEN * MAX_TEXTS / rows), MAX_TEXTS)
    return usual if texts <= usual else max(MAX_TEXTS, texts)


def most_texts(layout: Layout) -> int:
    """Return the largest number of texts in a row."""
    return max(map(len, layout.rows))


def _next_fit(texts: Sequence[int], length: int) -> Layout:
    """Return rows of that length, each filled before the next one is opened."""
    rows: list[list[int]] = []
    room = 0
    for index, tokens in enumerate(texts):
        if tokens > room:
            rows.append([])
            room = length
        rows[-1].append(index)
        room -= tokens
    return Layout(length, tuple(map(tuple, rows)))


def _cost(layout: Layout) -> tuple[bool, int]:
    """Few rows are better than many; then the fewest tokens."""
    return len(layout.rows) > MAX_ROWS, layout.tokens
