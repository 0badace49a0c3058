"""Padded lengths, batch sizes and the shapes of the warm-up."""

from __future__ import annotations

import pytest

from service.batching.shapes import CPU, Shapes


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
