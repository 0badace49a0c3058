"""
Simulated slices: how often the adjusted end-to-end time errs, and how often it decides.

A slice's log latency ℓ and log dilation z come from a machine whose speed changes from slice to
slice. The judge sees the mean over slices of ℓ − β·z. Worlds differ in what could break that: noise
that is not normal, a β that is wrong, a copy that is dilated more than the others.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from benchmarks.proving.noise import INSTANCE_SD, POSITION
from proof.evidence.statistics import Estimate, adjusted_contrast
from proof.plans.counterbalance import balanced_orders
from proof.verdict.contrasts import CONFIDENCE

Array = npt.NDArray[np.float64]

MARGIN = 0.02
"""Margin of service time; end to end it is widened by the gain."""
GAIN = 1.8
"""Change of log latency for a change of log service time, at a busy share of one half."""
BETA = 1.9
"""Change of a slice's log latency for a change of its log dilation, as pilots found it."""
CONTRAST = np.array([-0.5, -0.5, 0.5, 0.5])
BOUND = GAIN * math.log1p(MARGIN)
"""Margin of the adjusted time, on the log scale."""
DILATION_BOUND = math.log1p(MARGIN)
"""Margin of the dilation, on the log scale."""


@dataclass(frozen=True)
class Scatter:
    """How much slices differ, as standard deviations of logs."""

    name: str
    sets: int
    dilation: float
    rest: float
    """What remains of ℓ when the dilation's part is taken out."""


MINI = Scatter("mini", sets=24, dilation=0.28, rest=0.16)
BASE = Scatter("base", sets=16, dilation=0.18, rest=0.11)

Law = Callable[[np.random.Generator, tuple[int, ...]], Array]


def _normal(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    return rng.standard_normal(shape)


def _heavy(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Return Student's t with 3 degrees of freedom, at a standard deviation of 1."""
    return rng.standard_t(3, shape) / math.sqrt(3)


def _bursts(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Return noise whose tenth slices are hit by a neighbour's burst, at a deviation near 1."""
    hit = rng.random(shape) < 0.1
    return 0.6 * rng.standard_normal(shape) + 2.0 * hit * rng.exponential(1.0, shape)


@dataclass(frozen=True)
class SliceWorld:
    """One way in which slices scatter, and what the plan has wrong about it."""

    name: str
    law: Law = _normal
    beta_error: float = 0.0
    """Relative error of the plan's β."""
    dilated_copy: float = 0.0
    """Log by which the dilation of one candidate copy is larger."""
    waits: float = 0.0
    """Log by which the dilation of both candidate copies is larger, because they wait."""


SLICE_WORLDS = (
    SliceWorld("normal"),
    SliceWorld("heavy tails", _heavy),
    SliceWorld("bursts", _bursts),
    SliceWorld("β 30 % too small", beta_error=-0.3),
    SliceWorld("β 30 % too large", beta_error=0.3),
    SliceWorld("heavy tails, β 30 % too small", _heavy, beta_error=-0.3),
    SliceWorld("bursts, β 30 % too large", _bursts, beta_error=0.3),
    SliceWorld("one copy dilated by ½ margin", dilated_copy=DILATION_BOUND / 2),
    SliceWorld(
        "one copy dilated by ½ margin, heavy tails", _heavy, dilated_copy=DILATION_BOUND / 2
    ),
)
WAITING = SliceWorld("candidate waits for the margin", waits=DILATION_BOUND)


@dataclass(frozen=True)
class SliceRates:
    """How often simulated runs were equivalent."""

    world: str
    restarts: int
    runs: int
    adjusted: float
    """Share whose adjusted time is inside its margin."""
    unadjusted: float
    """Share whose time without the adjustment is inside the same margin."""
    claimed: float
    """Share in which the dilation is inside its margin too: what a plan must claim."""


def wrong_rates(
    runs: int, sizes: Sequence[int] = (8, 12, 16), worlds: Sequence[SliceWorld] = SLICE_WORLDS
) -> Iterator[SliceRates]:
    """Yield the rates of "equivalent" with the adjusted time exactly on its margin."""
    for world, restarts in itertools.product(worlds, sizes):
        yield _rates(world, MINI, restarts, runs, shift=BOUND)


def waiting_rates(runs: int, sizes: Sequence[int] = (8, 12, 16)) -> Iterator[SliceRates]:
    """Yield the rates for a candidate that computes the same and waits for the whole margin."""
    for restarts in sizes:
        yield _rates(WAITING, BASE, restarts, runs, shift=0.0)


def right_rates(
    runs: int, sizes: Sequence[int] = (8, 12, 16, 24), scatters: Sequence[Scatter] = (MINI, BASE)
) -> Iterator[tuple[Scatter, SliceRates]]:
    """Yield the rates of "equivalent" for equal models, by how much slices differ."""
    for scatter, restarts in itertools.product(scatters, sizes):
        yield scatter, _rates(SLICE_WORLDS[0], scatter, restarts, runs, shift=0.0)


def _rates(
    world: SliceWorld, scatter: Scatter, restarts: int, runs: int, shift: float
) -> SliceRates:
    """Return the rates over runs whose candidate is `shift` slower and faster in turn."""
    rng = np.random.default_rng([restarts, sum(world.name.encode()), scatter.sets])
    adjusted = unadjusted = claimed = 0
    for run in range(runs):
        y, without, dilation, positions = _simulate(
            world, scatter, restarts, shift if run % 2 else -shift, rng
        )
        is_adjusted = _is_within(adjusted_contrast(y, positions, CONTRAST), BOUND)
        adjusted += is_adjusted
        unadjusted += _is_within(adjusted_contrast(without, positions, CONTRAST), BOUND)
        claimed += is_adjusted and _is_within(
            adjusted_contrast(dilation, positions, CONTRAST), DILATION_BOUND
        )
    return SliceRates(
        world.name, restarts, runs, adjusted / runs, unadjusted / runs, claimed / runs
    )


def _simulate(
    world: SliceWorld, scatter: Scatter, restarts: int, shift: float, rng: np.random.Generator
) -> tuple[Array, Array, Array, npt.NDArray[np.int64]]:
    """Return the adjusted and unadjusted time and the dilation, (K, 4) each, with positions."""
    orders = balanced_orders(4, restarts, np.random.RandomState(int(rng.integers(2**31))))
    positions = np.argsort(orders[:restarts], axis=1)
    shape = (restarts, scatter.sets, 4)
    z = scatter.dilation * world.law(rng, shape)
    z[:, :, 3] += world.dilated_copy
    z[:, :, 2:] += world.waits
    rest = scatter.rest * world.law(rng, shape)
    copies = INSTANCE_SD * rng.standard_normal((restarts, 4)) + GAIN * POSITION[positions]
    latency = copies[:, None, :] + BETA * z + rest + np.array([0.0, 0.0, shift, shift])
    beta = BETA * (1 + world.beta_error)
    return (latency - beta * z).mean(axis=1), latency.mean(axis=1), z.mean(axis=1), positions


def _is_within(estimate: Estimate, bound: float) -> bool:
    low, high = estimate.interval(CONFIDENCE)
    return -bound < low and high < bound


def table(runs: int) -> tuple[str, float]:
    """Return the Markdown tables of all worlds, and the largest wrong rate among them."""
    wrong, waiting = list(wrong_rates(runs)), list(waiting_rates(runs))
    lines = [
        (
            f'Short slices, adjusted for dilation: wrong "equivalent" with the truth exactly on a'
            f" margin of ±{MARGIN:.0%} × gain {GAIN} ({MINI.sets} sets; β {BETA}; a slice's log"
            f" dilation scatters by {MINI.dilation:.0%}, the rest by {MINI.rest:.0%}):"
        ),
        "",
        "| slices | K = 8 | 12 | 16 |",
        "|---|--:|--:|--:|",
    ]
    for name, of_world in itertools.groupby(wrong, key=lambda rates: rates.world):
        cells = " | ".join(f"{each.adjusted:.2%}" for each in of_world)
        lines.append(f"| {name} | {cells} |")
    lines += [
        "",
        (
            f"{runs:,} runs per cell. A candidate that computes the same but waits for"
            f" {MARGIN:.0%} of each batch is inside the adjusted margin in"
            f" {', '.join(f'{each.adjusted:.0%}' for each in waiting)} of the runs. Together with"
            " the dilation, which a plan must claim too, it is in"
            f" {', '.join(f'{each.claimed:.1%}' for each in waiting)} (K = 8, 12, 16)."
        ),
        "",
        f'Right "equivalent" of equal models within ±{MARGIN:.0%} × gain {GAIN}:',
        "",
        "| slices | K = 8 | 12 | 16 | 24 |",
        "|---|--:|--:|--:|--:|",
    ]
    right = list(right_rates(max(100, runs // 10)))
    for scatter, pairs in itertools.groupby(right, key=lambda pair: pair[0]):
        rates = [each for _, each in pairs]
        rows: Mapping[str, list[float]] = {
            "adjusted": [each.adjusted for each in rates],
            "not adjusted": [each.unadjusted for each in rates],
        }
        for label, shares in rows.items():
            cells = " | ".join(f"{share:.0%}" for share in shares)
            lines.append(f"| {scatter.name}, {label} | {cells} |")
    worst = max([each.adjusted for each in wrong] + [each.claimed for each in waiting])
    return "\n".join(lines), worst
