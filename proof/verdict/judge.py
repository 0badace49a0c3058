"""
Judges a sealed run from its folder alone.

    equivalent       every claimed 90 % interval lies inside its margin (not-slower, where that is
                     the claim)
    not-equivalent   some claimed interval, corrected for their number, lies wholly outside
    inconclusive     neither; also too few restarts. Never rounded up.
    invalid          a gate failed: the run could not have shown what it claims

    check_manifest → audit (rows against plan) → readings → judge_level for each → the worst of them
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from proof.evidence.audit import audit_rows, check_restarts, read_sealed_plan
from proof.evidence.gates import MOST_DROPPED
from proof.evidence.readings import Key, Readings, collect_readings
from proof.evidence.statistics import (
    Estimate,
    Matrix,
    adjusted_contrast,
    plain_contrast,
    sign_flip_p,
)
from proof.evidence.store import EvidenceRejected, RestartRecord, check_manifest, read_starts
from proof.plans.plan import FEWEST_RESTARTS, Level, Plan, Role
from proof.verdict.schema import (
    SCHEMA_VERSION,
    Contrast,
    Control,
    Gate,
    LevelVerdict,
    Outcome,
    PlanName,
    RunName,
    Statistic,
    Verdict,
    percent,
    read_run,
)

# The two-sided confidence that two one-sided 5 % tests amount to.
CONFIDENCE = 0.90
# Within which the delayed arm's own time must hold the delay.
DELAY_CONFIDENCE = 0.995
# Restarts below which no interval is worth its name.
FEWEST_FOR_INTERVAL = 4

WORST_LAST: tuple[Outcome, ...] = (
    "equivalent",
    "not-slower",
    "inconclusive",
    "not-equivalent",
    "invalid",
)


def judge_run(folder: Path) -> Verdict:
    """Return the verdict on the sealed evidence in `folder`, recomputed from its rows.

    Raise EvidenceRejected if the evidence cannot be trusted.
    """
    if not folder.is_dir():
        raise EvidenceRejected(f"{folder} does not exist.")
    check_manifest(folder)
    plan, starts = read_sealed_plan(folder), read_starts(folder)
    lines = audit_rows(folder, plan, starts)
    check_restarts(folder, lines)
    return judge_lines(folder, plan, starts, lines)


def judge_lines(
    folder: Path, plan: Plan, starts: Sequence[RestartRecord], lines: Sequence[Mapping[str, Any]]
) -> Verdict:
    """The verdict that follows from the lines of restarts.csv."""
    run = read_run(folder / "run.json", plan.digest)
    return judge_readings(
        plan,
        starts,
        {level.name: collect_readings(plan, level, lines) for level in plan.levels},
        run,
    )


def judge_readings(
    plan: Plan, starts: Sequence[RestartRecord], found: dict[str, Readings], run: RunName
) -> Verdict:
    """The verdict that follows from each level's numbers."""
    levels = {
        level.name: judge_level(plan, level, found[level.name], starts) for level in plan.levels
    }
    worst = max((level.verdict for level in levels.values()), key=WORST_LAST.index)
    return Verdict(
        schema_version=SCHEMA_VERSION,
        verdict=worst,
        sentence=_sentence(plan, worst, levels),
        claim=plan.claim,
        plan=PlanName(name=plan.name, digest=plan.digest),
        run=run,
        levels=levels,
    )


def judge_level(
    plan: Plan, level: Level, found: Readings, starts: Sequence[RestartRecord]
) -> LevelVerdict:
    """One level's verdict, with everything it rests on."""
    kept = len(found.restarts)
    gates = [_dropped_gate(starts)]
    judged: list[Statistic] = []
    same: list[Contrast] = []
    controls: list[Control] = []
    if kept >= FEWEST_FOR_INTERVAL:
        judged = [
            _statistic(plan, level, found, metric, name, margin)
            for metric, name, margin in level.claimed
        ]
        for role in ("reference", "candidate"):
            contrasts = _same_model(plan, level, found, role)
            same += contrasts
            gates.append(_same_model_gate(plan, role, contrasts))
        controls = _delayed(plan, level, found) + _kept_decoder(plan, level, found)
        gates += _control_gates(plan, level, controls) + _drift_gate(plan, level, found)
    breached = [gate.name for gate in gates if not gate.passed]
    not_slower, equivalent = (
        bool(judged) and all(getattr(item, name) for item in judged)
        for name in ("not_slower", "equivalent")
    )
    outside = {item.outside for item in judged if item.outside} - (
        {"faster"} if plan.claim == "non-inferiority" else set()
    )
    enough = kept >= FEWEST_RESTARTS and kept >= plan.restarts
    word: Outcome = "inconclusive"
    if breached:
        word = "invalid"
    elif outside:
        word = "not-equivalent"
    elif enough and plan.claim == "equivalence" and equivalent:
        word = "equivalent"
    elif enough and plan.claim == "non-inferiority" and not_slower:
        word = "not-slower"
    return LevelVerdict(
        verdict=word,
        not_slower=not_slower,
        equivalent=equivalent,
        direction="/".join(sorted(outside)) or None,
        breached=breached,
        restarts_planned=plan.restarts,
        restarts_kept=kept,
        restarts_dropped=len(starts) - kept,
        statistics=judged,
        same_model=same,
        controls=controls,
        gates=gates,
    )


def _contrast(
    found: Readings, key: Key, arms: Sequence[int], weights: dict[int, float]
) -> tuple[Estimate, Matrix]:
    """The estimate of Σ weight · log statistic, and its value in each restart.

    All of `arms`, one at each load position, say how much load position does; `weights` sums to
    zero.
    """
    y, c = found.logs[key][:, arms], np.array([weights.get(a, 0.0) for a in arms])
    return adjusted_contrast(y, found.positions[:, arms], c), y @ c


def _statistic(
    plan: Plan, level: Level, found: Readings, metric: str, name: str, margin: float
) -> Statistic:
    """The claim: half of both candidates less half of both references."""
    weights = dict.fromkeys(plan.indices("reference"), -0.5) | dict.fromkeys(
        plan.indices("candidate"), 0.5
    )
    estimate, differences = _contrast(found, ("plain", metric, name), plan.claimed_arms, weights)
    low, high = estimate.interval(CONFIDENCE)
    strict_low, strict_high = estimate.interval(1 - 2 * 0.05 / len(level.claimed))
    bound = math.log1p(margin)
    references = found.logs["plain", metric, name][:, plan.indices("reference")]
    return Statistic(
        metric=metric,
        statistic=name,
        margin=margin,
        ratio=estimate.ratio,
        interval=(math.exp(low), math.exp(high)),
        strict_interval=(math.exp(strict_low), math.exp(strict_high)),
        gain=level.gains.get(metric, {}).get(name, 1.0),
        reference_us=float(np.exp(references.mean())),
        restart_ratios=np.exp(differences).tolist(),
        not_slower=high < bound,
        equivalent=-bound < low and high < bound,
        sign_flip_p=sign_flip_p(differences, bound),
        outside="slower" if strict_low > bound else "faster" if strict_high < -bound else None,
    )


def _same_model(plan: Plan, level: Level, found: Readings, role: Role) -> list[Contrast]:
    """A/A: the second load of a model against the first. Reported in full; only a bias beyond half
    the margin is a breach.
    """
    first, second = plan.indices(role)
    contrasts = []
    for metric, name, margin in level.claimed:
        estimate, differences = _contrast(
            found, ("plain", metric, name), plan.claimed_arms, {first: -1.0, second: 1.0}
        )
        low, high = estimate.interval(CONFIDENCE)
        bound, half = math.log1p(margin), math.log1p(margin) / 2
        contrasts.append(
            Contrast(
                arms=(plan.arms[first].name, plan.arms[second].name),
                metric=metric,
                statistic=name,
                margin=margin,
                ratio=estimate.ratio,
                interval=(math.exp(low), math.exp(high)),
                restart_ratios=np.exp(differences).tolist(),
                equivalent=-bound < low and high < bound,
                biased=low > half or high < -half,
            )
        )
    return contrasts


def _same_model_gate(plan: Plan, role: Role, contrasts: Sequence[Contrast]) -> Gate:
    furthest = max(
        contrasts, key=lambda c: (c.biased, abs(math.log(c.ratio)) / math.log1p(c.margin))
    )
    low, high = furthest.interval
    first, second = furthest.arms
    return Gate(
        name=f"A/A: {first} and {second} are not biased",
        passed=not any(c.biased for c in contrasts),
        found=(
            f"furthest {furthest.metric.replace('_', ' ')} {furthest.statistic}:"
            f" {percent(furthest.ratio)} ({percent(low)} to {percent(high)}), may not lie wholly"
            f" beyond ±{math.expm1(math.log1p(furthest.margin) / 2):.1%}"
        ),
    )


def _delayed(plan: Plan, level: Level, found: Readings) -> list[Control]:
    """The second reference with a busy-wait against the first without: a regression of known size,
    which must be seen.
    """
    controls = []
    reference, again = plan.indices("reference")
    block = "control" if level.tuples else "plain"
    for delayed in plan.indices("delayed"):
        arms = [delayed if a == again else a for a in plan.claimed_arms]
        seen_in = plan.control_statistics(level)
        for metric, name, margin in seen_in:
            estimate, differences = _contrast(
                found, (block, metric, name), arms, {reference: -1.0, delayed: 1.0}
            )
            bound = math.log1p(margin)
            # Under load the queue multiplies the delay, so there it must be seen; alone it must be
            # read as what it is.
            expected = 1 + plan.delay if level.tuples else None
            controls.append(
                _control(
                    plan.arms[delayed].name,
                    metric,
                    name,
                    estimate,
                    differences,
                    bound,
                    len(seen_in),
                    expected,
                )
            )
    return controls


def _kept_decoder(plan: Plan, level: Level, found: Readings) -> list[Control]:
    """The checkpoint with its decoder left in, over the closing blocks: an illustration that must
    be told apart.
    """
    controls = []
    if level.kind == "unloaded":
        metric = "inference" if plan.server_timing else "end_to_end"
        for arm in plan.indices("control"):
            for name in ("p50", "mean"):
                y = found.logs["closing", metric, name]
                differences = y[:, arm] - y[:, plan.indices("reference")].mean(axis=1)
                bound = math.log1p(level.tightest_margin)
                controls.append(
                    _control(
                        plan.arms[arm].name,
                        metric,
                        name,
                        plain_contrast(differences),
                        differences,
                        bound,
                        2,
                        None,
                    )
                )
    return controls


def _control(
    arm: str,
    metric: str,
    name: str,
    estimate: Estimate,
    differences: Matrix,
    bound: float,
    tests: int,
    expected: float | None,
) -> Control:
    low, high = estimate.interval(CONFIDENCE)
    strict_low, _ = estimate.interval(1 - 2 * 0.05 / tests)
    wide_low, wide_high = estimate.interval(DELAY_CONFIDENCE)
    return Control(
        arm=arm,
        metric=metric,
        statistic=name,
        margin=math.expm1(bound),
        ratio=estimate.ratio,
        interval=(math.exp(low), math.exp(high)),
        wide_interval=(math.exp(wide_low), math.exp(wide_high)),
        restart_ratios=np.exp(differences).tolist(),
        detected=strict_low > bound,
        expected=expected,
        as_expected=None if expected is None else wide_low <= math.log(expected) <= wide_high,
    )


def _control_gates(plan: Plan, level: Level, controls: Sequence[Control]) -> list[Gate]:
    gates = []
    for name in dict.fromkeys(control.arm for control in controls):
        mine = [control for control in controls if control.arm == name]
        # As everywhere: one statistic wholly beyond its margin, corrected for their number, is
        # enough.
        gates.append(
            Gate(
                name=f"{name} is told apart",
                passed=any(control.detected for control in mine),
                found="; ".join(
                    f"{c.metric.replace('_', ' ')} {c.statistic} {percent(c.ratio)}"
                    f" ({percent(c.interval[0])} to {percent(c.interval[1])})"
                    for c in mine
                ),
            )
        )
        known = [control for control in mine if control.expected is not None]
        if known:
            gates.append(
                Gate(
                    name=f"{name} is as slow as it was made",
                    passed=all(control.as_expected for control in known),
                    found=f"made {percent(1 + plan.delay)}; 99.5 %: "
                    + "; ".join(
                        f"{c.statistic} {percent(c.wide_interval[0])} to"
                        f" {percent(c.wide_interval[1])}"
                        for c in known
                    ),
                )
            )
    return gates


def _drift_gate(plan: Plan, level: Level, found: Readings) -> list[Gate]:
    """A drift of the ratio between two copies of one model within restarts would be the
    instrument's own; a common one is none.
    """
    if not len(found.drift):
        return []
    low, high = plain_contrast(found.drift).interval(0.99)
    mean = float(found.drift.mean())
    half = math.log1p(level.tightest_margin) / 2
    drifts = (low > 0 or high < 0) and abs(mean) > half
    return [
        Gate(
            name="no drift of the ratio within restarts",
            passed=not drifts,
            found=(
                f"{percent(math.exp(mean))} over a restart (99 %: {percent(math.exp(low))} to"
                f" {percent(math.exp(high))})"
            ),
        )
    ]


def _dropped_gate(starts: Sequence[RestartRecord]) -> Gate:
    dropped = sum(bool(start.dropped) for start in starts)
    share = dropped / max(1, len(starts))
    return Gate(
        name="few restarts dropped",
        passed=share <= MOST_DROPPED,
        found=f"{dropped} of {len(starts)} (at most {MOST_DROPPED:.0%})",
    )


def _sentence(plan: Plan, worst: Outcome, levels: dict[str, LevelVerdict]) -> str:
    first, second = (
        plan.arms[plan.indices("reference")[0]].name,
        plan.arms[plan.indices("candidate")[0]].name,
    )
    at = [name for name, level in levels.items() if level.verdict == worst]
    where = (
        f" at {' and '.join(at)}"
        if len(levels) > 1 and worst not in ("equivalent", "not-slower")
        else ""
    )
    kept = min(level.restarts_kept for level in levels.values())
    if worst == "equivalent":
        return f"{second} is as fast as {first}, within every margin claimed ({kept} restarts)."
    if worst == "not-slower":
        return (
            f"{second} is not slower than {first}, within every margin claimed ({kept} restarts)."
        )
    if worst == "not-equivalent":
        direction = "/".join(sorted({levels[name].direction or "" for name in at}))
        end = (
            " Where both do the same work, that shows a broken instrument."
            if direction == "faster"
            else ""
        )
        return f"{second} is {direction} than {first} by more than a claimed margin{where}.{end}"
    if worst == "invalid":
        breached = dict.fromkeys(gate for name in at for gate in levels[name].breached)
        return f"This run shows nothing{where}, for it breached: {'; '.join(breached)}."
    return (
        f"{kept} restarts do not decide{where} whether {second} is as fast as {first}; more"
        " restarts or longer ones would."
    )
