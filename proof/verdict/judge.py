"""
The judge: decides on a sealed run from its folder alone.

    equivalent       every claimed 90 % interval lies inside its margin
    not-slower       the same of its upper end, where non-inferiority is claimed
    not-equivalent   a claimed interval, corrected for their number, lies wholly outside
    inconclusive     neither, or too few restarts; never rounded up
    invalid          a gate failed: the run could not have shown what it claims

    check_manifest → audit (rows against plan) → readings → judge_level for each → the worst of them
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from proof.evidence.audit import (
    audit_rows,
    check_documents,
    check_restarts,
    read_sealed_plan,
)
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
    Interval,
    LevelVerdict,
    Outcome,
    PlanName,
    RunName,
    Statistic,
    Verdict,
    format_interval,
    format_percent,
    metric_label,
    read_run,
)
from proof.work.sealed import check_sealed

CONFIDENCE = 0.90
"""Two one-sided tests at 5 % are one two-sided interval at 90 %."""
DELAY_CONFIDENCE = 0.995
"""Confidence of the interval that must contain the delay of the delayed arm."""
DRIFT_CONFIDENCE = 0.99
"""Confidence of the interval of the drift within restarts."""
FEWEST_FOR_INTERVAL = 4
"""Fewest restarts for which intervals are estimated."""

OUTCOMES_BY_SEVERITY: tuple[Outcome, ...] = (
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
    check_documents(folder)
    plan, starts = read_sealed_plan(folder), read_starts(folder)
    lines = audit_rows(folder, plan, starts)
    check_restarts(folder, lines)
    counted = sum(not start.dropped for start in starts)
    check_sealed(plan, folder, is_complete=counted >= plan.restarts)
    return judge_lines(folder, plan, starts, lines)


def judge_lines(
    folder: Path, plan: Plan, starts: Sequence[RestartRecord], lines: Sequence[Mapping[str, Any]]
) -> Verdict:
    """Return the verdict that follows from the lines of restarts.csv."""
    run = read_run(folder / "run.json", plan.digest)
    readings = {level.name: collect_readings(plan, level, lines) for level in plan.levels}
    return judge_readings(plan, starts, readings, run)


def judge_readings(
    plan: Plan, starts: Sequence[RestartRecord], readings: Mapping[str, Readings], run: RunName
) -> Verdict:
    """Return the verdict that follows from each level's numbers."""
    levels = {
        level.name: judge_level(plan, level, readings[level.name], starts) for level in plan.levels
    }
    worst = max((level.verdict for level in levels.values()), key=OUTCOMES_BY_SEVERITY.index)
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
    plan: Plan, level: Level, readings: Readings, starts: Sequence[RestartRecord]
) -> LevelVerdict:
    """Return one level's verdict, with everything that it rests on."""
    counted = len(readings.restarts)
    gates = [_dropped_gate(starts)]
    statistics: list[Statistic] = []
    same_model: list[Contrast] = []
    controls: list[Control] = []
    if counted >= FEWEST_FOR_INTERVAL:
        statistics = [
            _statistic(plan, level, readings, metric, name, margin)
            for metric, name, margin in level.claimed
        ]
        for role in ("reference", "candidate"):
            contrasts = _same_model(plan, level, readings, role)
            same_model += contrasts
            gates.append(_same_model_gate(plan, role, contrasts))
        controls = _delayed(plan, level, readings) + _kept_decoder(plan, level, readings)
        gates += _control_gates(plan, controls) + _drift_gate(level, readings)
    breached = [gate.name for gate in gates if not gate.passed]
    outside = {item.outside for item in statistics if item.outside}
    if plan.claim == "non-inferiority":
        # A faster candidate does not contradict this claim.
        outside -= {"faster"}
    not_slower = bool(statistics) and all(item.not_slower for item in statistics)
    equivalent = bool(statistics) and all(item.equivalent for item in statistics)
    enough = counted >= FEWEST_RESTARTS and counted >= plan.restarts
    outcome: Outcome = "inconclusive"
    if breached:
        outcome = "invalid"
    elif outside:
        outcome = "not-equivalent"
    elif enough and plan.claim == "equivalence" and equivalent:
        outcome = "equivalent"
    elif enough and plan.claim == "non-inferiority" and not_slower:
        outcome = "not-slower"
    return LevelVerdict(
        verdict=outcome,
        not_slower=not_slower,
        equivalent=equivalent,
        direction="/".join(sorted(outside)) or None,
        breached=breached,
        restarts_planned=plan.restarts,
        restarts_kept=counted,
        restarts_dropped=len(starts) - counted,
        statistics=statistics,
        same_model=same_model,
        controls=controls,
        gates=gates,
    )


def _contrast(
    readings: Readings, key: Key, arms: Sequence[int], weights: Mapping[int, float]
) -> tuple[Estimate, Matrix]:
    """Return the estimate of Σ weight · log statistic, and its value in each restart.

    `arms`, one for each load position, serve to estimate its effect. `weights` sum to zero.
    """
    y, contrast = readings.logs[key][:, arms], np.array([weights.get(arm, 0.0) for arm in arms])
    return adjusted_contrast(y, readings.positions[:, arms], contrast), y @ contrast


def _ratio_interval(estimate: Estimate, confidence: float) -> Interval:
    low, high = estimate.interval(confidence)
    return math.exp(low), math.exp(high)


def _corrected_confidence(tests: int) -> float:
    """Return the confidence of an interval that is corrected for a number of one-sided tests."""
    return 1 - 2 * 0.05 / tests


def _statistic(
    plan: Plan, level: Level, readings: Readings, metric: str, name: str, margin: float
) -> Statistic:
    """Return a claimed statistic: the mean log of the candidates minus that of the references."""
    references = plan.indices("reference")
    weights = dict.fromkeys(references, -0.5) | dict.fromkeys(plan.indices("candidate"), 0.5)
    key = ("plain", metric, name)
    estimate, differences = _contrast(readings, key, plan.claimed_arms, weights)
    bound = math.log1p(margin)
    low, high = estimate.interval(CONFIDENCE)
    strict_confidence = _corrected_confidence(len(level.claimed))
    strict_low, strict_high = estimate.interval(strict_confidence)
    return Statistic(
        metric=metric,
        statistic=name,
        margin=margin,
        ratio=estimate.ratio,
        interval=_ratio_interval(estimate, CONFIDENCE),
        strict_interval=_ratio_interval(estimate, strict_confidence),
        gain=level.gains.get(metric, {}).get(name, 1.0),
        reference_us=float(np.exp(readings.logs[key][:, references].mean())),
        restart_ratios=np.exp(differences).tolist(),
        not_slower=high < bound,
        equivalent=-bound < low and high < bound,
        sign_flip_p=sign_flip_p(differences, bound),
        outside="slower" if strict_low > bound else "faster" if strict_high < -bound else None,
    )


def _same_model(plan: Plan, level: Level, readings: Readings, role: Role) -> list[Contrast]:
    """Return A/A: the second load of a model over the first, for each claimed statistic.

    All are reported; only a bias beyond half the margin fails the gate.
    """
    first, second = plan.indices(role)
    weights = {first: -1.0, second: 1.0}
    contrasts = []
    for metric, name, margin in level.claimed:
        key = ("plain", metric, name)
        estimate, differences = _contrast(readings, key, plan.claimed_arms, weights)
        low, high = estimate.interval(CONFIDENCE)
        bound = math.log1p(margin)
        contrasts.append(
            Contrast(
                arms=(plan.arms[first].name, plan.arms[second].name),
                metric=metric,
                statistic=name,
                margin=margin,
                ratio=estimate.ratio,
                interval=_ratio_interval(estimate, CONFIDENCE),
                restart_ratios=np.exp(differences).tolist(),
                equivalent=-bound < low and high < bound,
                biased=low > bound / 2 or high < -bound / 2,
            )
        )
    return contrasts


def _same_model_gate(plan: Plan, role: Role, contrasts: Sequence[Contrast]) -> Gate:
    furthest = max(
        contrasts, key=lambda c: (c.biased, abs(math.log(c.ratio)) / math.log1p(c.margin))
    )
    first, second = furthest.arms
    return Gate(
        name=f"A/A: {first} and {second} are not biased",
        passed=not any(contrast.biased for contrast in contrasts),
        measured=(
            f"furthest {metric_label(furthest.metric)} {furthest.statistic}:"
            f" {format_percent(furthest.ratio)} ({format_interval(furthest.interval)}), may not lie"
            f" wholly beyond ±{math.expm1(math.log1p(furthest.margin) / 2):.1%}"
        ),
    )


def _delayed(plan: Plan, level: Level, readings: Readings) -> list[Control]:
    """Return the delayed arm over the first reference: a regression of known size."""
    reference, second_reference = plan.indices("reference")
    block = "control" if level.tuples else "plain"
    controls = []
    for delayed in plan.indices("delayed"):
        arms = [delayed if arm == second_reference else arm for arm in plan.claimed_arms]
        weights = {reference: -1.0, delayed: 1.0}
        statistics = plan.control_statistics(level)
        for metric, name, margin in statistics:
            key = (block, metric, name)
            estimate, differences = _contrast(readings, key, arms, weights)
            # Under load the queue multiplies the delay, so it has no known size there.
            expected = 1 + plan.delay if level.tuples else None
            controls.append(
                _control(
                    plan.arms[delayed].name,
                    key,
                    estimate,
                    differences,
                    margin,
                    len(statistics),
                    expected,
                )
            )
    return controls


def _kept_decoder(plan: Plan, level: Level, readings: Readings) -> list[Control]:
    """Return the checkpoint with its decoder left in, over the closing blocks.

    They follow the measured blocks (proof/plans/schedule.py). It must be detected as slower.
    """
    if level.kind != "unloaded":
        return []
    metric = "inference" if plan.server_timing else "end_to_end"
    controls = []
    for arm in plan.indices("control"):
        for name in ("p50", "mean"):
            key = ("closing", metric, name)
            y = readings.logs[key]
            differences = y[:, arm] - y[:, plan.indices("reference")].mean(axis=1)
            controls.append(
                _control(
                    plan.arms[arm].name,
                    key,
                    plain_contrast(differences),
                    differences,
                    level.tightest_margin,
                    tests=2,
                    expected=None,
                )
            )
    return controls


def _control(
    arm: str,
    key: Key,
    estimate: Estimate,
    differences: Matrix,
    margin: float,
    tests: int,
    expected: float | None,
) -> Control:
    _, metric, name = key
    bound = math.log1p(margin)
    strict_low, _ = estimate.interval(_corrected_confidence(tests))
    wide_low, wide_high = estimate.interval(DELAY_CONFIDENCE)
    return Control(
        arm=arm,
        metric=metric,
        statistic=name,
        # Not `margin` itself: published verdicts hold the rounding of this.
        margin=math.expm1(bound),
        ratio=estimate.ratio,
        interval=_ratio_interval(estimate, CONFIDENCE),
        wide_interval=_ratio_interval(estimate, DELAY_CONFIDENCE),
        restart_ratios=np.exp(differences).tolist(),
        detected=strict_low > bound,
        expected=expected,
        as_expected=None if expected is None else wide_low <= math.log(expected) <= wide_high,
    )


def _control_gates(plan: Plan, controls: Sequence[Control]) -> list[Gate]:
    gates = []
    for name in dict.fromkeys(control.arm for control in controls):
        of_arm = [control for control in controls if control.arm == name]
        statistics = [
            f"{metric_label(control.metric)} {control.statistic} {format_percent(control.ratio)}"
            f" ({format_interval(control.interval)})"
            for control in of_arm
        ]
        gates.append(
            Gate(
                # Published verdicts have these names.
                name=f"{name} is told apart",
                # One statistic wholly beyond its margin, corrected for their number, is enough.
                passed=any(control.detected for control in of_arm),
                measured="; ".join(statistics),
            )
        )
        of_known_size = [control for control in of_arm if control.expected is not None]
        if of_known_size:
            intervals = [
                f"{control.statistic} {format_interval(control.wide_interval)}"
                for control in of_known_size
            ]
            gates.append(
                Gate(
                    name=f"{name} is as slow as it was made",
                    passed=all(control.as_expected for control in of_known_size),
                    measured=f"made {format_percent(1 + plan.delay)}; 99.5 %: "
                    + "; ".join(intervals),
                )
            )
    return gates


def _drift_gate(level: Level, readings: Readings) -> list[Gate]:
    """Return the gate against a drift of the ratio between two copies of one model.

    Such a drift comes from the instrument. A drift that all copies share cancels out.
    """
    if not len(readings.drift):
        return []
    low, high = plain_contrast(readings.drift).interval(DRIFT_CONFIDENCE)
    mean = float(readings.drift.mean())
    half_margin = math.log1p(level.tightest_margin) / 2
    drifts = (low > 0 or high < 0) and abs(mean) > half_margin
    ratios = math.exp(low), math.exp(high)
    return [
        Gate(
            name="no drift of the ratio within restarts",
            passed=not drifts,
            measured=(
                f"{format_percent(math.exp(mean))} over a restart (99 %: {format_interval(ratios)})"
            ),
        )
    ]


def _dropped_gate(starts: Sequence[RestartRecord]) -> Gate:
    dropped = sum(bool(start.dropped) for start in starts)
    return Gate(
        name="few restarts dropped",
        passed=dropped / max(1, len(starts)) <= MOST_DROPPED,
        measured=f"{dropped} of {len(starts)} (at most {MOST_DROPPED:.0%})",
    )


def _sentence(plan: Plan, worst: Outcome, levels: Mapping[str, LevelVerdict]) -> str:
    reference = plan.arms[plan.indices("reference")[0]].name
    candidate = plan.arms[plan.indices("candidate")[0]].name
    counted = min(level.restarts_kept for level in levels.values())
    if worst == "equivalent":
        return (
            f"{candidate} is as fast as {reference}, within every margin claimed ({counted}"
            " restarts)."
        )
    if worst == "not-slower":
        return (
            f"{candidate} is not slower than {reference}, within every margin claimed ({counted}"
            " restarts)."
        )
    names = [name for name, level in levels.items() if level.verdict == worst]
    at_levels = f" at {' and '.join(names)}" if len(levels) > 1 else ""
    if worst == "not-equivalent":
        direction = "/".join(sorted({levels[name].direction or "" for name in names}))
        # Two models that do the same work cannot differ in speed.
        doubt = (
            " Where both do the same work, that shows a broken instrument."
            if direction == "faster"
            else ""
        )
        return (
            f"{candidate} is {direction} than {reference} by more than a claimed margin"
            f"{at_levels}.{doubt}"
        )
    if worst == "invalid":
        breached = dict.fromkeys(gate for name in names for gate in levels[name].breached)
        return f"This run shows nothing{at_levels}, for it breached: {'; '.join(breached)}."
    return (
        f"{counted} restarts do not decide{at_levels} whether {candidate} is as fast as"
        f" {reference}; more restarts or longer ones would."
    )
