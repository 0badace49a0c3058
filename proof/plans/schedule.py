"""
Every request of a restart, drawn from the plan's seed: which text to which arm, in which order,
at which time.

The load generator sends the schedule and the judge compares the rows with it. Both must draw the
same for years, so everything comes from NumPy's RandomState, whose stream is frozen (NEP 19), and a
plan names the version of its schedule.

    unloaded     one request in flight, a pause after each answer; warm-up, blocks, closing blocks
    mixed        Poisson arrivals, arms interleaved; warm-up, blocks
    switchback   Poisson arrivals, one arm in each slice; the arms of a set replay the same gaps
                 and texts
    capacity     a fixed number in flight, one arm in each slice; the number of answers is measured
    repeat       one request in flight; groups of new texts, which are sent several times in turn

    version 1    the delayed arm is always the second reference; rates in percent of a capacity
    version 2    it is each copy in turn, so all copies are used equally often; rates of the level's
                 own, by the share of time in which the engine is busy; controls are warmed up too
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from proof.plans.counterbalance import balanced_orders
from proof.plans.plan import CONTROL_RUN, REPEAT_GROUP, Level, Plan

Integers = npt.NDArray[np.int64]

# Values of the column `slice_id` at the levels unloaded and mixed: the kind of the block.
WARM_UP, PLAIN, CONTROL, CLOSING = -1, 0, 1, 2

# Values of `slice_id` at the level repeat, apart from WARM_UP.
FIRST, REPEATED = 0, 1

CLOSED_LOOP_TEXTS = 4096
"""Texts drawn for a slice of a closed loop, which goes through them again and again."""
SLICE_WARM_UP = 2
"""Unrecorded requests before each slice, one at a time: they fill the processor's caches.

The shapes of all batches are warm already.
"""


@dataclass(frozen=True)
class Schedule:
    """One level of one restart: arrays with an entry for each request, in the order of sending."""

    slice_id: Integers
    """Kind of the block (WARM_UP to CLOSING), or the number of the slice."""
    block_id: Integers
    """Number of the block, or of the request in its set of slices."""
    position: Integers
    """Position of the request in its block, or of the slice in its set."""
    arm: Integers
    """Index into the plan's arms."""
    copy: Integers
    """Index of the arm whose loaded copy answers: the arm itself, or the one that is delayed."""
    text: Integers
    """Index into the plan's texts."""
    pause: npt.NDArray[np.float64]
    """`unloaded`, `repeat`: pause after the answer, in service times. Elsewhere zero."""
    offset_ns: Integers
    """`mixed`, `switchback`: scheduled time after the start of the level or of the slice.
    Elsewhere zero.
    """

    def __len__(self) -> int:
        return len(self.arm)


def load_order(plan: Plan, slot: int) -> list[int]:
    """Return the arms in the order of loading in the restart that takes `slot`.

    Over every four restarts each arm has each position once; controls are loaded last.
    """
    arms = plan.claimed_arms
    orders = balanced_orders(len(arms), len(arms), _random(plan, "load", slot // len(arms)))
    return [arms[i] for i in orders[slot % len(arms)]] + plan.indices("control")


def load_positions(plan: Plan, slot: int) -> dict[int, int]:
    """Return the position of each loaded copy in the load order, by its arm."""
    return {arm: position for position, arm in enumerate(load_order(plan, slot))}


def build_schedule(plan: Plan, level: Level, slot: int, texts: int) -> Schedule:
    """Return the requests of one level in the restart that takes `slot`.

    `texts` is the number of texts to choose from.
    """
    if level.kind == "switchback":
        return _switchback(plan, level, slot, texts)
    if level.kind == "capacity":
        return _capacity(plan, level, slot)
    if level.kind == "repeat":
        return _repeats(plan, level, slot, texts)
    return _interleaved(plan, level, slot, texts)


def slice_texts(
    plan: Plan, level: Level, slot: int, number: int, texts: int, count: int
) -> Integers:
    """Return the first `count` texts of a set of slices at the level `capacity`.

    Every arm of the set gets the same ones.
    """
    return _draw(texts, count, _random(plan, level.name, slot, "set", number))


def _interleaved(plan: Plan, level: Level, slot: int, texts: int) -> Schedule:
    rng = _random(plan, level.name, slot)
    groups = _block_orders(plan, level, slot, rng)
    kinds = np.concatenate([kinds for kinds, *_ in groups])
    sizes = np.concatenate([np.full(len(orders), orders.shape[1]) for _, orders, _ in groups])
    block_ids = np.repeat(np.arange(len(sizes)), sizes)
    # The warm-up goes through all texts, so that no shape is new while it is measured.
    warm_up = int((kinds == WARM_UP).sum())
    chosen = np.concatenate([np.arange(warm_up) % texts, _draw(texts, len(sizes) - warm_up, rng)])
    count = len(block_ids)
    open_loop = level.kind == "mixed"
    if open_loop:
        pause = np.zeros(count)
        offset_ns = _arrivals(level.arrivals_per_s(plan), count, rng)
    else:
        pause = 0.5 + rng.random_sample(count)
        offset_ns = np.zeros(count, np.int64)
    return Schedule(
        slice_id=np.repeat(kinds, sizes),
        block_id=block_ids,
        position=np.arange(count) - np.repeat(np.cumsum(sizes) - sizes, sizes),
        arm=np.concatenate([orders.ravel() for _, orders, _ in groups]),
        copy=np.concatenate([copies.ravel() for *_, copies in groups]),
        text=chosen[block_ids],
        pause=pause,
        offset_ns=offset_ns,
    )


def _block_orders(
    plan: Plan, level: Level, slot: int, rng: np.random.RandomState
) -> list[tuple[Integers, Integers, Integers]]:
    """Return kinds (blocks,), arms and copies (blocks, arms in order) of each group of blocks."""
    claimed = np.array(plan.claimed_arms)
    everyone = np.array([*claimed, *plan.indices("control")])
    has_closing = level.kind == "unloaded" and len(everyone) > len(claimed)
    warmed_up = everyone if has_closing and plan.schedule_version > 1 else claimed
    warm_up = _orders(warmed_up, level.warm_up_tuples, rng)
    copies = _orders(claimed, level.tuples, rng)
    measured, is_control = copies.copy(), np.zeros(level.tuples, bool)
    for delayed in plan.indices("delayed"):
        is_control = _control_blocks(level.tuples, rng)
        # One copy for a whole run: a request that shares a batch with a delayed one is as slow, and
        # this way those of the plain blocks seldom do.
        runs = int(is_control.sum()) // CONTROL_RUN
        slowed = np.repeat(_delayed_copies(plan, runs, slot * runs), CONTROL_RUN)
        orders = copies[is_control]
        measured[is_control] = np.where(orders == slowed[:, None], delayed, orders)
    groups = [
        (np.full(len(warm_up), WARM_UP), warm_up, warm_up),
        (np.where(is_control, CONTROL, PLAIN), measured, copies),
    ]
    if has_closing:
        count = max(1, level.tuples // 4)
        closing = _orders(everyone, count, rng)
        groups.append((np.full(count, CLOSING), closing, closing))
    return groups


def _orders(arms: Integers, count: int, rng: np.random.RandomState) -> Integers:
    """Return `count` balanced orders of these arms, (count, arms)."""
    return arms[balanced_orders(len(arms), count, rng)[:count]]


def _delayed_copies(plan: Plan, count: int, first: int = 0) -> Integers:
    """Return the copy that is delayed in each of `count` runs of control blocks, or sets."""
    if plan.schedule_version == 1:
        return np.full(count, plan.indices("reference")[1])
    claimed = np.array(plan.claimed_arms)
    return claimed[(first + np.arange(count)) % len(claimed)]


def _switchback(plan: Plan, level: Level, slot: int, texts: int) -> Schedule:
    """Return sets of slices, one slice for each arm; the delayed arm has slices of its own."""
    orders, copies = _slice_orders(plan, level, slot)
    sets, arms = orders.shape
    size = level.slice_requests
    block_ids, chosen, offsets_ns = [], [], []
    for number in range(sets):
        rng = _random(plan, level.name, slot, "set", number)
        block_ids.append(np.tile(number * size + np.arange(size), arms))
        chosen.append(np.tile(_draw(texts, size, rng), arms))
        offsets_ns.append(np.tile(_arrivals(level.arrivals_per_s(plan), size, rng), arms))
    return Schedule(
        slice_id=np.repeat(np.arange(orders.size), size),
        block_id=np.concatenate(block_ids),
        position=np.tile(np.repeat(np.arange(arms), size), sets),
        arm=np.repeat(orders.ravel(), size),
        copy=np.repeat(copies.ravel(), size),
        text=np.concatenate(chosen),
        pause=np.zeros(orders.size * size),
        offset_ns=np.concatenate(offsets_ns),
    )


def _capacity(plan: Plan, level: Level, slot: int) -> Schedule:
    """Return one entry for each slice: its number of requests is known when it is over."""
    orders, copies = _slice_orders(plan, level, slot)
    count = orders.size
    zeros = np.zeros(count, np.int64)
    return Schedule(
        slice_id=np.arange(count),
        block_id=zeros,
        position=np.tile(np.arange(orders.shape[1]), len(orders)),
        arm=orders.ravel(),
        copy=copies.ravel(),
        text=zeros,
        pause=np.zeros(count),
        offset_ns=zeros,
    )


def _repeats(plan: Plan, level: Level, slot: int, texts: int) -> Schedule:
    """Return blocks of one text each: once to every claimed arm, then again and again.

    Every round through the blocks of a group has orders of arms of its own, so that an arm's first
    answers and its repeats follow the same other arms and texts.
    """
    rng = _random(plan, level.name, slot)
    claimed, rounds = np.array(plan.claimed_arms), 1 + level.repeats
    arms, blocks = len(claimed), REPEAT_GROUP + level.texts
    count = blocks * rounds
    orders = claimed[balanced_orders(arms, count, rng)[:count]]
    # (groups, rounds, blocks of a group) in the order of sending.
    groups = blocks // REPEAT_GROUP
    grouped = np.arange(blocks).reshape(groups, 1, REPEAT_GROUP)
    block_ids = np.broadcast_to(grouped, (groups, rounds, REPEAT_GROUP)).reshape(count, 1)
    round_numbers = np.tile(np.repeat(np.arange(rounds), REPEAT_GROUP), groups).reshape(count, 1)
    kinds = np.where(round_numbers == 0, FIRST, REPEATED)
    kinds = np.where(block_ids < REPEAT_GROUP, WARM_UP, kinds)
    chosen = _draw(texts, blocks, rng)
    return Schedule(
        slice_id=np.repeat(kinds, arms),
        block_id=np.repeat(block_ids, arms),
        position=(round_numbers * arms + np.arange(arms)).ravel(),
        arm=orders.ravel(),
        copy=orders.ravel(),
        text=chosen[np.repeat(block_ids, arms)],
        pause=0.5 + rng.random_sample(count * arms),
        offset_ns=np.zeros(count * arms, np.int64),
    )


def _slice_orders(plan: Plan, level: Level, slot: int) -> tuple[Integers, Integers]:
    """Return arm and copy of each slice, (sets, arms); balanced over the sets of all restarts."""
    arms = np.array([*plan.claimed_arms, *plan.indices("delayed")])
    design = len(balanced_orders(len(arms), 1, np.random.RandomState(0)))
    rows = []
    first = slot * level.sets
    for number in range(first, first + level.sets):
        rng = _random(plan, level.name, "slices", number // design)
        rows.append(arms[balanced_orders(len(arms), 1, rng)[number % design]])
    orders = np.array(rows)
    copies = orders.copy()
    for delayed in plan.indices("delayed"):
        target = np.broadcast_to(_delayed_copies(plan, level.sets, first)[:, None], orders.shape)
        copies[orders == delayed] = target[orders == delayed]
    return orders, copies


def _control_blocks(blocks: int, rng: np.random.RandomState) -> npt.NDArray[np.bool_]:
    """Return a seeded quarter, (blocks,): one run of every four; a rest below four has none."""
    groups = blocks // (4 * CONTROL_RUN)
    chosen = np.floor(rng.random_sample(groups) * 4).astype(np.int64)
    control = np.zeros(blocks, bool)
    for group, run in enumerate(chosen):
        begin = (4 * group + int(run)) * CONTROL_RUN
        control[begin : begin + CONTROL_RUN] = True
    return control


def _draw(texts: int, count: int, rng: np.random.RandomState) -> Integers:
    return np.floor(rng.random_sample(count) * texts).astype(np.int64)


def _arrivals(rate_per_s: float, count: int, rng: np.random.RandomState) -> Integers:
    """Return Poisson arrivals: sums of exponential gaps, in nanoseconds."""
    gaps = -np.log1p(-rng.random_sample(count)) / rate_per_s
    return np.rint(np.cumsum(gaps) * 1e9).astype(np.int64)


def _random(plan: Plan, *purpose: object) -> np.random.RandomState:
    seed = hashlib.sha256(" ".join(map(str, (plan.seed, *purpose))).encode()).digest()
    return np.random.RandomState(np.frombuffer(seed, "<u4"))
