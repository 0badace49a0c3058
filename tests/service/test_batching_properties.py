"""What holds for every backlog, whatever its lengths: drawn by hypothesis, batched by the real batcher."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from service.batcher import Batcher
from service.queue import NEAR_TOKENS, SHARED_LENGTH
from service.shapes import GPU, Shapes

SHAPES = Shapes(512)


@dataclass(frozen=True)
class Text:
    number: int
    tokens: int


@dataclass
class Noting:
    """A model that only notes its batches."""

    padding_safe: bool = True
    shapes: Shapes = SHAPES
    batches: list[list[Text]] = field(default_factory=list)

    def padded_length(self, tokens: int) -> int:
        return self.shapes.length(tokens) if self.padding_safe else tokens

    def start(self, batch: Sequence[Text]) -> Callable[[], list[int]]:
        self.batches.append(list(batch))
        return lambda: [text.number for text in batch]


def batched(
    lengths: Sequence[int], max_batch_size: int = 16, max_batch_tokens: int = 4096, padding_safe: bool = True, shapes: Shapes = SHAPES
) -> list[list[Text]]:
    """What the batcher makes of texts that all wait when it begins, oldest first; each caller gets its own row."""
    model = Noting(padding_safe, shapes)
    sizes = Shapes(2, max_batch_size, shapes.grid)

    async def all_at_once() -> list[int]:
        batcher = Batcher({"m": model}, max_batch_size, max_batch_tokens, batch_size=sizes.batch_size, rows=sizes.rows)
        asked = asyncio.create_task(batcher.submit("m", [Text(*one) for one in enumerate(lengths)]))
        await asyncio.sleep(0)
        batcher.start()
        rows = await asked
        assert await batcher.close(10)
        return [row.value for row in rows]

    assert asyncio.run(all_at_once()) == list(range(len(lengths)))
    return model.batches


backlogs = st.lists(st.integers(1, 512), min_size=1, max_size=80)


@given(backlogs, st.sampled_from((1, 2, 3, 4, 8, 16)), st.integers(1, 5000), st.booleans())
@settings(max_examples=150, deadline=None)
def test_a_batch_keeps_its_limits_and_every_text_runs_once(lengths: list[int], size: int, tokens: int, padding_safe: bool) -> None:
    batches = batched(lengths, size, tokens, padding_safe)
    assert sorted(text.number for batch in batches for text in batch) == list(range(len(lengths)))
    for batch in batches:
        computed = [SHAPES.length(text.tokens) if padding_safe else text.tokens for text in batch]
        assert len(batch) <= size
        assert len(batch) == 1 or max(computed) * len(batch) <= tokens
        if not padding_safe:
            assert len(set(computed)) == 1
        assert max(computed) - min(computed) <= max(NEAR_TOKENS, (1 - SHARED_LENGTH) * max(computed))


@given(st.lists(st.integers(1, 512), min_size=1, max_size=300), st.sampled_from((None, 1000, 40_000)))
@settings(max_examples=100, deadline=None)
def test_a_batch_on_a_gpu_has_a_shape_that_was_warmed_up(lengths: list[int], tokens: int | None) -> None:
    shapes = Shapes(512, grid=GPU, max_batch_tokens=tokens)
    warm = set(shapes.likely_first())
    for batch in batched(lengths, shapes.max_batch_size, shapes.max_batch_tokens, shapes=shapes):
        assert (shapes.rows(len(batch)), max(shapes.length(text.tokens) for text in batch)) in warm


@given(backlogs)
@settings(max_examples=100, deadline=None)
def test_the_oldest_text_is_always_in_the_next_batch(lengths: list[int]) -> None:
    gone: set[int] = set()
    for batch in batched(lengths):
        numbers = {text.number for text in batch}
        assert min(set(range(len(lengths))) - gone) in numbers
        gone |= numbers


@given(st.integers(10, 60), st.integers(0, 40))
@settings(max_examples=25, deadline=None)
def test_one_long_text_among_many_short_ones_waits_no_longer_than_what_came_before_it(short: int, place: int) -> None:
    place = min(place, short)
    lengths = [8] * place + [500] + [8] * (short - place)
    batches = batched(lengths)
    turn = next(i for i, batch in enumerate(batches) if any(text.tokens == 500 for text in batch))
    assert turn <= -(-place // 12) + 1    # batches of 16 or, what is left over, of at least 12


def test_a_backlog_of_any_lengths_computes_no_more_than_five_per_cent_of_padding() -> None:
    draw = random.Random(0)
    for lengths in ([draw.randint(5, 500) for _ in range(1000)], [round(min(60, max(4, draw.gauss(24, 11)))) for _ in range(1000)]):
        batches = batched(lengths)
        computed = sum(SHAPES.length(max(text.tokens for text in batch)) * len(batch) for batch in batches)
        assert 1 - sum(lengths) / computed <= 0.05
        assert len(lengths) / len(batches) > 8
