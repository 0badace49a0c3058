"""
The charts of a report: intervals, restarts, deciles, distributions, time courses and phases.

Each function takes numbers and returns inline SVG; none knows evidence or verdicts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

from markupsafe import Markup

from proof.reports.drawing import (
    Scale,
    Shape,
    draw_chart,
    draw_curve,
    draw_element,
    draw_label,
    draw_line,
    draw_marker,
    draw_ratio_axis,
    draw_ratio_grid,
    draw_rectangle,
    draw_side_label,
    time_ticks,
)
from proof.reports.formatting import format_difference, format_range

# Intervals and dots further out than this many of the widest margins become arrows at the edge.
REACH_IN_MARGINS = 6
LEFT, RIGHT = 7.0, 93.0
"""Ends of a ratio axis, in percent of the chart's width."""

Bounds = tuple[float, float]


@dataclass(frozen=True)
class Interval:
    """One ratio with its 90 % interval, as a row of a forest plot."""

    name: str
    ratio: float
    interval: Bounds
    margin: float
    """Largest relative difference that counts as equal; it is shaded."""
    shape: Shape
    """Shape of the marker at the ratio."""
    css_class: str
    """Colour of marker and line, as a class of style.css."""
    expected: float | None = None
    """Ratio that a control is expected to have; a dashed line shows it."""


def draw_forest(
    rows: Sequence[Interval], title: str, compact: bool = False, centred: bool = True
) -> Markup:
    """Draw a forest plot: one row for each interval, its margin shaded, on a log scale.

    No difference is in the middle of the chart; with `centred=False` the scale is fitted to the
    intervals instead, and none of them is cut.
    """
    scale = _forest_scale(rows, centred)
    height, half_band = (38, 7) if compact else (48, 10)
    bottom = height * len(rows) + 4
    shapes = list(draw_ratio_axis(scale, 0, bottom))
    descriptions = []
    for index, row in enumerate(rows):
        middle = height * (index + 1) - half_band - 5
        shapes += _draw_band(row, scale, middle, half_band)
        shapes += _draw_row_labels(row, height * index + 14, compact)
        shapes += _draw_interval(row, scale, middle, half_band, 3.5 if compact else 5)
        descriptions.append(
            f"{row.name}: {format_difference(row.ratio)}, 90 % interval"
            f" {format_range(*row.interval)}, margin ±{row.margin:.3g}"
        )
    return draw_chart(bottom + 24, title, "; ".join(descriptions), shapes)


def _forest_scale(rows: Sequence[Interval], centred: bool) -> Scale:
    widest = max(math.log1p(row.margin) for row in rows)
    ends = []
    for row in rows:
        ends += [math.log(ratio) for ratio in (*row.interval, row.expected or 1.0)]
    if centred:
        reach = min(max(1.5 * widest, 1.08 * max(map(abs, ends))), REACH_IN_MARGINS * widest)
        return Scale(-reach, reach, LEFT, RIGHT)
    low, high = min(-1.5 * widest, *ends), max(1.5 * widest, *ends)
    padding = 0.05 * (high - low)
    return Scale(low - padding, high + padding, LEFT, RIGHT)


def _draw_band(row: Interval, scale: Scale, middle: float, half: float) -> Iterator[Markup]:
    """Yield the shaded margin of a row, with an edge where it ends inside the chart."""
    bound = math.log1p(row.margin)
    yield draw_rectangle(scale(-bound), scale(bound), middle - half, 2 * half, "band")
    for edge in (-bound, bound):
        if scale.contains(edge):
            yield draw_line(scale(edge), middle - half, scale(edge), middle + half, "edge")


def _draw_row_labels(row: Interval, y: float, compact: bool) -> Iterator[Markup]:
    yield draw_label(0, y, row.name)
    numbers = f"{format_difference(row.ratio)} ({format_range(*row.interval)})"
    yield draw_label(100, y, numbers, "end", soft=compact)


def _draw_interval(
    row: Interval, scale: Scale, middle: float, half: float, size: float
) -> Iterator[Markup]:
    """Yield the whisker of a row, what is expected of it, and the marker of its ratio."""
    whisker = f"whisker {row.css_class}"
    low, high = (math.log(ratio) for ratio in row.interval)
    yield draw_line(scale(low), middle, scale(high), middle, whisker)
    ends: tuple[tuple[float, Shape], ...] = ((low, "left"), (high, "right"))
    for end, arrow in ends:
        if scale.contains(end):
            yield draw_line(scale(end), middle - 4, scale(end), middle + 4, whisker)
        else:
            yield draw_marker(arrow, scale(end), middle, row.css_class, 4)
    if row.expected is not None:
        x = scale(math.log(row.expected))
        yield draw_line(x, middle - half - 3, x, middle + half + 3, "expected")
    yield draw_marker(row.shape, scale(math.log(row.ratio)), middle, row.css_class, size)


@dataclass(frozen=True)
class Strip:
    """One statistic's ratio in every restart, as a row of a strip plot."""

    name: str
    ratios: Sequence[float]
    """One ratio for each restart."""
    ratio: float
    """Estimate over all restarts."""
    margin: float


def draw_strips(rows: Sequence[Strip], restarts: Sequence[int], title: str) -> Markup:
    """Draw a strip plot: one strip for each statistic, one dot for each restart, the first on top.

    The margin is shaded and a vertical line marks the estimate. `restarts` are the numbers of the
    restarts, in the order of each strip's ratios.
    """
    widest = max(math.log1p(row.margin) for row in rows)
    furthest = max(abs(math.log(ratio)) for row in rows for ratio in row.ratios)
    reach = min(max(1.5 * widest, 1.08 * furthest), 2 * REACH_IN_MARGINS * widest)
    scale = Scale(-reach, reach, LEFT, RIGHT)
    step = max(2.0, min(6.0, 60 / len(restarts)))
    band_height = step * len(restarts) + 10
    row_height = band_height + 26
    bottom = row_height * len(rows) + 2
    shapes = list(draw_ratio_axis(scale, 0, bottom))
    descriptions = []
    for index, row in enumerate(rows):
        top = row_height * index + 20
        shapes += _draw_strip_frame(row, scale, top, band_height)
        for place, (restart, ratio) in enumerate(zip(restarts, row.ratios, strict=True)):
            shapes.append(_draw_restart(restart, ratio, scale, top + 5 + step * (place + 0.5)))
        ratios = ", ".join(format_difference(ratio) for ratio in row.ratios)
        descriptions.append(f"{row.name}: {ratios}")
    return draw_chart(bottom + 24, title, "; ".join(descriptions), shapes)


def _draw_strip_frame(row: Strip, scale: Scale, top: float, height: float) -> Iterator[Markup]:
    bound = math.log1p(row.margin)
    yield draw_rectangle(scale(-bound), scale(bound), top, height, "band")
    for edge in (-bound, bound):
        yield draw_line(scale(edge), top, scale(edge), top + height, "edge")
    yield draw_label(0, top - 6, row.name)
    yield draw_label(100, top - 6, format_range(min(row.ratios), max(row.ratios)), "end")
    estimate = scale(math.log(row.ratio))
    yield draw_line(estimate, top, estimate, top + height, "mean")


def _draw_restart(restart: int, ratio: float, scale: Scale, y: float) -> Markup:
    value = math.log(ratio)
    shape: Shape = "right" if value > 0 else "left"
    if scale.contains(value):
        shape = "circle"
    tooltip = f"restart {restart}: {format_difference(ratio)}"
    return draw_marker(shape, scale(value), y, "restart", 3.5, tooltip)


def draw_shift_function(
    points: Sequence[tuple[str, float, Bounds]], margin: float, title: str, height: float = 190
) -> Markup:
    """Draw (decile, ratio, interval) from the first decile to the last, the margin shaded."""
    bound = math.log1p(margin)
    ends = [math.log(end) for _, _, interval in points for end in interval]
    y = Scale(min(-1.3 * bound, *ends), max(1.3 * bound, *ends), height - 30, 4)
    x = Scale(0, len(points) - 1, 5, 95)
    line = [(x(index), y(math.log(ratio))) for index, (_, ratio, _) in enumerate(points)]
    shapes = [
        *_draw_margin_band(y, bound),
        *draw_ratio_grid(y),
        draw_curve(line, height, "thin candidate"),
    ]
    descriptions = []
    for index, (decile, ratio, interval) in enumerate(points):
        low, high = (y(math.log(end)) for end in interval)
        description = f"{decile}: {format_difference(ratio)} ({format_range(*interval)})"
        shapes += [
            draw_line(x(index), low, x(index), high, "whisker candidate"),
            draw_marker("circle", *line[index], "candidate", 4, description),
            draw_label(x(index), height - 10, decile, "middle", soft=True),
        ]
        descriptions.append(description)
    return draw_chart(height, title, "; ".join(descriptions), shapes, margin_left=True)


def _draw_margin_band(y: Scale, bound: float) -> Iterator[Markup]:
    """Yield the shaded margin across the whole width of a chart."""
    yield draw_rectangle(0, 100, y(bound), y(-bound) - y(bound), "band")
    for edge in (bound, -bound):
        yield draw_line(0, y(edge), 100, y(edge), "edge")


Curve = Sequence[tuple[float, float]]
"""Points (share of requests, µs) of a cumulative distribution."""


def draw_distributions(
    reference: Curve, candidate: Curve, shares: Sequence[float], title: str, height: float = 260
) -> Markup:
    """Draw two cumulative distributions: the reference broad, the candidate dashed on top.

    Times are on a log scale and shares on a normal scale, which stretches both tails. `shares` get
    a grid line, and a marker on each curve.
    """
    inverse_normal = NormalDist().inv_cdf
    low_us, high_us = _padded_time_range(reference, candidate)
    x = Scale(math.log(low_us), math.log(high_us), 0, 100)
    first, last = (inverse_normal(reference[end][0]) for end in (0, -1))
    y = Scale(first, last, height - 30, 8)
    shapes = []
    for share in shares:
        at = y(inverse_normal(share))
        shapes += [draw_line(0, at, 100, at, "grid"), draw_side_label(at, f"{100 * share:g}%")]
    for value, label in time_ticks(low_us, high_us):
        shapes.append(draw_line(x(value), 8, x(value), height - 26, "grid"))
        shapes.append(draw_label(x(value), height - 10, label, "middle", soft=True))
    for curve, css_class in ((reference, "broad reference"), (candidate, "dashed candidate")):
        line = [(x(math.log(us)), y(inverse_normal(share))) for share, us in curve]
        shapes.append(draw_curve(line, height, css_class))
    descriptions = []
    for share in shares:
        at = y(inverse_normal(share))
        reference_us, candidate_us = _time_at(reference, share), _time_at(candidate, share)
        within = f"{100 * share:g} % within"
        shapes += [
            draw_marker(
                "ring",
                x(math.log(reference_us)),
                at,
                "reference",
                6,
                f"{within} {reference_us / 1000:.3f} ms",
            ),
            draw_marker(
                "diamond",
                x(math.log(candidate_us)),
                at,
                "candidate",
                3,
                f"{within} {candidate_us / 1000:.3f} ms",
            ),
        ]
        descriptions.append(
            f"{100 * share:g} %: reference {reference_us / 1000:.3f} ms,"
            f" candidate {candidate_us / 1000:.3f} ms"
        )
    return draw_chart(height, title, "; ".join(descriptions), shapes, margin_left=True)


def _padded_time_range(reference: Curve, candidate: Curve) -> Bounds:
    times = [us for curve in (reference, candidate) for _, us in curve]
    low, high = min(times), max(times)
    padding = (high / low) ** 0.03 if high > low else 1.02
    return low / padding, high * padding


def _time_at(curve: Curve, share: float) -> float:
    """Return the time (µs) of the curve's point that is nearest to a share."""
    return min(curve, key=lambda point: abs(point[0] - share))[1]


def draw_time_course(
    points: Sequence[tuple[float, Bounds]],
    margin: float,
    shape: Shape,
    css_class: str,
    reach: float,
    title: str,
    height: float = 150,
) -> Markup:
    """Draw (ratio, interval) along a restart, from its first blocks to its last.

    The scale reaches `reach` on either side of no difference (log ratio), so that several charts
    can share it; intervals beyond are cut.
    """
    bound = math.log1p(margin)
    reach = max(reach, 1.2 * bound)
    y = Scale(-reach, reach, height - 26, 4)
    x = Scale(0, max(1, len(points) - 1), 3, 97)
    shapes = [*_draw_margin_band(y, bound), *draw_ratio_grid(y)]
    size = 3.5 if shape == "circle" else 3
    for index, (ratio, interval) in enumerate(points):
        low, high = (y(math.log(end)) for end in interval)
        tooltip = f"part {index + 1} of {len(points)}: {format_difference(ratio)}"
        shapes += [
            draw_line(x(index), low, x(index), high, f"fine {css_class}"),
            draw_marker(shape, x(index), y(math.log(ratio)), css_class, size, tooltip),
        ]
    shapes += [
        draw_label(0, height - 6, "first blocks", "start", soft=True),
        draw_label(100, height - 6, "last", "end", soft=True),
    ]
    description = ", ".join(format_difference(ratio) for ratio, _ in points)
    return draw_chart(height, title, description, shapes, margin_left=True)


def draw_phases(rows: Mapping[str, Mapping[str, float]], title: str) -> Markup:
    """Draw one bar for each role, its phases (milliseconds) stacked."""
    longest = max(sum(phases.values()) for phases in rows.values())
    scale = Scale(0, longest, 0, 100)
    row_height = 52
    shapes, descriptions = [], []
    for index, (role, phases) in enumerate(rows.items()):
        top = row_height * index
        shapes.append(draw_label(0, top + 14, role))
        shapes.append(draw_label(100, top + 14, f"{sum(phases.values()):.3f} ms", "end"))
        shapes += _draw_bar(role, phases, scale, top + 20)
        parts = ", ".join(f"{phase} {ms:.3f} ms" for phase, ms in phases.items())
        descriptions.append(f"{role}: {parts}")
    return draw_chart(row_height * len(rows), title, "; ".join(descriptions), shapes)


def _draw_bar(role: str, phases: Mapping[str, float], scale: Scale, top: int) -> Iterator[Markup]:
    """Yield the segments of one bar; a segment is labelled where its name fits."""
    end_ms = 0.0
    for phase, ms in phases.items():
        begin_ms, end_ms = end_ms, end_ms + max(0.0, ms)
        width = scale(end_ms) - scale(begin_ms)
        yield draw_element(
            "rect",
            draw_element("title", f"{role}: {phase} {ms:.3f} ms"),
            x=f"{scale(begin_ms):.2f}%",
            y=top,
            width=f"{width:.2f}%",
            height=22,
            class_=f"phase {phase}",
        )
        if width > 2.4 * len(phase) + 1:
            yield draw_element(
                "text",
                phase,
                x=f"{scale((begin_ms + end_ms) / 2):.2f}%",
                y=top + 15,
                text_anchor="middle",
                class_="on",
            )
