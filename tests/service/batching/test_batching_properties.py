"""Properties of every backlog: hypothesis draws the lengths, the real batcher makes the batches."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.batching.batcher import Batcher, BatchStats
from service.batching.packing import Packing
from service.batching.queue import MIN_LENGTH_RATIO, NEAR_TOKENS, BatchLimits
from service.batching.shapes import GPU, PACKED, Shapes

SHAPES = Shapes(512)
SHARED = Shapes(512, grid=PACKED)


@dataclass(frozen=True)
class Text:
    number: int
    tokens: int


@dataclass
class Noting:
    """A model that only records its batches."""

    padding_invariant: bool = True
    shapes: Shapes = SHAPES
    batches: list[list[Text]] = field(default_factory=list)

    @property
    def packing(self) -> Packing | None:
        return self.shapes.packing

    def padded_length(self, tokens: int) -> int:
        return self.shapes.length(tokens) if self.padding_invariant else tokens

    def has_run(self, rows: int, length: int, texts: int) -> bool:
        return True

    def start(self, batch: Sequence[Text], _layout: object = None) -> Callable[[], list[int]]:
        self.batches.append(list(batch))
        return lambda: [text.number for text in batch]


def batched(
    lengths: Sequence[int],
    max_batch_size: int = 16,
    max_batch_tokens: int = 4096,
    padding_invariant: bool = True,
    shapes: Shapes = SHAPES,
    on_batch: Callable[[BatchStats], None] = lambda batch: None,
) -> list[list[Text]]:
    """What the batcher makes of texts that all wait when it begins, oldest first; each caller gets
    its own row.
    """
    model = Noting(padding_invariant, shapes)
    sizes = Shapes(2, max_batch_size, shapes.grid)

    async def all_at_once() -> list[int]:
        batcher = Batcher(
            {"m": model},
            BatchLimits(max_batch_size, max_batch_tokens, sizes.batch_size, sizes.rows),
            on_batch=on_batch,
        )
        answers = asyncio.create_task(
            batcher.submit("m", [Text(*item) for item in enumerate(lengths)])
        )
        await asyncio.sleep(0)
        batcher.start()
        rows = await answers
        assert await batcher.close(10)
        return [row.value for row in rows]

    assert asyncio.run(all_at_once()) == list(range(len(lengths)))
    return model.batches


backlogs = st.lists(st.integers(1, 512), min_size=1, max_size=80)


@given(backlogs, st.sampled_from((1, 2, 3, 4, 8, 16)), st.integers(1, 5000), st.booleans())
@settings(max_examples=150, deadline=None)
def test_a_batch_keeps_its_limits_and_every_text_runs_once(
    lengths: list[int], size: int, tokens: int, padding_invariant: bool
) -> None:
    batches = batched(lengths, size, tokens, padding_invariant)
    assert sorted(text.number for batch in batches for text in batch) == list(range(len(lengths)))
    for batch in batches:
        computed = [
            SHAPES.length(text.tokens) if padding_invariant else text.tokens for text in batch
        ]
        assert len(batch) <= size
        assert len(batch) == 1 or max(computed) * len(batch) <= tokens
        if not padding_invariant:
            assert len(set(computed)) == 1
        assert max(computed) - min(computed) <= max(
            NEAR_TOKENS, (1 - MIN_LENGTH_RATIO) * max(computed)
        )


@given(
    st.lists(st.integers(1, 512), min_size=1, max_size=300), st.sampled_from((None, 1000, 40_000))
)
@settings(max_examples=100, deadline=None)
def test_a_batch_on_a_gpu_has_a_shape_that_was_warmed_up(
    lengths: list[int], tokens: int | None
) -> None:
    shapes = Shapes(512, grid=GPU, max_batch_tokens=tokens)
    warm = set(shapes.by_work())
    for batch in batched(lengths, shapes.max_batch_size, shapes.max_batch_tokens, shapes=shapes):
        assert (shapes.rows(len(batch)), max(shapes.length(text.tokens) for text in batch)) in warm


@given(
    backlogs,
    st.sampled_from((1, 2, 3, 4, 8, 16, 32)),
    st.integers(1, 5000),
    st.sampled_from((40, 128, 150, 300, 512)),
)
@settings(max_examples=300, deadline=None)
def test_packed_batches_keep_the_limits_and_have_warmed_up_shapes(
    lengths: list[int], size: int, tokens: int, longest: int
) -> None:
    shapes = Shapes(longest, size, PACKED, tokens)
    lengths = [min(length, longest) for length in lengths]
    warm, packing = set(shapes.by_work()), shapes.packing
    assert packing is not None
    batches = batched(lengths, shapes.max_batch_size, tokens, shapes=shapes)
    assert sorted(text.number for batch in batches for text in batch) == list(range(len(lengths)))
    for batch in batches:
        layout = packing.lay_out([text.tokens for text in batch])
        assert sorted(place for row in layout.rows for place in row) == list(range(len(batch)))
        assert all(
            sum(batch[place].tokens for place in row) <= layout.length for row in layout.rows
        )
        assert len(batch) <= size
        assert layout.tokens <= max(tokens, *(shapes.length(text.tokens) for text in batch))
        assert (len(layout.rows), layout.length) in warm


@given(st.sampled_from((40, 128, 150, 300, 512)), st.sampled_from((None, 1, 2, 8)))
@settings(deadline=None)
def test_every_packed_shape_is_that_of_its_warm_up_texts(longest: int, size: int | None) -> None:
    shapes = Shapes(longest, size, PACKED)
    assert shapes.packing is not None
    for rows, length in shapes.by_work():
        texts = shapes.example_lengths(rows, length)
        assert texts or size is not None
        if texts:
            layout = shapes.packing.lay_out(texts)
            assert (len(layout.rows), layout.length) == (rows, length)
            assert max(texts) <= longest
            assert len(texts) <= shapes.max_batch_size


@given(backlogs, st.sampled_from((SHAPES, SHARED)))
@settings(max_examples=100, deadline=None)
def test_the_oldest_text_is_always_in_the_next_batch(lengths: list[int], shapes: Shapes) -> None:
    gone: set[int] = set()
    for batch in batched(lengths, shapes=shapes):
        numbers = {text.number for text in batch}
        assert min(set(range(len(lengths))) - gone) in numbers
        gone |= numbers


@given(st.integers(10, 60), st.integers(0, 40))
@settings(max_examples=25, deadline=None)
def test_one_long_text_among_many_short_ones_waits_only_for_earlier_texts(
    short: int, place: int
) -> None:
    place = min(place, short)
    lengths = [8] * place + [500] + [8] * (short - place)
    batches = batched(lengths)
    turn = next(i for i, batch in enumerate(batches) if any(text.tokens == 500 for text in batch))
    assert turn <= -(-place // 12) + 1  # batches of 16, or of at least 12 at the end


@pytest.mark.parametrize("shapes", [SHAPES, SHARED], ids=("a row each", "shared rows"))
def test_a_backlog_of_any_lengths_computes_no_more_than_five_per_cent_of_padding(
    shapes: Shapes,
) -> None:
    draw = random.Random(0)
    for lengths in (
        [draw.randint(5, 500) for _ in range(1000)],
        [round(min(60, max(4, draw.gauss(24, 11)))) for _ in range(1000)],
    ):
        batches = batched(lengths, shapes.max_batch_size, shapes=shapes)
        assert 1 - sum(lengths) / sum(computed(shapes, batch) for batch in batches) <= 0.05


@pytest.mark.parametrize(
    "lengths",
    [(tokens, tokens) for tokens in range(30, 129, 7)] + [(2, 128), (30, 128), (60, 110)],
    ids=lambda lengths: "{} to {}".format(*lengths),
)
def test_packing_texts_of_any_length_leaves_little_padding(lengths: tuple[int, int]) -> None:
    draw = random.Random(0)
    texts = [draw.randint(*lengths) for _ in range(400)]
    assert (
        1 - sum(texts) / sum(computed(SHARED, batch) for batch in batched(texts, shapes=SHARED))
        <= 0.12
    )


def test_unused_tokens_of_packed_rows_count_as_padding() -> None:
    counted: list[BatchStats] = []
    batches = batched([60, 60, 60, 60, 8, 8, 300], shapes=SHARED, on_batch=counted.append)
    assert (
        [sum(text.tokens for text in batch) for batch in batches]
        == [batch.tokens for batch in counted]
        == [256, 300]
    )
    assert [batch.padding_tokens for batch in counted] == [0, 4]


def computed(shapes: Shapes, batch: list[Text]) -> int:
    """Return the tokens that a batch takes, padding included."""
    if shapes.packing is None:
        return shapes.length(max(text.tokens for text in batch)) * len(batch)
    return shapes.packing.lay_out([text.tokens for text in batch]).tokens
