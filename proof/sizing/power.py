"""
How many restarts of which size a claim needs on a machine as noisy as the pilot found it.

Contrasts are drawn from a normal law with the pilot's covariance, enlarged to its upper 80 % bound:
the plain estimate would under-power half of the plans. A plan is enough when all its statistics
together come out inside their margins as often as asked, with the two models equal, and the
delayed arm is told apart in the same run: a claim that holds in a run that is void is no claim.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from scipy.stats import chi2

from command import BadInput
from proof.evidence.statistics import Matrix, t_quantile
from proof.plans.plan import FEWEST_RESTARTS, Level, Plan
from proof.sizing.pilot import Pilot, PilotLevel

DRAWS = 4000
# What the power of telling the delayed arm apart is called.
CONTROL = "the delayed arm told apart"
RESTARTS = range(FEWEST_RESTARTS, 49, 4)
# A level's size in the plan, in multiples of its size in the pilot.
SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)


@dataclass(frozen=True)
class SampleSize:
    """A size that was considered."""

    restarts: int
    sizes: Mapping[str, int]
    minutes: float
    power: float
    """That all statistics come out inside their margins and the delayed arm is told apart, the
    models being equal.
    """
    power_at_quarter: float
    """The same with every ratio a quarter of its margin away."""
    alone: Mapping[str, float]
    """Power of each statistic by itself, and of telling the delayed arm apart at each level."""


def size_plan(
    pilot: Pilot, template: Plan, power: float, minutes: float, floor_us: float = 0.0
) -> tuple[Plan, SampleSize]:
    """The template's claim at the size with the fewest minutes; BadInput if it cannot be afforded,
    saying what could.

    `floor_us`: no margin is tighter than so many microseconds.
    """
    plan = _with_gains_and_floor(pilot, template, floor_us)
    offers = [
        offer
        for restarts in RESTARTS
        if (offer := _offer(pilot, plan, restarts, power)) is not None
    ]
    good = [offer for offer in offers if offer.power >= power]
    best = min(good, key=lambda o: o.minutes) if good else max(offers, key=lambda o: o.power)
    if not good or best.minutes > minutes:
        weakest = min(best.alone, key=best.alone.__getitem__)
        need = (
            f"{best.minutes:.0f} minutes"
            if good
            else (
                f"more than {best.minutes:.0f} minutes, which give a power of {best.power:.0%} only"
            )
        )
        raise BadInput(
            f"This claim needs {need}; {minutes:.0f} can be spent. What is hardest to show is"
            f" {weakest} ({best.alone[weakest]:.0%} alone): widen its margin, leave it out, or"
            " allow more --minutes."
        )
    levels = tuple(
        _sized(level, pilot.levels[level.name].level, best.sizes[level.name])
        for level in plan.levels
    )
    digest = hashlib.sha256(pilot.to_json().encode()).hexdigest()
    capacity = template.capacity_per_s or pilot.plan.capacity_per_s
    texts = (
        hashlib.sha256(template.texts.read_bytes()).hexdigest()
        if template.texts.is_file()
        else None
    )
    return (
        replace(
            plan,
            restarts=best.restarts,
            levels=levels,
            pilot=digest,
            capacity_per_s=capacity,
            texts_sha256=texts,
        ),
        best,
    )


def _with_gains_and_floor(pilot: Pilot, template: Plan, floor_us: float) -> Plan:
    levels = []
    for level in template.levels:
        if level.name not in pilot.levels:
            raise BadInput(
                f"{template.path} claims something at level {level.name}, where the pilot measured"
                f" nothing; it has {', '.join(pilot.levels)}."
            )
        noise = pilot.levels[level.name].noise
        margins = {
            m: {s: round(max(v, floor_us / noise[m, s].reference_us), 6) for s, v in of.items()}
            for m, of in level.margins.items()
        }
        gains = (
            {
                m: {s: math.floor(100 * (noise[m, s].gain or 1.0)) / 100 for s in of}
                for m, of in level.margins.items()
            }
            if level.kind == "switchback"
            else {}
        )
        levels.append(replace(level, margins=margins, gains=gains))
    return replace(template, levels=tuple(levels))


def _offer(pilot: Pilot, plan: Plan, restarts: int, power: float) -> SampleSize | None:
    """The smallest sizes with which `restarts` restarts are enough, each level sharing in the joint
    power; the largest if none is.
    """
    each = power ** (1 / len(plan.levels))
    sizes = {}
    for level in plan.levels:
        powers = {size: _power(pilot, plan, [(level, size)], restarts)[0] for size in SIZES}
        enough = [size for size in SIZES if powers[size] >= each]
        sizes[level.name] = enough[0] if enough else SIZES[-1]
    while True:
        joint, alone = _power(
            pilot, plan, [(level, sizes[level.name]) for level in plan.levels], restarts
        )
        larger = [name for name, size in sizes.items() if size != SIZES[-1]]
        if joint >= power or not larger:
            break
        weakest = min(
            larger, key=lambda name: min(v for k, v in alone.items() if k.startswith(f"{name} "))
        )
        sizes[weakest] = SIZES[SIZES.index(sizes[weakest]) + 1]
    quarter, _ = _power(
        pilot, plan, [(level, sizes[level.name]) for level in plan.levels], restarts, quarter=True
    )
    seconds = pilot.start_s + sum(
        pilot.levels[level.name].seconds * sizes[level.name] for level in plan.levels
    )
    return SampleSize(restarts, sizes, restarts * seconds / 60, joint, quarter, alone)


def _power(
    pilot: Pilot,
    plan: Plan,
    sized: Sequence[tuple[Level, int]],
    restarts: int,
    quarter: bool = False,
) -> tuple[float, dict[str, float]]:
    """(joint power, power of each statistic alone) over simulated runs."""
    parts = [
        _covariance(pilot, pilot.levels[level.name], [(m, s) for m, s, _ in level.claimed], size)
        for level, size in sized
    ]
    names = [f"{level.name} {m} {s}" for level, _ in sized for m, s, _ in level.claimed]
    bounds = np.array([math.log1p(margin) for level, _ in sized for _, _, margin in level.claimed])
    root = np.zeros((len(bounds), len(bounds)))
    at = 0
    for part in parts:
        values, vectors = np.linalg.eigh(part)
        root[at : at + len(part), at : at + len(part)] = vectors * np.sqrt(np.clip(values, 0, None))
        at += len(part)
    rng = np.random.default_rng(restarts)
    draws = rng.standard_normal((DRAWS, restarts, len(bounds))) @ root.T + (
        bounds / 4 if quarter else 0.0
    )
    reach = t_quantile(0.95, restarts - 2) * draws.std(axis=1, ddof=1) / math.sqrt(restarts)
    inside = np.abs(draws.mean(axis=1)) + reach < bounds
    alone = dict(zip(names, inside.mean(axis=0).tolist(), strict=True))
    good = inside.all(axis=1)
    for level, size in sized:
        detected = _detected(pilot, plan, level, size, restarts, rng)
        alone[f"{level.name} {CONTROL}"] = float(detected.mean())
        good &= detected
    return float(good.mean()), alone


def _detected(
    pilot: Pilot, plan: Plan, level: Level, size: int, restarts: int, rng: np.random.Generator
) -> npt.NDArray[np.bool_]:
    """(DRAWS,): whether the delayed arm is seen beyond its margin, by one statistic at least, as
    the judge asks it.
    """
    seen_in = plan.control_statistics(level)
    # One copy against one, not two against two: twice the variance. In control tuples, a quarter of
    # all, three times that of the rows.
    covariance = _covariance(
        pilot,
        pilot.levels[level.name],
        [item[:2] for item in seen_in],
        size,
        between=2,
        within=6 if level.tuples else 2,
    )
    values, vectors = np.linalg.eigh(covariance)
    gains = [level.gains.get(metric, {}).get(name, 1.0) for metric, name, _ in seen_in]
    effect = np.array(gains) * math.log1p(plan.delay)
    draws = (
        rng.standard_normal((DRAWS, restarts, len(seen_in)))
        @ (vectors * np.sqrt(np.clip(values, 0, None))).T
        + effect
    )
    reach = (
        t_quantile(1 - 0.05 / len(seen_in), restarts - 2)
        * draws.std(axis=1, ddof=1)
        / math.sqrt(restarts)
    )
    seen: npt.NDArray[np.bool_] = (
        draws.mean(axis=1) - reach > [math.log1p(margin) for *_, margin in seen_in]
    ).any(axis=1)
    return seen


def _covariance(
    pilot: Pilot,
    found: PilotLevel,
    keys: Sequence[tuple[str, str]],
    size: int,
    between: float = 1,
    within: float = 1,
) -> Matrix:
    """(q, q) of one restart's contrasts: what differs from start to start stays, what a restart's
    rows explain shrinks with them.
    """
    chosen = [found.keys.index(key) for key in keys]
    total = found.contrasts.T @ found.contrasts / (pilot.restarts - 2)
    total, of_rows = total[np.ix_(chosen, chosen)], found.within[np.ix_(chosen, chosen)]
    values, vectors = np.linalg.eigh(total - of_rows)
    of_starts = (vectors * np.clip(values, 0, None)) @ vectors.T
    enlarged = (pilot.restarts - 1) / float(chi2.ppf(0.2, pilot.restarts - 1))
    covariance: Matrix = (between * of_starts + within * of_rows / size) * enlarged
    return covariance


def _sized(level: Level, pilot: Level, size: int) -> Level:
    if level.kind == "switchback":
        return replace(level, slice_requests=pilot.slice_requests, sets=pilot.sets * size)
    if level.kind == "capacity":
        return replace(level, slice_s=pilot.slice_s, sets=pilot.sets * size)
    return replace(level, tuples=pilot.tuples * size)


def describe(pilot: Pilot, offer: SampleSize) -> str:
    """The pilot's noise and the size that was found; for a terminal."""
    lines = [f"pilot: {pilot.restarts} restarts, a start takes {pilot.start_s:.1f} s"]
    for name, level in pilot.levels.items():
        lines.append(f"level {name}: {level.seconds:.1f} s a restart")
        for (metric, statistic), noise in level.noise.items():
            gain = "" if noise.gain is None else f", gain {noise.gain:.2f}"
            lines.append(
                f"  {metric:<13} {statistic:<5} position effect {noise.position_effect:.2%},"
                f" instance sd {noise.instance_sd:.2%}, w {noise.w:.1%}, autocorrelation"
                f" {noise.autocorrelation:.2f}{gain}"
            )
    sizes = ", ".join(f"{name} × {size}" for name, size in offer.sizes.items())
    lines.append(
        f"plan: {offer.restarts} restarts, {sizes}: {offer.minutes:.0f} minutes, power"
        f" {offer.power:.0%} at ratio 1, {offer.power_at_quarter:.0%} at a quarter of every margin"
    )
    return "\n".join(lines)
