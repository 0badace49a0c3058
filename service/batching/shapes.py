"""
The finite grid of batch shapes: engines keep kernels, or a captured graph, per shape, so a new one
costs milliseconds and memory.
"""

from __future__ import annotations

import json
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from command import BadInput
from service.batching.packing import LONGEST, MAX_ROWS, MAX_TEXTS, ROW, SLOTS, Packing


@dataclass(frozen=True)
class Grid:
    """What a kind of engine likes its batches to be like."""

    batch_sizes: tuple[int, ...]
    steps: tuple[tuple[int, int], ...]
    """(up to this length, in steps of so many tokens), ascending."""
    last_step: int
    max_batch_tokens: int
    """Tokens beyond which a larger batch gains nothing, padding counted."""
    padded_rows: bool = False
    """Whether a batch is filled up with empty rows to the next size; else it is cut down to the one
    below.
    """
    all_warm: bool = False
    """Whether every shape is run before the first request, because the first run is the one that
    captures it.
    """
    packs: bool = False
    """Whether several texts may share a row."""
    lengths: tuple[int, ...] = field(default=())
    """The very lengths, where they were measured; they take the place of the steps."""


CPU = Grid(
    (1, 2, 3, 4, 6, 8, 12, 16), ((32, 2), (64, 4), (128, 8), (256, 16)), 32, max_batch_tokens=4096
)
# For graphs that read several texts in a row: batch sizes are numbers of rows, of which there are
# few, so that there is room for more lengths.
PACKED = replace(
    CPU,
    batch_sizes=tuple(range(1, 1 + MAX_ROWS)),
    steps=((32, 2), (64, 4), (128, 8), (512, 16)),
    packs=True,
)
# Multiples of 8 suit tensor cores. A row more costs a GPU little while it is not full, a captured
# graph less costs nothing.
GPU = Grid(
    (1, 2, 4, 8, 16, 32, 64, 128),
    ((64, 8), (128, 16), (256, 32)),
    64,
    max_batch_tokens=16_384,
    padded_rows=True,
    all_warm=True,
)


class Shapes:
    """A grid's shapes for a model that reads `max_tokens`: lengths up to that, batch sizes up to
    `max_batch_size`.

    `max_batch_tokens` takes the place of the grid's own.
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
        self.lengths = tuple(_lengths(max(max_tokens, LONGEST) if grid.packs else max_tokens, grid))
        self.packing = (
            Packing(
                self.lengths, min(MAX_TEXTS, max_batch_size or MAX_TEXTS), self.max_batch_tokens
            )
            if grid.packs
            else None
        )

    @property
    def max_batch_size(self) -> int:
        """Texts."""
        return self.batch_sizes[-1] if self.packing is None else self.packing.max_texts

    def length(self, tokens: int) -> int:
        """The shortest length on the grid that holds `tokens`."""
        return self.lengths[bisect_left(self.lengths, tokens)]

    def batch_size(self, waiting: int) -> int:
        """How many of `waiting` items make a batch, a row each: all that fit where rows may be
        padding, else the largest size that they fill.
        """
        if self.grid.padded_rows:
            return min(waiting, self.max_batch_size)
        return self.batch_sizes[bisect_right(self.batch_sizes, waiting) - 1]

    def rows(self, items: int) -> int:
        """How many rows a batch of so many items, a row each, has when it runs."""
        if not self.grid.padded_rows:
            return items
        return self.batch_sizes[bisect_left(self.batch_sizes, items)]

    def likely_first(self) -> Iterator[tuple[int, int]]:
        """Every (rows, length) that a batch can have, smallest work first: what an idle service
        meets before what a busy one does.
        """
        every = ((rows, length) for rows in self.batch_sizes for length in self.lengths)
        allowed = (
            (rows, length)
            for rows, length in every
            if rows == 1 or rows * length <= self.max_batch_tokens
        )
        if self.packing is not None:
            allowed = ((rows, length) for rows, length in allowed if rows == 1 or length >= ROW)
        yield from sorted(allowed, key=lambda shape: shape[0] * shape[1])

    def texts_of(self, rows: int, length: int) -> list[int]:
        """Tokens of the fewest texts that make a batch of that shape, none if there are no such
        texts; in rows of ROW many, so that every number of SLOTS is met.
        """
        if self.packing is None:
            return [min(length, self.max_tokens)] * rows
        most = self.packing.max_texts // rows
        for share in range(min(SLOTS[1], most) if length == ROW else 1, most + 1):
            # Each row's tokens, or what the model reads of them, in equal parts.
            tokens = min(length, self.max_tokens * share)
            texts = [
                tokens // share + (part < tokens % share)
                for _ in range(rows)
                for part in range(share)
            ]
            layout = self.packing.lay_out(texts)
            if (len(layout.rows), layout.length) == (rows, length):
                return texts
        return []


class _Table(BaseModel):
    """What `python -m benchmarks gpu --calibrate` writes."""

    model_config = ConfigDict(extra="forbid", strict=True)

    device: str
    batch_sizes: list[int] = Field(min_length=1)
    lengths: list[int] = Field(min_length=1)
    max_batch_tokens: int = Field(ge=1)
    measured: list[tuple[int, int, float]]
    """(batch size, length, milliseconds); for people."""


def read_grid(path: Path, device: str) -> Grid:
    """The grid that was measured on a GPU of the name `device`; BadInput if the file is no such
    thing, or for another GPU.
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
        where = ".".join(str(part) for part in first["loc"]) or "it"
        raise BadInput(
            f"{path}: {where}: {first['msg']}; `python -m benchmarks gpu --calibrate` makes it."
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
        all_warm=True,
        lengths=tuple(table.lengths),
    )


def write_grid(path: Path, device: str, grid: Grid, measured: list[tuple[int, int, float]]) -> None:
    """Writes what `read_grid` reads."""
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
