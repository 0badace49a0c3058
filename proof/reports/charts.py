"""
The pictures of a report: intervals, restarts, deciles, distributions, time of day, phases.

Each takes numbers and returns inline SVG; none knows evidence or verdicts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

from proof.reports.drawing import (
    Html,
    Scale,
    beside,
    box,
    curve,
    label,
    line,
    marker,
    percent,
    picture,
    ratio_axis,
    ratio_levels,
    span,
    text,
    time_ticks,
)

# Intervals and dots further out than so many of the widest margins are drawn at the edge, as
# arrows.
REACH_IN_MARGINS = 6
LEFT, RIGHT = 7.0, 93.0

Bounds = tuple[float, float]


@dataclass(frozen=True)
class Interval:
    """One ratio with its 90 % interval; `mark` is the shape of its dot."""

    name: str
    ratio: float
    interval: Bounds
    margin: float
    mark: str
    kind: str
    expected: float | None = None


def forest(rows: Sequence[Interval], title: str, small: bool = False, whole: bool = False) -> Html:
    """A row an interval, its margin shaded; on a log scale with no difference in the middle, or, if
    `whole`, at the left.
    """
    widest = max(math.log1p(row.margin) for row in rows)
    ends = [math.log(x) for row in rows for x in (*row.interval, row.expected or 1.0)]
    if whole:
        low, high = min(-1.5 * widest, *ends), max(1.5 * widest, *ends)
        pad = 0.05 * (high - low)
        scale = Scale(low - pad, high + pad, LEFT, RIGHT)
    else:
        reach = min(max(1.5 * widest, 1.08 * max(map(abs, ends))), REACH_IN_MARGINS * widest)
        scale = Scale(-reach, reach, LEFT, RIGHT)
    height, half = (38, 7) if small else (48, 10)
    bottom = height * len(rows) + 4
    shapes, said = ratio_axis(scale, 0, bottom), []
    for n, row in enumerate(rows):
        said.append(
            f"{row.name}: {percent(row.ratio)}, 90 % interval {span(*row.interval)}, margin"
            f" ±{row.margin:.3g}"
        )
        shapes += _interval(row, scale, height * n, height - half - 5, half, small)
    return picture(bottom + 24, title, "; ".join(said), shapes)


def _interval(
    row: Interval, scale: Scale, top: float, middle: float, half: float, small: bool
) -> list[str]:
    y, bound = top + middle, math.log1p(row.margin)
    low, high = (math.log(x) for x in row.interval)
    shapes = [
        box(scale(-bound), scale(bound), y - half, 2 * half, "band"),
        *(
            line(scale(x), y - half, scale(x), y + half, "edge")
            for x in (-bound, bound)
            if scale.holds(x)
        ),
        label(0, top + 14, row.name),
        label(100, top + 14, f"{percent(row.ratio)} ({span(*row.interval)})", "end", soft=small),
        line(scale(low), y, scale(high), y, f"whisker {row.kind}"),
    ]
    for end, shape in ((low, "left"), (high, "right")):
        if scale.holds(end):
            shapes.append(line(scale(end), y - 4, scale(end), y + 4, f"whisker {row.kind}"))
        else:
            shapes.append(marker(shape, scale(end), y, row.kind, 4))
    if row.expected is not None:
        x = scale(math.log(row.expected))
        shapes.append(line(x, y - half - 3, x, y + half + 3, "expected"))
    shapes.append(marker(row.mark, scale(math.log(row.ratio)), y, row.kind, 3.5 if small else 5))
    return shapes


@dataclass(frozen=True)
class Strip:
    """One statistic's ratio in every restart."""

    name: str
    ratios: Sequence[float]
    ratio: float
    margin: float


def dots(rows: Sequence[Strip], restarts: Sequence[int], title: str) -> Html:
    """A strip a statistic, a dot a restart, the first on top; the margin is shaded and the estimate
    a bar.
    """
    widest = max(math.log1p(row.margin) for row in rows)
    furthest = max(abs(math.log(r)) for row in rows for r in row.ratios)
    reach = min(max(1.5 * widest, 1.08 * furthest), 2 * REACH_IN_MARGINS * widest)
    scale = Scale(-reach, reach, LEFT, RIGHT)
    step = max(2.0, min(6.0, 60 / len(restarts)))
    inner = step * len(restarts) + 10
    height = inner + 26
    bottom = height * len(rows) + 2
    shapes = ratio_axis(scale, 0, bottom)
    for n, row in enumerate(rows):
        top = height * n + 20
        bound = math.log1p(row.margin)
        shapes += [
            box(scale(-bound), scale(bound), top, inner, "band"),
            *(line(scale(x), top, scale(x), top + inner, "edge") for x in (-bound, bound)),
            label(0, top - 6, row.name),
            label(100, top - 6, f"{span(min(row.ratios), max(row.ratios))}", "end"),
            line(scale(math.log(row.ratio)), top, scale(math.log(row.ratio)), top + inner, "mean"),
        ]
        for i, (restart, ratio) in enumerate(zip(restarts, row.ratios, strict=True)):
            value = math.log(ratio)
            shape = "circle" if scale.holds(value) else "right" if value > 0 else "left"
            shapes.append(
                marker(
                    shape,
                    scale(value),
                    top + 5 + step * (i + 0.5),
                    "restart",
                    3.5,
                    f"restart {restart}: {percent(ratio)}",
                )
            )
    said = "; ".join(f"{row.name}: {', '.join(percent(r) for r in row.ratios)}" for row in rows)
    return picture(bottom + 24, title, said, shapes)


def shift(
    points: Sequence[tuple[str, float, Bounds]], margin: float, title: str, height: float = 190
) -> Html:
    """Ratio and interval at each decile."""
    bound = math.log1p(margin)
    ends = [math.log(x) for _, _, interval in points for x in interval]
    low, high = min(-1.3 * bound, *ends), max(1.3 * bound, *ends)
    y = Scale(low, high, height - 30, 4)
    x = Scale(0, len(points) - 1, 5, 95)
    shapes = [
        box(0, 100, y(bound), y(-bound) - y(bound), "band"),
        line(0, y(bound), 100, y(bound), "edge"),
        line(0, y(-bound), 100, y(-bound), "edge"),
        *ratio_levels(y),
        curve(
            [(x(i), y(math.log(ratio))) for i, (_, ratio, _) in enumerate(points)],
            height,
            "thin candidate",
        ),
    ]
    for i, (name, ratio, (first, last)) in enumerate(points):
        shapes += [
            line(x(i), y(math.log(first)), x(i), y(math.log(last)), "whisker candidate"),
            marker(
                "circle",
                x(i),
                y(math.log(ratio)),
                "candidate",
                4,
                f"{name}: {percent(ratio)} ({span(first, last)})",
            ),
            label(x(i), height - 10, name, "middle", soft=True),
        ]
    said = "; ".join(
        f"{name}: {percent(ratio)} ({span(*interval)})" for name, ratio, interval in points
    )
    return picture(height, title, said, shapes, sided=True)


def distributions(
    reference: Sequence[tuple[float, float]],
    candidate: Sequence[tuple[float, float]],
    shares: Sequence[float],
    title: str,
    height: float = 260,
) -> Html:
    """ECDFs of points (share, µs): the reference a broad line, the candidate a dashed one on top,
    both ends stretched.
    """
    stretch = NormalDist().inv_cdf
    times = [us for points in (reference, candidate) for _, us in points]
    low, high = min(times), max(times)
    pad = (high / low) ** 0.03 if high > low else 1.02
    low, high = low / pad, high * pad
    x = Scale(math.log(low), math.log(high), 0, 100)
    y = Scale(stretch(reference[0][0]), stretch(reference[-1][0]), height - 30, 8)
    shapes = []
    for share in shares:
        at = y(stretch(share))
        shapes += [line(0, at, 100, at, "grid"), beside(at, f"{100 * share:g}%")]
    for value, name in time_ticks(low, high):
        shapes += [
            line(x(value), 8, x(value), height - 26, "grid"),
            label(x(value), height - 10, name, "middle", soft=True),
        ]
    for points, kind in ((reference, "broad reference"), (candidate, "dashed candidate")):
        shapes.append(
            curve([(x(math.log(us)), y(stretch(share))) for share, us in points], height, kind)
        )
    said = []
    for share in shares:
        pair = [
            min(points, key=lambda point: abs(point[0] - share))[1]
            for points in (reference, candidate)
        ]
        for us, shape, kind, size in (
            (pair[0], "ring", "reference", 6.0),
            (pair[1], "diamond", "candidate", 3.0),
        ):
            shapes.append(
                marker(
                    shape,
                    x(math.log(us)),
                    y(stretch(share)),
                    kind,
                    size,
                    f"{100 * share:g} % within {us / 1000:.3f} ms",
                )
            )
        said.append(
            f"{100 * share:g} %: reference {pair[0] / 1000:.3f} ms, candidate"
            f" {pair[1] / 1000:.3f} ms"
        )
    return picture(height, title, "; ".join(said), shapes, sided=True)


def over_time(
    points: Sequence[tuple[float, Bounds | None]],
    margin: float,
    shape: str,
    kind: str,
    reach: float,
    title: str,
    height: float = 150,
) -> Html:
    """Ratio and interval along a restart, from its first tuples to its last."""
    reach = max(reach, 1.2 * math.log1p(margin))
    y = Scale(-reach, reach, height - 26, 4)
    x = Scale(0, max(1, len(points) - 1), 3, 97)
    bound = math.log1p(margin)
    shapes = [
        box(0, 100, y(bound), y(-bound) - y(bound), "band"),
        line(0, y(bound), 100, y(bound), "edge"),
        line(0, y(-bound), 100, y(-bound), "edge"),
        *ratio_levels(y),
    ]
    for i, (ratio, interval) in enumerate(points):
        if interval is not None:
            shapes.append(
                line(x(i), y(math.log(interval[0])), x(i), y(math.log(interval[1])), f"fine {kind}")
            )
        shapes.append(
            marker(
                shape,
                x(i),
                y(math.log(ratio)),
                kind,
                3.5 if shape == "circle" else 3,
                f"part {i + 1} of {len(points)}: {percent(ratio)}",
            )
        )
    shapes += [
        label(0, height - 6, "first tuples", "start", soft=True),
        label(100, height - 6, "last", "end", soft=True),
    ]
    return picture(
        height, title, ", ".join(percent(ratio) for ratio, _ in points), shapes, sided=True
    )


def phases(rows: Mapping[str, Mapping[str, float]], title: str) -> Html:
    """A bar a role, its parts in milliseconds side by side."""
    longest = max(sum(parts.values()) for parts in rows.values())
    scale = Scale(0, longest, 0, 100)
    height, shapes, said = 52, [], []
    for n, (role, parts) in enumerate(rows.items()):
        top, begin = height * n, 0.0
        total = sum(parts.values())
        shapes += [label(0, top + 14, role), label(100, top + 14, f"{total:.3f} ms", "end")]
        for phase, ms in parts.items():
            end = begin + max(0.0, ms)
            shapes.append(
                f'<rect x="{scale(begin):.2f}%" y="{top + 20}"'
                f' width="{scale(end) - scale(begin):.2f}%" height="22" class="phase'
                f' {text(phase)}"><title>{text(role)}: {text(phase)} {ms:.3f} ms</title></rect>'
            )
            if scale(end) - scale(begin) > 2.4 * len(phase) + 1:
                shapes.append(
                    f'<text x="{scale((begin + end) / 2):.2f}%" y="{top + 35}" text-anchor="middle"'
                    f' class="on">{text(phase)}</text>'
                )
            begin = end
        said.append(f"{role}: " + ", ".join(f"{phase} {ms:.3f} ms" for phase, ms in parts.items()))
    return picture(height * len(rows), title, "; ".join(said), shapes)
