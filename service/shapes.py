"""
The finite grid of batch shapes: engines keep kernels per shape, so a new shape costs milliseconds and memory.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator

BATCH_SIZES = (1, 2, 3, 4, 6, 8, 12, 16)
_STEPS = ((32, 2), (64, 4), (128, 8), (256, 16))


class Shapes:
    """Lengths in steps of 2 to 32, 4 to 64, 8 to 128, 16 to 256, 32 beyond, up to `max_tokens`."""

    def __init__(self, max_tokens: int, max_batch_size: int = BATCH_SIZES[-1]) -> None:
        self.lengths = tuple(_lengths(max_tokens))
        self.batch_sizes = tuple(size for size in BATCH_SIZES if size <= max_batch_size)

    def length(self, tokens: int) -> int:
        """The shortest length on the grid that holds `tokens`."""
        return self.lengths[bisect_left(self.lengths, tokens)]

    def batch_size(self, waiting: int) -> int:
        """The largest batch on the grid that `waiting` items fill, so no row is padding."""
        return self.batch_sizes[bisect_right(self.batch_sizes, waiting) - 1]

    def likely_first(self) -> Iterator[tuple[int, int]]:
        """Every (batch size, length), smallest work first: what an idle service meets before what a busy one does."""
        yield from sorted(((b, t) for b in self.batch_sizes for t in self.lengths), key=lambda shape: shape[0] * shape[1])


def _lengths(max_tokens: int) -> Iterator[int]:
    length, step = 2, 2
    while length < max_tokens:
        yield length
        step = next((s for end, s in _STEPS if length < end), 32)
        length += step
    yield max_tokens
