"""Padded lengths, batch sizes and the shapes of the warm-up."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.batching.packing import MAX_TEXTS, Layout, first_token_slots, most_texts
from service.batching.shapes import CPU, PACKED, Grid, Shapes


@pytest.mark.parametrize(
    ("tokens", "length"),
    [
        (1, 2),
        (2, 2),
        (3, 4),
        (31, 32),
        (33, 36),
        (63, 64),
        (65, 72),
        (127, 128),
        (129, 144),
        (255, 256),
        (257, 288),
        (512, 512),
    ],
)
def test_lengths_are_rounded_up_in_steps_that_grow(tokens: int, length: int) -> None:
    assert Shapes(512).length(tokens) == length


def test_the_longest_text_fits_any_length_of_the_model() -> None:
    for most in (3, 16, 77, 130, 512, 514):
        assert Shapes(most).length(most) == most


@pytest.mark.parametrize(
    ("waiting", "size"), [(1, 1), (5, 4), (7, 6), (9, 8), (15, 12), (16, 16), (100, 16)]
)
def test_a_batch_is_the_largest_on_the_grid_that_is_full(waiting: int, size: int) -> None:
    assert Shapes(64).batch_size(waiting) == size


def test_warm_up_begins_with_the_least_work() -> None:
    shapes = list(Shapes(64).by_work())
    assert shapes[0] == (1, 2)
    assert len(shapes) == len(set(shapes)) == len(Shapes(64).lengths) * len(CPU.batch_sizes)


@given(
    longest=st.integers(3, 60),
    data=st.data(),
    grid=st.sampled_from([CPU, PACKED]),
)
def test_a_warm_up_for_short_texts_runs_every_shape_that_they_can_make(
    longest: int, data: st.DataObject, grid: Grid
) -> None:
    shapes = Shapes(512, grid=grid)
    waiting = data.draw(st.lists(st.integers(3, longest), min_size=1, max_size=40))
    if shapes.packing is None:
        warm = {shape for shape in shapes.by_work() if shapes.example_lengths(*shape, longest)}
        rows = shapes.batch_size(len(waiting))
        assert (rows, shapes.length(max(waiting[:rows]))) in warm
        return
    slotted = {slotted_shape(shapes.packing.lay_out(each)) for each in shapes.examples(longest)}
    rows, length, slots = slotted_shape(shapes.packing.choose(waiting)[1])
    # More texts in one of several rows than there usually are is too rare to be warmed up.
    assert (rows, length, slots) in slotted or (rows > 1 and slots == MAX_TEXTS)


def slotted_shape(layout: Layout) -> tuple[int, int, int]:
    """Return the rows, their length, and for how many first tokens of each the engine is asked."""
    rows, length = len(layout.rows), layout.length
    return rows, length, first_token_slots(rows, length, most_texts(layout))


def test_a_warm_up_for_short_texts_leaves_long_shapes_out() -> None:
    for grid in (CPU, PACKED):
        shapes = Shapes(512, grid=grid)
        examples = [shapes.example_lengths(*shape, 10) for shape in shapes.by_work()]
        assert max(max(texts) for texts in examples if texts) <= 10
        assert len([texts for texts in examples if texts]) < len(list(shapes.by_work()))
