"""
The finite grid of batch shapes.

An engine keeps kernels, or a captured graph, for each shape, so a new shape costs milliseconds and
memory.
"""

from __future__ import annotations

import json
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from command import BadInput
from service.batching.packing import (
    MAX_ROW_TOKENS,
    MAX_ROWS,
    MAX_TEXTS,
    MIN_TOKENS,
    ROW_TOKENS,
    Packing,
)


@dataclass(frozen=True)
class Grid:
    """The batch shapes that suit a kind of engine."""

    batch_sizes: tuple[int, ...]
    steps: tuple[tuple[int, int], ...]
    """Pairs (length, step), ascending: up to that length, lengths grow by that step."""
    last_step: int
    """The step of lengths beyond the last pair."""
    max_batch_tokens: int
    """Tokens beyond which a larger batch gains nothing, padding included."""
    padded_rows: bool = False
    """Whether a batch is filled with empty rows to the next batch size, or cut to the one below."""
    warm_up_all: bool = False
    """Whether every shape is run before the first request, because the first run captures it."""
    supports_packing: bool = False
    """Whether several texts may be packed into a row."""
    lengths: tuple[int, ...] = field(default=())
    """The lengths themselves, where they were measured; they replace the steps."""


CPU = Grid(
    (1, 2, 3, 4, 6, 8, 12, 16), ((32, 2), (64, 4), (128, 8), (256, 16)), 32, max_batch_tokens=4096
)
# For engines whose answer to a text would depend on the other texts of its batch.
ONE_TEXT = replace(CPU, batch_sizes=(1,))
# For graphs that read packed rows. Batch sizes are numbers of rows. There are few of them, so there
# is room for more lengths.
PACKED = replace(
    CPU,
    batch_sizes=tuple(range(1, 1 + MAX_ROWS)),
    steps=((32, 2), (64, 4), (128, 8), (512, 16)),
    supports_packing=True,
)
# Multiples of 8 suit tensor cores. An extra row costs a GPU little while it is not full, and each
# shape fewer saves a captured graph.
GPU = Grid(
    (1, 2, 4, 8, 16, 32, 64, 128),
    ((64, 8), (128, 16), (256, 32)),
    64,
    max_batch_tokens=16_384,
    padded_rows=True,
    warm_up_all=True,
)


class Shapes:
    """The shapes of a grid for one model: lengths up to `max_tokens`, sizes up to `max_batch_size`.

    `max_batch_tokens` replaces the grid's own.
    """

    def __init__(
        self,
        max_tokens: int,
        max_batch_size: int | None = None,
        grid: Grid = CPU,
        max_batch_tokens: int | None = None,
    ) -> None:
        self.grid = grid
        self.max_batch_tokens = max_batch_tokens or grid.max_batch_tokens
        self.max_tokens = max_tokens
        self.batch_sizes = tuple(
            size for size in grid.batch_sizes if max_batch_size is None or size <= max_batch_size
        )
        longest = max(max_tokens, MAX_ROW_TOKENS) if grid.supports_packing else max_tokens
        self.lengths = tuple(_lengths(longest, grid))
        self.packing = (
            Packing(
                self.lengths, min(MAX_TEXTS, max_batch_size or MAX_TEXTS), self.max_batch_tokens
            )
            if grid.supports_packing
            else None
        )

    @property
    def max_batch_size(self) -> int:
        """Texts of the largest batch."""
        return self.batch_sizes[-1] if self.packing is None else self.packing.max_texts

    def length(self, tokens: int) -> int:
        """Return the shortest length of the grid that holds `tokens`."""
        return self.lengths[bisect_left(self.lengths, tokens)]

    def batch_size(self, waiting: int) -> int:
        """Return how many of `waiting` unpacked items make a batch.

        All that fit if rows may be padding, else the largest batch size that they fill.
        """
        if self.grid.padded_rows:
            return min(waiting, self.max_batch_size)
        return self.batch_sizes[bisect_right(self.batch_sizes, waiting) - 1]

    def rows(self, items: int) -> int:
        """Return how many rows a batch of so many unpacked items has when it runs."""
        if not self.grid.padded_rows:
            return items
        return self.batch_sizes[bisect_left(self.batch_sizes, items)]

    def by_work(self) -> Iterator[tuple[int, int]]:
        """Yield every (rows, length) that a batch can have, least work first.

        An idle service meets the first ones, a busy service the last ones.
        """
        shapes = [
            (rows, length)
            for rows in self.batch_sizes
            for length in self.lengths
            if self._is_possible(rows, length)
        ]
        yield from sorted(shapes, key=lambda shape: shape[0] * shape[1])

    def _is_possible(self, rows: int, length: int) -> bool:
        if rows == 1:
            return True
        if self.packing is not None and length < ROW_TOKENS:
            return False
        return rows * length <= self.max_batch_tokens

    def examples(self, max_text_tokens: int | None = None) -> Iterator[list[int]]:
        """Yield token counts of texts for every shape that such texts can make, least work first.

        A row that can hold one text or several has a shape for each (see first_token_slots).
        """
        for rows, length in self.by_work():
            if texts := self.example_lengths(rows, length, max_text_tokens):
                yield texts
                if self.packing is not None and len(texts) == rows == 1:
                    packed = self.example_lengths(rows, length, max_text_tokens, fewest=2)
                    if packed and min(packed) >= MIN_TOKENS:
                        yield packed

    def example_lengths(
        self, rows: int, length: int, max_text_tokens: int | None = None, fewest: int = 1
    ) -> list[int]:
        """Return token counts of texts that make a batch of that shape; none if no texts do.

        They are the fewest such texts, of at most `max_text_tokens` each, and at least `fewest` in
        a packed row.
        """
        longest = min(self.max_tokens, max_text_tokens or self.max_tokens)
        if self.packing is None:
            return [min(length, longest)] * rows if self.length(longest) >= length else []
        most = self.packing.max_texts // rows
        for texts_per_row in range(fewest, most + 1):
            # The tokens of a row, or what the model reads of them, in equal parts.
            tokens = min(length, longest * texts_per_row)
            part, remainder = divmod(tokens, texts_per_row)
            row = [part + (index < remainder) for index in range(texts_per_row)]
            texts = row * rows
            layout = self.packing.lay_out(texts)
            if (len(layout.rows), layout.length) == (rows, length):
                return texts
        return []


class _Table(BaseModel):
    """The file that `python -m benchmarks gpu --calibrate` writes."""

    model_config = ConfigDict(extra="forbid", strict=True)

    device: str
    batch_sizes: list[int] = Field(min_length=1)
    lengths: list[int] = Field(min_length=1)
    max_batch_tokens: int = Field(ge=1)
    measured: list[tuple[int, int, float]]
    """Triples (batch size, length, milliseconds), for people to read."""


def read_grid(path: Path, device: str) -> Grid:
    """Return the grid that was measured on a GPU of the name `device`.

    Raises BadInput if the file cannot be read, is no such table, or is for another GPU.
    """
    try:
        table = _Table.model_validate_json(path.read_bytes())
    except OSError as error:
        raise BadInput(
            f"{path} cannot be read ({error.strerror}); `python -m benchmarks gpu --calibrate`"
            " makes it."
        ) from None
    except ValidationError as error:
        first = error.errors()[0]
        field_name = ".".join(str(part) for part in first["loc"]) or "it"
        raise BadInput(
            f"{path}: {field_name}: {first['msg']}; `python -m benchmarks gpu --calibrate`"
            " makes it."
        ) from None
    if table.device != device:
        raise BadInput(
            f"{path} was measured on {table.device}, and this is {device}; measure it here, or"
            " leave it out."
        )
    if (
        any(length % 8 for length in table.lengths)
        or sorted(set(table.lengths)) != table.lengths
        or sorted(set(table.batch_sizes)) != table.batch_sizes
    ):
        raise BadInput(
            f"{path}: lengths are multiples of 8, and both lists ascend; `python -m benchmarks gpu"
            " --calibrate` makes it."
        )
    return Grid(
        tuple(table.batch_sizes),
        (),
        GPU.last_step,
        table.max_batch_tokens,
        padded_rows=True,
        warm_up_all=True,
        lengths=tuple(table.lengths),
    )


def write_grid(path: Path, device: str, grid: Grid, measured: list[tuple[int, int, float]]) -> None:
    """Write the table that `read_grid` reads."""
    path.write_text(
        json.dumps(
            {
                "device": device,
                "batch_sizes": grid.batch_sizes,
                "lengths": grid.lengths,
                "max_batch_tokens": grid.max_batch_tokens,
                "measured": [[size, length, round(ms, 4)] for size, length, ms in measured],
            }
        )
        + "\n",
        encoding="utf-8",
    )


def _lengths(max_tokens: int, grid: Grid) -> Iterator[int]:
    if grid.lengths:
        yield from (length for length in grid.lengths if length < max_tokens)
    else:
        length = step = grid.steps[0][1]
        while length < max_tokens:
            yield length
            step = next((s for end, s in grid.steps if length < end), grid.last_step)
            length += step
    yield max_tokens
