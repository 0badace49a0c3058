"""Padded lengths, batch sizes and the shapes of the warm-up."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

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
    longest=st.integers(2, 60),
    data=st.data(),
    grid=st.sampled_from([CPU, PACKED]),
)
def test_a_warm_up_for_short_texts_runs_every_shape_that_they_can_make(
    longest: int, data: st.DataObject, grid: Grid
) -> None:
    shapes = Shapes(512, grid=grid)
    warm = {shape for shape in shapes.by_work() if shapes.example_lengths(*shape, longest)}
    waiting = data.draw(st.lists(st.integers(2, longest), min_size=1, max_size=40))
    if shapes.packing is None:
        rows = shapes.batch_size(len(waiting))
        shape = (rows, shapes.length(max(waiting[:rows])))
    else:
        _, layout = shapes.packing.choose(waiting)
        shape = (len(layout.rows), layout.length)
    assert shape in warm


def test_a_warm_up_for_short_texts_leaves_long_shapes_out() -> None:
    for grid in (CPU, PACKED):
        shapes = Shapes(512, grid=grid)
        examples = [shapes.example_lengths(*shape, 10) for shape in shapes.by_work()]
        assert max(max(texts) for texts in examples if texts) <= 10
        assert len([texts for texts in examples if texts]) < len(list(shapes.by_work()))
