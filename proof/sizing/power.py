"""
Number and size of the restarts that a claim needs on a machine with the pilot's noise.

Contrasts are drawn from a normal distribution with the pilot's covariance, enlarged to its upper
80 % bound: with the plain estimate half of the plans would lack power. A plan is large enough when
two equal models come out inside all margins as often as asked, and the delayed arm is detected in
the same run: a claim that holds in an invalid run is no claim.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from scipy.linalg import block_diag
from scipy.stats import chi2

from command import BadInput
from proof.evidence.statistics import Matrix, t_quantile
from proof.plans.plan import DILATION, FEWEST_RESTARTS, Level, Plan
from proof.sizing.pilot import Pilot, PilotLevel

DRAWS = 4000
"""Number of simulated runs."""
CONTROL = "the delayed arm detected"
"""How messages call the power of detecting the delayed arm."""
RESTARTS = range(FEWEST_RESTARTS, 49, 4)
"""Numbers of restarts that are considered."""
MOST_BUSY_DEVIATION = 0.1
"""Largest difference between a pilot's busy share and its level's; its gain is measured there."""
SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
"""Sizes of a level that are considered, in multiples of its size in the pilot."""


@dataclass(frozen=True)
class SampleSize:
    """A number of restarts with a size for each level, and the power that they have."""

    restarts: int
    sizes: Mapping[str, int]
    """Size of each level, in multiples of its size in the pilot."""
    minutes: float
    """Duration of the run."""
    power: float
    """Probability that equal models come out inside all margins and the delayed arm is detected."""
    power_at_quarter: float
    """The same with every ratio a quarter of its margin away from 1."""
    power_by_part: Mapping[str, float]
    """Power of each statistic by itself, and of detecting the delayed arm at each level."""


def size_plan(
    pilot: Pilot, template: Plan, power: float, minutes: float, floor_us: float = 0.0
) -> tuple[Plan, SampleSize]:
    """Return the template's claim at the size with the fewest minutes, and that size.

    `floor_us` is a lower bound for every margin, in microseconds. Raise BadInput if the size takes
    more than `minutes`; the message states what would be needed.
    """
    judged = replace(template, levels=template.judged_levels)
    plan = _with_gains_and_floor(pilot, judged, floor_us)
    sizes = [_smallest_size(pilot, plan, restarts, power) for restarts in RESTARTS]
    sufficient = [size for size in sizes if size.power >= power]
    if sufficient:
        best = min(sufficient, key=lambda size: size.minutes)
        need = f"{best.minutes:.0f} minutes"
    else:
        best = max(sizes, key=lambda size: size.power)
        need = f"more than {best.minutes:.0f} minutes, which give a power of {best.power:.0%} only"
    if not sufficient or best.minutes > minutes:
        weakest = min(best.power_by_part, key=best.power_by_part.__getitem__)
        raise BadInput(
            f"This claim needs {need}; {minutes:.0f} can be spent. What is hardest to show is"
            f" {weakest} ({best.power_by_part[weakest]:.0%} alone): widen its margin, leave it out,"
            " or allow more --minutes."
        )
    sized_levels = {
        level.name: _sized(level, pilot.levels[level.name].level, best.sizes[level.name])
        for level in plan.levels
    }
    levels = tuple(sized_levels.get(level.name, level) for level in template.levels)
    texts_sha256 = None
    if template.texts.is_file():
        texts_sha256 = hashlib.sha256(template.texts.read_bytes()).hexdigest()
    sized = replace(
        plan,
        restarts=best.restarts,
        levels=levels,
        pilot=hashlib.sha256(pilot.to_json().encode()).hexdigest(),
        capacity_per_s=template.capacity_per_s or pilot.plan.capacity_per_s,
        texts_sha256=texts_sha256,
    )
    return sized, best


def _with_gains_and_floor(pilot: Pilot, template: Plan, floor_us: float) -> Plan:
    """Return the plan with the pilot's gains, and no margin below the floor."""
    if template.schedule_version != pilot.plan.schedule_version:
        raise BadInput(
            f"{template.path} has schedule_version {template.schedule_version}, its pilot"
            f" {pilot.plan.schedule_version}; measure a pilot of the same version."
        )
    levels = []
    for level in template.levels:
        if level.name not in pilot.levels:
            raise BadInput(
                f"{template.path} claims something at level {level.name}, where the pilot measured"
                f" nothing; it has {', '.join(pilot.levels)}."
            )
        _check_busy_share(pilot.levels[level.name])
        noise = pilot.levels[level.name].noise
        margins: dict[str, dict[str, float]] = {}
        betas: dict[str, dict[str, float]] = {}
        gains: dict[str, dict[str, float]] = {}
        for metric, statistics in level.margins.items():
            for name, margin in statistics.items():
                floor = 0.0 if metric == DILATION else floor_us / noise[metric, name].reference_us
                margins.setdefault(metric, {})[name] = round(max(margin, floor), 6)
                beta = noise[metric, name].beta
                if beta is not None:
                    betas.setdefault(metric, {})[name] = beta
                if level.kind == "switchback" and metric != DILATION:
                    gain = noise[metric, name].gain or 1.0
                    gains.setdefault(metric, {})[name] = math.floor(100 * gain) / 100
        levels.append(replace(level, margins=margins, gains=gains, betas=betas))
    return replace(template, levels=tuple(levels))


def _check_busy_share(pilot: PilotLevel) -> None:
    """Raise BadInput if the pilot kept the engine busy for another share than the level's."""
    level, share = pilot.level, pilot.busy_share
    if abs(share - level.percent / 100) > MOST_BUSY_DEVIATION:
        raise BadInput(
            f"The pilot kept the engine busy for {share:.0%} of level {level.name}, which is to be"
            f" {level.percent} % ± {MOST_BUSY_DEVIATION:.0%}: rate_per_s = {level.rate_per_s:g}"
            " does not suit this machine now. Measure it again with `drbert-prove capacity`, and"
            " then the pilot."
        )


def _smallest_size(pilot: Pilot, plan: Plan, restarts: int, power: float) -> SampleSize:
    """Return the smallest sizes with which this number of restarts is enough.

    Each level gets an equal share of the joint power; then the weakest grows until the joint power
    is reached. The sizes are the largest ones if none are enough.
    """
    power_per_level = power ** (1 / len(plan.levels))
    sizes = {}
    for level in plan.levels:
        powers = {size: _power(pilot, plan, [(level, size)], restarts)[0] for size in SIZES}
        enough = [size for size in SIZES if powers[size] >= power_per_level]
        sizes[level.name] = enough[0] if enough else SIZES[-1]
    while True:
        sized = [(level, sizes[level.name]) for level in plan.levels]
        joint, by_part = _power(pilot, plan, sized, restarts)
        can_grow = [name for name, size in sizes.items() if size != SIZES[-1]]
        if joint >= power or not can_grow:
            break
        weakest = min(can_grow, key=lambda name: _power_of_level(by_part, name))
        sizes[weakest] = SIZES[SIZES.index(sizes[weakest]) + 1]
    at_quarter, _ = _power(pilot, plan, sized, restarts, quarter=True)
    seconds = pilot.start_s + sum(pilot.levels[level.name].seconds * size for level, size in sized)
    return SampleSize(restarts, sizes, restarts * seconds / 60, joint, at_quarter, by_part)


def _power_of_level(power_by_part: Mapping[str, float], level: str) -> float:
    return min(power for part, power in power_by_part.items() if part.startswith(f"{level} "))


def _power(
    pilot: Pilot,
    plan: Plan,
    sized: Sequence[tuple[Level, int]],
    restarts: int,
    quarter: bool = False,
) -> tuple[float, dict[str, float]]:
    """Return the joint power over simulated runs, and the power of each part alone."""
    covariances, parts, margins = [], [], []
    for level, size in sized:
        keys = [(metric, name) for metric, name, _ in level.claimed]
        covariances.append(_covariance(pilot, pilot.levels[level.name], keys, size))
        parts += [f"{level.name} {metric} {name}" for metric, name in keys]
        margins += [margin for *_, margin in level.claimed]
    bounds = np.array([math.log1p(margin) for margin in margins])
    root = block_diag(*[_root(covariance) for covariance in covariances])
    rng = np.random.default_rng(restarts)
    contrasts = rng.standard_normal((DRAWS, restarts, len(bounds))) @ root.T
    contrasts += bounds / 4 if quarter else 0.0
    error = contrasts.std(axis=1, ddof=1) / math.sqrt(restarts)
    reach = t_quantile(0.95, restarts - 2) * error
    inside = np.abs(contrasts.mean(axis=1)) + reach < bounds
    power_by_part = dict(zip(parts, inside.mean(axis=0).tolist(), strict=True))
    succeeds = inside.all(axis=1)
    for level, size in sized:
        detected = _detected(pilot, plan, level, size, restarts, rng)
        power_by_part[f"{level.name} {CONTROL}"] = float(detected.mean())
        succeeds &= detected
    return float(succeeds.mean()), power_by_part


def _root(covariance: Matrix) -> Matrix:
    """Return a square root of a covariance, (q, q)."""
    values, vectors = np.linalg.eigh(covariance)
    root: Matrix = vectors * np.sqrt(np.clip(values, 0, None))
    return root


def _detected(
    pilot: Pilot, plan: Plan, level: Level, size: int, restarts: int, rng: np.random.Generator
) -> npt.NDArray[np.bool_]:
    """Return (DRAWS,): whether at least one statistic shows the delayed arm beyond its margin."""
    statistics = plan.control_statistics(level)
    # One copy against one, not two against two: twice the variance. In control blocks, a quarter of
    # all, three times that of the rows. In schedule 2 a control block has one copy against three,
    # and each copy in turn, so that their differences cancel.
    in_turn = plan.schedule_version > 1
    within = (4 if in_turn else 6) if level.tuples else 2
    covariance = _covariance(
        pilot,
        pilot.levels[level.name],
        [(metric, name) for metric, name, _ in statistics],
        size,
        between=0 if in_turn else 2,
        within=within,
    )
    gains = [level.gains.get(metric, {}).get(name, 1.0) for metric, name, _ in statistics]
    bounds = [math.log1p(margin) for *_, margin in statistics]
    effect = np.array(gains) * math.log1p(plan.delay)
    draws = rng.standard_normal((DRAWS, restarts, len(statistics)))
    contrasts = draws @ _root(covariance).T + effect
    error = contrasts.std(axis=1, ddof=1) / math.sqrt(restarts)
    reach = t_quantile(1 - 0.05 / len(statistics), restarts - 2) * error
    detected: npt.NDArray[np.bool_] = (contrasts.mean(axis=1) - reach > bounds).any(axis=1)
    return detected


def _covariance(
    pilot: Pilot,
    level: PilotLevel,
    keys: Sequence[tuple[str, str]],
    size: int,
    between: float = 1,
    within: float = 1,
) -> Matrix:
    """Return (q, q): the covariance of one restart's contrasts at a size.

    The part that differs from start to start stays; the part that a restart's rows explain shrinks
    with their number. `between` and `within` are factors of the two parts.
    """
    chosen = [level.keys.index(key) for key in keys]
    of_contrasts = level.contrasts.T @ level.contrasts / (pilot.restarts - 2)
    total = of_contrasts[np.ix_(chosen, chosen)]
    of_rows = level.within[np.ix_(chosen, chosen)]
    values, vectors = np.linalg.eigh(total - of_rows)
    of_starts = (vectors * np.clip(values, 0, None)) @ vectors.T
    enlarged = (pilot.restarts - 1) / float(chi2.ppf(0.2, pilot.restarts - 1))
    covariance: Matrix = (between * of_starts + within * of_rows / size) * enlarged
    return covariance


def _sized(level: Level, pilot: Level, size: int) -> Level:
    level = replace(level, rate_per_s=pilot.rate_per_s)
    if level.kind == "switchback":
        return replace(level, slice_requests=pilot.slice_requests, sets=pilot.sets * size)
    if level.kind == "capacity":
        return replace(level, slice_s=pilot.slice_s, sets=pilot.sets * size)
    return replace(level, tuples=pilot.tuples * size)


def describe(pilot: Pilot, size: SampleSize) -> str:
    """Return the pilot's noise and the chosen size as lines for a terminal."""
    lines = [f"pilot: {pilot.restarts} restarts, a start takes {pilot.start_s:.1f} s"]
    for name, level in pilot.levels.items():
        busy = "" if math.isnan(level.busy_share) else f", engine busy {level.busy_share:.0%}"
        lines.append(f"level {name}: {level.seconds:.1f} s a restart{busy}")
        for (metric, statistic), noise in level.noise.items():
            gain = "" if noise.gain is None else f", gain {noise.gain:.2f}"
            gain += "" if noise.beta is None else f", β {noise.beta:.2f}"
            lines.append(
                f"  {metric:<19} {statistic:<5} position effect {noise.position_effect:.2%},"
                f" instance sd {noise.instance_sd:.2%}, w {noise.w:.1%}, autocorrelation"
                f" {noise.autocorrelation:.2f}{gain}"
            )
    levels = ", ".join(f"{name} × {multiple}" for name, multiple in size.sizes.items())
    lines.append(
        f"plan: {size.restarts} restarts, {levels}: {size.minutes:.0f} minutes, power"
        f" {size.power:.0%} at ratio 1, {size.power_at_quarter:.0%} at a quarter of every margin"
    )
    return "\n".join(lines)
