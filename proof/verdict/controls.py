"""
Controls: arms that are known to be slower, and must be detected as such.

The delayed arm is a copy that the server slows down by a known share. The other one is the
checkpoint with its decoder left in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from proof.evidence.readings import DELAY, Key, Readings
from proof.evidence.statistics import Estimate, Matrix, plain_contrast
from proof.plans.plan import MOST_GAIN, Level, Plan
from proof.verdict.contrasts import CONFIDENCE, contrast_of, corrected_confidence, ratio_interval
from proof.verdict.schema import Control, Gate, format_interval, format_percent, metric_label

DELAY_ACCURACY = 0.25
"""Schedule 2: accuracy of the delay itself, in margins.

The server computes longer by a share of what it measured, and both take some microseconds. With
many rows an interval is narrower than that.
"""
DELAY_CONFIDENCE = 0.995
"""Confidence of the interval that must contain the delay of the delayed arm."""


def delayed_controls(plan: Plan, level: Level, readings: Readings) -> list[Control]:
    """Return the delayed arm over the first reference: a regression of known size."""
    if plan.schedule_version > 1:
        return _delayed_in_turn(plan, level, readings)
    reference, second_reference = plan.indices("reference")
    block = "control" if level.tuples else "plain"
    controls = []
    for delayed in plan.indices("delayed"):
        arms = [delayed if arm == second_reference else arm for arm in plan.claimed_arms]
        weights = {reference: -1.0, delayed: 1.0}
        statistics = plan.control_statistics(level)
        for metric, name, margin in statistics:
            key = (block, metric, name)
            estimate, differences = contrast_of(readings, key, arms, weights)
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


def _delayed_in_turn(plan: Plan, level: Level, readings: Readings) -> list[Control]:
    """Return the delayed arm over the same copies without a delay (schedule 2)."""
    statistics = plan.control_statistics(level)
    controls = []
    for delayed in plan.indices("delayed"):
        for metric, name, margin in statistics:
            differences = readings.delays[metric, name]
            gain = level.gains.get(metric, {}).get(name)
            expected = 1 + plan.delay if level.tuples else None
            control = _control(
                plan.arms[delayed].name,
                (DELAY, metric, name),
                plain_contrast(differences),
                differences,
                margin,
                len(statistics),
                expected,
                tolerance=DELAY_ACCURACY * math.log1p(level.tightest_margin),
            )
            if gain is not None:
                control = _with_expected_gain(plan, level, control, gain)
            controls.append(control)
    return controls


def _with_expected_gain(plan: Plan, level: Level, control: Control, gain: float) -> Control:
    """Return a control that must read as the delay times its gain, within what the gain can be.

    The plan's gain is a lower bound of the pilot's, so what is read may also be more, up to the
    largest gain that the load can have.
    """
    most = MOST_GAIN[plan.schedule_version][level.percent]
    low, high = (math.log(end) / math.log1p(plan.delay) for end in control.wide_interval)
    return control.model_copy(
        update={
            "expected": math.exp(gain * math.log1p(plan.delay)),
            "as_expected": high >= gain and low <= most,
        }
    )


def kept_decoder_controls(plan: Plan, level: Level, readings: Readings) -> list[Control]:
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
    tolerance: float = 0.0,
) -> Control:
    """Return a control with its readings; `tolerance` is the accuracy of its delay, as a log."""
    _, metric, name = key
    bound = math.log1p(margin)
    strict_low, _ = estimate.interval(corrected_confidence(tests))
    wide_low, wide_high = estimate.interval(DELAY_CONFIDENCE)
    return Control(
        arm=arm,
        metric=metric,
        statistic=name,
        # Not `margin` itself: published verdicts hold the rounding of this.
        margin=math.expm1(bound),
        ratio=estimate.ratio,
        interval=ratio_interval(estimate, CONFIDENCE),
        wide_interval=ratio_interval(estimate, DELAY_CONFIDENCE),
        restart_ratios=np.exp(differences).tolist(),
        detected=strict_low > bound,
        expected=expected,
        as_expected=None
        if expected is None
        else wide_low - tolerance <= math.log(expected) <= wide_high + tolerance,
    )


def control_gates(plan: Plan, controls: Sequence[Control]) -> list[Gate]:
    """Return the gates of each control: detected, and as slow as it was made."""
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
            is_unloaded = all(item.expected == 1 + plan.delay for item in of_known_size)
            intervals = [
                f"{control.statistic} {format_interval(control.wide_interval)}"
                for control in of_known_size
            ]
            gates.append(
                Gate(
                    name=f"{name} is as slow as it was made",
                    passed=all(control.as_expected for control in of_known_size),
                    measured=f"made {format_percent(1 + plan.delay)}"
                    + ("; 99.5 %: " if is_unloaded else " × gain; 99.5 %: ")
                    + "; ".join(intervals),
                    undecided=_why_undecided(of_known_size),
                )
            )
    return gates


def _why_undecided(controls: Sequence[Control]) -> str:
    """Return why intervals that hold the delay tell nothing of it; empty if one tells."""
    for control in controls:
        low, high = control.wide_interval
        if not control.as_expected or not low <= 1 <= high:
            return ""
    return "the intervals hold no delay at all, too"
