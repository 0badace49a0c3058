from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from command import BadInput, Unavailable
from proof.plan import Plan, read_plan
from proof.squares import balanced_orders, williams
from tests.proof.worlds import write_plan


@pytest.mark.parametrize("size", [2, 4, 6])
def test_in_a_williams_square_every_arm_has_each_place_and_follows_every_other_once(size: int) -> None:
    square = williams(size)
    for place in range(size):
        assert sorted(row[place] for row in square) == list(range(size))
    follows = Counter(pair for row in square for pair in pairwise(row))
    assert len(follows) == size * (size - 1)
    assert set(follows.values()) == {1}


@pytest.mark.parametrize("size", [3, 5])
def test_for_an_odd_number_of_arms_every_pair_occurs_twice(size: int) -> None:
    follows = Counter(pair for row in williams(size) for pair in pairwise(row))
    assert len(follows) == size * (size - 1)
    assert set(follows.values()) == {2}


def test_shuffling_keeps_the_balance() -> None:
    orders = balanced_orders(4, random.Random(3))
    assert all(sorted(row[place] for row in orders) == [0, 1, 2, 3] for place in range(4))


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return write_plan(tmp_path)


def test_over_four_restarts_each_arm_is_loaded_once_at_each_position_and_the_control_last(plan: Plan) -> None:
    for first in (0, 4):
        orders = [plan.load_order(slot) for slot in range(first, first + 4)]
        assert all(sorted(order[place] for order in orders) == [0, 1, 2, 3] for place in range(4))
        assert all(order[4] == 4 for order in orders)


def test_every_text_of_a_tuple_goes_once_to_every_arm(plan: Plan) -> None:
    sends = [send for send in plan.schedule(0, 2) if send.slice == 0]
    tuples: dict[int, list[int]] = {}
    for send in sends:
        tuples.setdefault(send.tuple, []).append(send.arm)
    assert len(tuples) == 60
    assert all(sorted(arms) == [0, 1, 2, 3] for arms in tuples.values())
    assert len({(send.tuple, send.text) for send in sends}) == 60
    places = Counter((send.arm, send.place) for send in sends)
    assert set(places.values()) == {15}


def test_the_control_runs_in_a_closing_block_of_a_quarter(plan: Plan) -> None:
    closing = [send for send in plan.schedule(0, 2) if send.slice == 1]
    assert Counter(send.arm for send in closing) == dict.fromkeys(range(5), 15)
    assert all(send.arm != 4 for send in plan.schedule(0, 2) if send.slice == 0)


def test_a_plan_always_sends_the_same_and_another_seed_does_not(plan: Plan, tmp_path: Path) -> None:
    assert list(plan.schedule(3, 2)) == list(plan.schedule(3, 2))
    path = tmp_path / "other.toml"
    path.write_text(plan.path.read_text().replace("seed = 7", "seed = 8"))
    assert list(read_plan(path).schedule(3, 2)) != list(plan.schedule(3, 2))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("restarts = 8", "restarts = 6", "no multiple of 4"),
        ("tuples = 60", "tuples = 2", "fewer than 4"),
        ("seed = 7", "", "'seed' is missing"),
        ("seed = 7", 'seed = "x"', "is not of type int"),
        ('role = "control"', 'role = "boss"', "role 'boss' is unknown"),
        ('name = "drbert-again"', 'name = "drbert"', "two arms are called 'drbert'"),
        ('name = "drbert-again", role = "candidate"', 'name = "x", role = "reference"', "3 arms are reference"),
        ('artifact = "c"', 'model = "c"', "needs either an artifact"),
        ('name = "bert-again", role = "reference", artifact = "a"', 'name = "x", role = "reference", artifact = "slow"', "name different artifacts"),
        ("seed = 7", 'seed = 7\nserver = { cpus = ["x"] }', "cpus holds 'x'"),
        ("p99 = 0.10", "p98 = 0.10", "has no key 'p98'"),
        ("p99 = 0.10", "p99 = 10.0", "is not between 0 and 1"),
        ('claim = "equivalence"', 'claim = "speed"', "claim 'speed' is unknown"),
        ("seed = 7", "seed = 7\ncolour = 1", "has no key 'colour'"),
        ("[level", "[[level", "is not TOML"),
    ],
)
def test_a_wrong_plan_is_refused_by_the_name_of_the_key(plan: Plan, old: str, new: str, words: str) -> None:
    text = plan.path.read_text()
    assert old in text
    plan.path.write_text(text.replace(old, new, 1))
    with pytest.raises(BadInput, match=words):
        read_plan(plan.path)


def test_a_missing_plan_says_where_some_are(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="examples/plans holds some"):
        read_plan(tmp_path / "plan.toml")


def test_the_plans_that_come_along_can_be_read() -> None:
    for path in Path("examples/plans").glob("*.toml"):
        assert len(read_plan(path).read_texts()) > 50
