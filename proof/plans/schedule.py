"""
Every request of a restart, as a plan's seed has it: who is asked what, in which order, when.

The load generator walks through it and the judge holds the rows against it, so it must come out
alike for ever: everything is drawn from NumPy's RandomState, whose stream is frozen (NEP 19).

    unloaded     one request in flight, a pause after each answer       warm-up, tuples, closing
        block
    mixed        Poisson arrivals, arms interleaved                     warm-up, tuples
    switchback   Poisson arrivals, one arm a slice; the arms of a set replay the same gaps and texts
    capacity     a fixed number in flight, one arm a slice; how many are answered is what is
                 measured
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from proof.plans.counterbalance import balanced_orders
from proof.plans.plan import Level, Plan

Integers = npt.NDArray[np.int64]

# What the column `slice` says at the levels unloaded and mixed; at the others slices are counted.
WARM_UP, PLAIN, CONTROL, CLOSING = -1, 0, 1, 2

# Control tuples come in blocks of so many, one block in four, so that under load they seldom meet
# plain ones in the queue.
BLOCK = 8

# Sent before each slice, one at a time, and not recorded: the arm's caches and the queue are as
# they will be.
SLICE_WARM_UP = 20


@dataclass(frozen=True)
class Schedule:
    """One level of one restart; arrays with an entry a request, in the order they are due."""

    slice: Integers
    tuple: Integers
    place: Integers
    arm: Integers
    """Index into the plan's arms."""
    text: Integers
    pause: npt.NDArray[np.float64]
    """`unloaded`: the wait after the answer, in service times. Elsewhere zero."""
    offset_ns: Integers
    """`mixed` and `switchback`: when it is due, after the start of its slice (of the level, for
    `mixed`). Elsewhere zero.
    """

    def __len__(self) -> int:
        return len(self.arm)


def load_order(plan: Plan, slot: int) -> list[int]:
    """Arms in the order they are loaded in that restart: over every four each arm has each position
    once; controls come last.
    """
    arms = plan.claimed_arms
    orders = balanced_orders(len(arms), len(arms), _random(plan, "load", slot // len(arms)))
    return [arms[i] for i in orders[slot % len(arms)]] + plan.indices("control")


def load_positions(plan: Plan, slot: int) -> dict[int, int]:
    """Where each arm was loaded; the delayed arm is no copy of its own but the second reference."""
    positions = {arm: position for position, arm in enumerate(load_order(plan, slot))}
    return positions | {
        arm: positions[plan.indices("reference")[1]] for arm in plan.indices("delayed")
    }


def build_schedule(plan: Plan, level: Level, slot: int, texts: int) -> Schedule:
    """The requests of one level in the restart that takes `slot`, with `texts` texts to choose
    from.
    """
    if level.kind == "switchback":
        return _switchback(plan, level, slot, texts)
    if level.kind == "capacity":
        return _capacity(plan, level, slot)
    return _interleaved(plan, level, slot, texts)


def slice_texts(
    plan: Plan, level: Level, slot: int, number: int, texts: int, count: int
) -> Integers:
    """The first `count` texts that every arm of a set is asked at the level `capacity`."""
    return _draw(texts, count, _random(plan, level.name, slot, "set", number))


def _interleaved(plan: Plan, level: Level, slot: int, texts: int) -> Schedule:
    rng = _random(plan, level.name, slot)
    claimed = np.array(plan.claimed_arms)
    # Warming up goes through all texts, so that no shape is met first while it is measured.
    warming = claimed[
        balanced_orders(len(claimed), level.warm_up_tuples, rng)[: level.warm_up_tuples]
    ]
    measured = claimed[balanced_orders(len(claimed), level.tuples, rng)[: level.tuples]]
    control = (
        _control_tuples(level.tuples, rng)
        if plan.indices("delayed")
        else np.zeros(level.tuples, bool)
    )
    for delayed in plan.indices("delayed"):
        again = plan.indices("reference")[1]
        measured[control] = np.where(measured[control] == again, delayed, measured[control])
    blocks = [
        (np.full(len(warming), WARM_UP), warming),
        (np.where(control, CONTROL, PLAIN), measured),
    ]
    if level.kind == "unloaded" and plan.indices("control"):
        everyone = np.array([*claimed, *plan.indices("control")])
        count = max(1, level.tuples // 4)
        blocks.append(
            (np.full(count, CLOSING), everyone[balanced_orders(len(everyone), count, rng)[:count]])
        )

    slices = np.concatenate([np.repeat(kinds, orders.shape[1]) for kinds, orders in blocks])
    widths = np.concatenate([np.full(len(orders), orders.shape[1]) for _, orders in blocks])
    tuples = np.repeat(np.arange(len(widths)), widths)
    chosen = np.concatenate(
        [np.arange(len(warming)) % texts, _draw(texts, len(widths) - len(warming), rng)]
    )
    count = len(tuples)
    open_loop = level.kind == "mixed"
    return Schedule(
        slice=slices,
        tuple=tuples,
        place=np.arange(count) - np.repeat(np.cumsum(widths) - widths, widths),
        arm=np.concatenate([orders.ravel() for _, orders in blocks]),
        text=chosen[tuples],
        pause=np.zeros(count) if open_loop else 0.5 + rng.random_sample(count),
        offset_ns=(
            _arrivals(level.rate_per_s(plan), count, rng)
            if open_loop
            else np.zeros(count, np.int64)
        ),
    )


def _switchback(plan: Plan, level: Level, slot: int, texts: int) -> Schedule:
    """Sets of slices, one slice an arm; the delayed arm has slices of its own."""
    orders = _slice_orders(plan, level, slot)
    size = level.slice_requests
    parts = []
    for number in range(len(orders)):
        rng = _random(plan, level.name, slot, "set", number)
        parts.append((_draw(texts, size, rng), _arrivals(level.rate_per_s(plan), size, rng)))
    arms = orders.size
    return Schedule(
        slice=np.repeat(np.arange(arms), size),
        tuple=np.concatenate(
            [
                np.tile(number * size + np.arange(size), orders.shape[1])
                for number in range(len(orders))
            ]
        ),
        place=np.tile(np.repeat(np.arange(orders.shape[1]), size), len(orders)),
        arm=np.repeat(orders.ravel(), size),
        text=np.concatenate([np.tile(chosen, orders.shape[1]) for chosen, _ in parts]),
        pause=np.zeros(arms * size),
        offset_ns=np.concatenate([np.tile(due, orders.shape[1]) for _, due in parts]),
    )


def _capacity(plan: Plan, level: Level, slot: int) -> Schedule:
    """One entry a slice: how many requests it holds is known when it is over."""
    orders = _slice_orders(plan, level, slot)
    count = orders.size
    nothing = np.zeros(count, np.int64)
    return Schedule(
        slice=np.arange(count),
        tuple=nothing,
        place=np.tile(np.arange(orders.shape[1]), len(orders)),
        arm=orders.ravel(),
        text=nothing,
        pause=np.zeros(count),
        offset_ns=nothing,
    )


def _slice_orders(plan: Plan, level: Level, slot: int) -> Integers:
    """Which arm has which slice, (sets, arms); balanced over the sets of all restarts."""
    arms = np.array([*plan.claimed_arms, *plan.indices("delayed")])
    design = len(balanced_orders(len(arms), 1, np.random.RandomState(0)))
    rows = []
    for number in range(slot * level.sets, (slot + 1) * level.sets):
        orders = balanced_orders(
            len(arms), 1, _random(plan, level.name, "slices", number // design)
        )
        rows.append(arms[orders[number % design]])
    return np.array(rows)


def _control_tuples(tuples: int, rng: np.random.RandomState) -> npt.NDArray[np.bool_]:
    """A seeded quarter: of every four blocks one; what does not fill four blocks holds none."""
    groups = tuples // (4 * BLOCK)
    chosen = np.floor(rng.random_sample(groups) * 4).astype(np.int64)
    control = np.zeros(tuples, bool)
    for group, block in enumerate(chosen):
        begin = (4 * group + int(block)) * BLOCK
        control[begin : begin + BLOCK] = True
    return control


def _draw(texts: int, count: int, rng: np.random.RandomState) -> Integers:
    return np.floor(rng.random_sample(count) * texts).astype(np.int64)


def _arrivals(rate_per_s: float, count: int, rng: np.random.RandomState) -> Integers:
    """Poisson arrivals: the sums of exponential gaps, in nanoseconds."""
    gaps = -np.log1p(-rng.random_sample(count)) / rate_per_s
    return np.rint(np.cumsum(gaps) * 1e9).astype(np.int64)


def _random(plan: Plan, *what: object) -> np.random.RandomState:
    seed = hashlib.sha256(" ".join(map(str, (plan.seed, *what))).encode()).digest()
    return np.random.RandomState(np.frombuffer(seed, "<u4"))
