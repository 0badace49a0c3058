"""Sequence packing: which texts share a row, and their places in it."""

from __future__ import annotations

import random

import pytest

from service.batching.packing import (
    MAX_ROW_TOKENS,
    MAX_ROWS,
    ROW_TOKENS,
    Layout,
    Packing,
    first_token_slots,
)
from service.batching.shapes import PACKED, Shapes

LENGTHS = Shapes(512, grid=PACKED).lengths
PACKING = Packing(LENGTHS)


def chosen(waiting: list[int], packing: Packing = PACKING) -> Layout:
    """Return the layout of the chosen texts, by their indices in `waiting`."""
    places, layout = packing.choose(waiting)
    assert layout == packing.lay_out([waiting[place] for place in places])
    return Layout(layout.length, tuple(tuple(places[i] for i in row) for row in layout.rows))


def test_a_single_text_gets_a_row_of_its_length_on_the_grid() -> None:
    assert chosen([25]) == Layout(26, ((0,),))
    assert chosen([500]) == Layout(512, ((0,),))


def test_few_texts_share_one_row() -> None:
    assert chosen([10, 20, 30]) == Layout(60, ((0, 1, 2),))
    assert chosen([100, 92]) == Layout(192, ((0, 1),))
    assert chosen([112, 112]) == Layout(MAX_ROW_TOKENS, ((0, 1),))


def test_many_texts_fill_several_rows_in_order_of_arrival() -> None:
    assert chosen([60, 60, 60, 60, 8, 8]) == Layout(ROW_TOKENS, ((0, 1, 4), (2, 3, 5)))
    assert len(chosen([29] * 32).rows) == MAX_ROWS


@pytest.mark.parametrize(
    ("tokens", "length", "in_a_row"),
    [
        (32, 128, 4),
        (66, 208, 3),
        (72, 144, 2),
        (80, 160, 2),
        (100, 208, 2),
        (110, 224, 2),
        (125, 128, 1),
    ],
)
def test_the_row_length_leaves_little_of_the_rows_unused(
    tokens: int, length: int, in_a_row: int
) -> None:
    layout = chosen([tokens] * 40)
    assert layout.length == length
    assert {len(row) for row in layout.rows} == {in_a_row}
    assert len(layout.rows) == MAX_ROWS


def test_texts_that_would_leave_a_row_half_empty_wait_for_the_next_batch() -> None:
    assert chosen([100] * 3) == Layout(208, ((0, 1),))
    assert chosen([120, 120]) == Layout(120, ((0,),))


def test_the_number_of_first_token_slots_follows_from_the_shape() -> None:
    assert first_token_slots(1, 128, 1) == 1
    assert {first_token_slots(1, 128, texts) for texts in range(2, 33)} == {32}
    assert {first_token_slots(4, 128, texts) for texts in range(1, 13)} == {12}
    assert {first_token_slots(1, 16, texts) for texts in range(2, 7)} == {6}
    # Rare: more texts in a row than there usually are.
    assert first_token_slots(4, 128, 13) == 32
    assert first_token_slots(1, 128, 40) == 40


def test_a_long_text_sets_the_row_length_and_short_ones_fill_the_rest() -> None:
    assert chosen([300, 20, 4, 200, 90, 500]) == Layout(304, ((0, 2),))
    assert chosen([300, 20, 4, 250, 60, 500]) == Layout(304, ((0, 2), (3, 1)))
    assert chosen([500, *[12] * 200]).rows == ((0, 1),)


def test_a_long_text_waits_for_older_short_ones() -> None:
    assert 1 not in PACKING.choose([10, 500, 10])[0]
    assert PACKING.choose([500, 10, 10])[0][0] == 0


@pytest.mark.parametrize("seed", range(40))
def test_a_layout_keeps_the_limits_of_texts_tokens_and_rows(seed: int) -> None:
    draw = random.Random(seed)
    waiting = [draw.randint(2, draw.choice((20, 128, 512))) for _ in range(draw.randint(1, 60))]
    most, tokens = draw.randint(1, 40), draw.randint(100, 4096)
    layout = chosen(waiting, Packing(LENGTHS, most, tokens))
    assert sum(map(len, layout.rows)) <= most
    assert len(layout.rows) == 1 or (layout.tokens <= tokens and len(layout.rows) <= MAX_ROWS)
