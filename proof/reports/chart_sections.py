"""
The sections of a report that are mostly charts; each function returns the data of one section.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from proof.evidence.statistics import Estimate, Matrix, plain_contrast
from proof.reports import charts
from proof.reports.distributions import (
    DECILES,
    PHASES,
    Distribution,
    LevelProfile,
    estimate_shift_function,
    per_request_metrics,
)
from proof.reports.drawing import Shape
from proof.reports.formatting import format_difference
from proof.reports.page import Column, Figure, Table
from proof.reports.reported_run import ReportedLevel, ReportedRun
from proof.verdict.schema import Contrast, Control, LevelVerdict, Statistic, metric_label

CONFIDENCE = 0.90
"""Confidence of the intervals that only a report shows, as in the verdict."""

SHARES = (
    (20_000, (0.01, 0.1, 0.5, 0.9, 0.99, 0.999)),
    (1_000, (0.01, 0.1, 0.5, 0.9, 0.99)),
    (0, (0.1, 0.5, 0.9)),
)
"""(requests, shares): how far into the tails a distribution is drawn with so many requests."""
CURVE_POINTS = 200
"""Points of one curve of a distribution."""
TIME_COURSE_REACH_IN_MARGINS = 8
"""Intervals along a restart are cut beyond this many of the tightest margins."""

TimeCourse = list[tuple[float, charts.Bounds]]
"""(ratio, interval) of each part of a restart."""


@dataclass(frozen=True)
class ControlFigure:
    """The intervals of one control arm."""

    arm: str
    is_detected: bool
    """Whether the judge detected the control's difference from the reference."""
    expected: str
    """Difference that the control was built to have; empty if it is unknown."""
    chart: Markup


@dataclass(frozen=True)
class SameModelFigure:
    """The intervals of an A/A comparison: a model loaded twice."""

    first: str
    second: str
    is_biased: bool
    chart: Markup


@dataclass(frozen=True)
class LevelDifferences:
    """The intervals of one level."""

    level: str
    verdict: str
    """Title of the level's verdict."""
    restarts: int
    """Number of restarts that count."""
    candidate: str
    reference: str
    chart: Markup | None
    """Forest plot of the claimed statistics; None if there are too few restarts."""
    controls: Sequence[ControlFigure]
    same_model: Sequence[SameModelFigure]


def build_differences(run: ReportedRun) -> list[LevelDifferences]:
    """Return the intervals that the verdict rests on, level by level."""
    return [_level_differences(run, level) for level in run.levels]


def _level_differences(run: ReportedRun, level: ReportedLevel) -> LevelDifferences:
    verdict = level.verdict
    claim = run.verdict.claim
    rows = [_interval(item, *claim_marker(item, claim)) for item in verdict.statistics]
    return LevelDifferences(
        level=level.name,
        verdict=level.style.title,
        restarts=verdict.restarts_kept,
        candidate=" and ".join(run.arms("candidate")),
        reference=" and ".join(run.arms("reference")),
        chart=charts.draw_forest(rows, f"Differences at {level.name}") if rows else None,
        controls=list(_control_figures(run, verdict)),
        same_model=list(_same_model_figures(verdict)),
    )


def _interval(
    item: Statistic | Control | Contrast,
    shape: Shape,
    css_class: str,
    expected: float | None = None,
) -> charts.Interval:
    name = f"{metric_label(item.metric)} {item.statistic}"
    return charts.Interval(name, item.ratio, item.interval, item.margin, shape, css_class, expected)


def claim_marker(item: Statistic, claim: str) -> tuple[Shape, str]:
    """Return the shape and CSS class of the marker of a claimed statistic."""
    may_be_faster = claim == "non-inferiority"
    if item.outside == "slower":
        return "right", "bad"
    if item.outside == "faster" and not may_be_faster:
        return "left", "bad"
    holds = item.equivalent or (may_be_faster and item.not_slower)
    return "circle" if holds else "ring", "reference"


def _control_figures(run: ReportedRun, verdict: LevelVerdict) -> Iterator[ControlFigure]:
    for arm in dict.fromkeys(control.arm for control in verdict.controls):
        controls = [control for control in verdict.controls if control.arm == arm]
        css_class = "delayed" if arm in run.arms("delayed") else "control"
        rows = [
            _interval(item, "diamond" if item.detected else "ring", css_class, item.expected)
            for item in controls
        ]
        expected = [format_difference(item.expected) for item in controls if item.expected]
        yield ControlFigure(
            arm=arm,
            is_detected=any(control.detected for control in controls),
            expected=expected[0] if expected else "",
            chart=charts.draw_forest(rows, f"Control {arm}", compact=True, centred=False),
        )


def _same_model_figures(verdict: LevelVerdict) -> Iterator[SameModelFigure]:
    for arms in dict.fromkeys(contrast.arms for contrast in verdict.same_model):
        first, second = arms
        contrasts = [contrast for contrast in verdict.same_model if contrast.arms == arms]
        rows = [_interval(item, *_same_model_marker(item)) for item in contrasts]
        yield SameModelFigure(
            first=first,
            second=second,
            is_biased=any(contrast.biased for contrast in contrasts),
            chart=charts.draw_forest(rows, f"A/A {second} over {first}", compact=True),
        )


def _same_model_marker(item: Contrast) -> tuple[Shape, str]:
    if item.biased:
        return "right" if item.ratio > 1 else "left", "bad"
    return "circle" if item.equivalent else "ring", "reference"


def build_restarts(run: ReportedRun) -> list[Figure]:
    """Return the ratio of every restart, level by level."""
    figures = []
    for level in run.levels:
        rows = [
            charts.Strip(
                f"{metric_label(item.metric)} {item.statistic}",
                item.restart_ratios,
                item.ratio,
                item.margin,
            )
            for item in level.verdict.statistics
            if item.restart_ratios
        ]
        if rows:
            title = f"Ratio of every restart at {level.name}"
            chart = charts.draw_strips(rows, run.counted_restarts, title)
            figures.append(Figure(level.name, "", chart))
    return figures


def build_deciles(run: ReportedRun) -> list[Figure]:
    """Return a shift function for each claimed metric, level by level."""
    figures = []
    for level in run.levels:
        for metric in per_request_metrics(level.plan):
            estimates = estimate_shift_function(run.plan, level.profile, metric)
            if estimates:
                title = f"Shift function of {metric_label(metric)} at {level.name}"
                points = [
                    (f"p{decile}", estimate.ratio, _bounds(estimate))
                    for decile, estimate in zip(DECILES, estimates, strict=True)
                ]
                chart = charts.draw_shift_function(points, _tightest_margin(level, metric), title)
                figures.append(Figure(level.name, metric_label(metric), chart))
    return figures


def _bounds(estimate: Estimate) -> charts.Bounds:
    """Return the interval of an estimate as ratios."""
    low, high = estimate.interval(CONFIDENCE)
    return math.exp(low), math.exp(high)


def _tightest_margin(level: ReportedLevel, metric: str) -> float:
    return min(margin for claimed, _, margin in level.plan.claimed if claimed == metric)


def build_distributions(run: ReportedRun) -> list[Figure]:
    """Return the distributions of each claimed metric, level by level."""
    figures = []
    for level in run.levels:
        for metric in per_request_metrics(level.plan):
            reference = level.profile.distributions.get(("reference", metric))
            candidate = level.profile.distributions.get(("candidate", metric))
            if reference and candidate:
                title = f"Distribution of {metric_label(metric)} at {level.name}"
                chart = _draw_distributions(reference, candidate, title)
                figures.append(Figure(level.name, metric_label(metric), chart))
    return figures


def _draw_distributions(reference: Distribution, candidate: Distribution, title: str) -> Markup:
    requests = min(len(reference), len(candidate))
    shares = next(shares for minimum, shares in SHARES if requests >= minimum)
    points = _stretched_shares(shares[0], shares[-1])
    return charts.draw_distributions(
        list(zip(points, reference.quantiles(points), strict=True)),
        list(zip(points, candidate.quantiles(points), strict=True)),
        shares,
        title,
    )


def _stretched_shares(low: float, high: float) -> list[float]:
    """Return shares from `low` to `high` that are closer together at both ends."""
    begin, end = (math.log(share / (1 - share)) for share in (low, high))
    shares = 1 / (1 + np.exp(-np.linspace(begin, end, CURVE_POINTS)))
    return [low, *shares[1:-1].tolist(), high]


def build_time_courses(run: ReportedRun) -> list[Figure]:
    """Return the ratios along a restart, level by level: A/A above, candidate below."""
    figures: list[Figure] = []
    for level in run.levels:
        if len(level.profile.candidate) >= 2:
            first, second = run.arms("reference")
            figures += _level_time_courses(level, f"{second} over {first}")
    return figures


def _level_time_courses(level: ReportedLevel, same_model_name: str) -> Iterator[Figure]:
    same_model = _time_course(level.profile.same_model)
    candidate = _time_course(level.profile.candidate)
    margin = level.plan.tightest_margin
    reach = _shared_reach([*same_model, *candidate], margin)
    styles: Iterable[tuple[str, TimeCourse, Shape, str]] = (
        (same_model_name, same_model, "circle", "reference"),
        ("candidate over reference", candidate, "diamond", "candidate"),
    )
    for name, points, shape, css_class in styles:
        title = f"{name} along a restart at {level.name}"
        chart = charts.draw_time_course(points, margin, shape, css_class, reach, title)
        yield Figure(level.name, name, chart)


def _time_course(restarts: Sequence[Matrix]) -> TimeCourse:
    """Return the ratio and interval of each part, over restarts."""
    estimates = [plain_contrast(np.array(part)) for part in zip(*restarts, strict=False)]
    return [(estimate.ratio, _bounds(estimate)) for estimate in estimates]


def _shared_reach(points: TimeCourse, margin: float) -> float:
    """Return the log ratio that both charts of a level reach, so that they can be compared.

    Intervals may be cut, ratios are not.
    """
    widest = max(abs(math.log(end)) for _, interval in points for end in interval)
    furthest = max(abs(math.log(ratio)) for ratio, _ in points)
    return max(min(widest, TIME_COURSE_REACH_IN_MARGINS * math.log1p(margin)), 1.1 * furthest)


@dataclass(frozen=True)
class LevelPhases:
    """Where the time of one level's requests went."""

    level: str
    chart: Markup
    table: Table


def build_phases(run: ReportedRun) -> list[LevelPhases]:
    """Return the mean time in each phase, level by level; empty if servers do not report it."""
    if not run.plan.server_timing:
        return []
    sections = []
    for level in run.levels:
        rows = _mean_phases(run, level.profile)
        if rows:
            chart = charts.draw_phases(rows, f"Where the time goes at {level.name}")
            table = _phases_table(rows, f"Mean milliseconds at {level.name}")
            sections.append(LevelPhases(level.name, chart, table))
    return sections


def _mean_phases(run: ReportedRun, profile: LevelProfile) -> dict[str, dict[str, float]]:
    """Return the mean milliseconds of each phase, by role."""
    return {
        f"{role}: {', '.join(run.arms(role))}": sums.mean_ms()
        for role, sums in profile.phases.items()
    }


def _phases_table(rows: dict[str, dict[str, float]], caption: str) -> Table:
    numeric = [Column(name, is_numeric=True) for name in (*PHASES, "end to end")]
    cells = []
    for role, mean_ms in rows.items():
        total = sum(mean_ms.values())
        cells.append([role, *(f"{ms:.3f}" for ms in (*mean_ms.values(), total))])
    return Table(caption, [Column(""), *numeric], cells)
