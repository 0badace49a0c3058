"""
Inline SVG that needs no script and no scaling: the shapes that every chart is drawn with.

Horizontal positions and widths are percentages of the available width; heights and font sizes are
pixels. So a chart fills a desktop and a phone alike, and its text has the same size on both.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from markupsafe import Markup

from proof.reports.formatting import escape_text, format_difference

Shape = Literal["circle", "ring", "diamond", "right", "left"]
Anchor = Literal["start", "middle", "end"]

ROUND_STEPS = tuple(digit * 10.0**power for power in range(-4, 6) for digit in (1, 2, 5))


@dataclass(frozen=True)
class Scale:
    """A linear scale from values to positions; values beyond either end are drawn at that end."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def contains(self, value: float) -> bool:
        """Report whether a value lies between the two ends."""
        return self.low <= value <= self.high


def ratio_ticks(low: float, high: float, limit: int = 5) -> list[tuple[float, str]]:
    """Return (log ratio, label) of at most `limit` round differences between two log ratios.

    0 % is one of them where it lies between the two.
    """
    first, last = math.expm1(low), math.expm1(high)
    for step in ROUND_STEPS:
        multiples = range(math.ceil(first / step - 1e-9), math.floor(last / step + 1e-9) + 1)
        if len(multiples) <= limit:
            return [_ratio_tick(multiple, step) for multiple in multiples]
    return [(0.0, "0%")]


def _ratio_tick(multiple: int, step: float) -> tuple[float, str]:
    digits = max(0, -math.floor(math.log10(step)) - 2)
    label = format_difference(1 + multiple * step, digits) if multiple else "0%"
    return math.log1p(multiple * step), label


def time_ticks(low_us: float, high_us: float, limit: int = 5) -> list[tuple[float, str]]:
    """Return (log µs, label) of at most `limit` round times for a logarithmic axis."""
    return [(math.log(us), f"{us / 1000:g} ms") for us in _round_times(low_us, high_us, limit)]


def _round_times(low_us: float, high_us: float, limit: int) -> list[float]:
    for digits in ((1, 2, 5), (1, 3), (1,)):
        candidates = [digit * 10.0**power for power in range(10) for digit in digits]
        times = [us for us in candidates if low_us <= us <= high_us]
        if 3 <= len(times) <= limit:
            return times
    # The range is too narrow or too wide for round digits: take the multiples of a round step.
    steps = (digit * 10.0**power for power in range(-3, 10) for digit in (1, 2, 5))
    step = next(step for step in steps if high_us / step - low_us / step < limit - 1)
    multiples = range(math.ceil(low_us / step), math.floor(high_us / step) + 1)
    return [multiple * step for multiple in multiples if multiple > 0]


def draw_element(tag: str, *children: str, **attributes: object) -> Markup:
    """Return one SVG element; attribute values and text children are escaped.

    Of an attribute's name, a trailing underscore is dropped (`class_`) and any other becomes a
    hyphen (`text_anchor`).
    """
    names = (name.removesuffix("_").replace("_", "-") for name in attributes)
    pairs = zip(names, attributes.values(), strict=True)
    start = tag + "".join(f' {name}="{escape_text(value)}"' for name, value in pairs)
    if not children:
        return Markup(f"<{start}/>")
    content = "".join(escape_text(child) for child in children)
    return Markup(f"<{start}>{content}</{tag}>")


def draw_chart(
    height: float,
    title: str,
    description: str,
    shapes: Iterable[Markup],
    margin_left: bool = False,
) -> Markup:
    """Return one chart; title and description are for readers who cannot see it.

    `margin_left` leaves room for the labels of `draw_side_label`.
    """
    width = {"class_": "sided"} if margin_left else {"width": "100%"}
    return draw_element(
        "svg",
        draw_element("title", title),
        draw_element("desc", description),
        *shapes,
        **width,
        height=f"{height:.0f}",
        role="img",
        aria_label=title,
    )


def draw_label(
    x: float, y: float, value: str, anchor: Anchor = "start", soft: bool = False
) -> Markup:
    """Return a line of text at (percent, pixels)."""
    style = {"class_": "soft"} if soft else {}
    return draw_element("text", value, x=_percent(x), y=_pixels(y), text_anchor=anchor, **style)


def draw_side_label(y: float, value: str) -> Markup:
    """Return a label left of a chart with `margin_left`."""
    return draw_element("text", value, x="-8", y=_pixels(y + 4), text_anchor="end", class_="soft")


def draw_line(x1: float, y1: float, x2: float, y2: float, css_class: str) -> Markup:
    """Return a straight line between two points (percent, pixels)."""
    return draw_element(
        "line",
        x1=_percent(x1),
        y1=_pixels(y1),
        x2=_percent(x2),
        y2=_pixels(y2),
        class_=css_class,
    )


def draw_rectangle(x1: float, x2: float, y: float, height: float, css_class: str) -> Markup:
    """Return a filled rectangle from one percentage of the width to another."""
    return draw_element(
        "rect",
        x=_percent(min(x1, x2)),
        y=_pixels(y),
        width=_percent(abs(x2 - x1)),
        height=_pixels(height),
        class_=css_class,
    )


def draw_marker(
    shape: Shape, x: float, y: float, css_class: str, size: float = 5.0, tooltip: str = ""
) -> Markup:
    """Return a marker whose shape carries the same information as its colour."""
    children = (draw_element("title", tooltip),) if tooltip else ()
    if shape in ("circle", "ring"):
        return draw_element(
            "circle",
            *children,
            cx=_percent(x),
            cy=_pixels(y),
            r=f"{size:g}",
            class_=f"{shape} {css_class}",
        )
    polygon = draw_element("polygon", *children, points=_outline(shape, size), class_=css_class)
    # Only a nested <svg> can be placed by a percentage and still keep its shape.
    return draw_element("svg", polygon, x=_percent(x), y=_pixels(y), overflow="visible")


def _outline(shape: Shape, size: float) -> str:
    reach = size * 1.25
    corners = {
        "diamond": ((0, -reach), (reach, 0), (0, reach), (-reach, 0)),
        "right": ((-reach, -reach), (reach, 0), (-reach, reach)),
        "left": ((reach, -reach), (-reach, 0), (reach, reach)),
    }[shape]
    return " ".join(f"{x:g},{y:g}" for x, y in corners)


def draw_curve(points: Sequence[tuple[float, float]], height: float, css_class: str) -> Markup:
    """Return a line through points (percent, pixels) that is equally thick at every width."""
    polyline = draw_element(
        "polyline",
        points=" ".join(f"{x:.2f},{y:.1f}" for x, y in points),
        class_=css_class,
        vector_effect="non-scaling-stroke",
    )
    return draw_element(
        "svg",
        polyline,
        width="100%",
        height=f"{height:.0f}",
        viewBox=f"0 0 100 {height:.0f}",
        preserveAspectRatio="none",
    )


def draw_ratio_axis(scale: Scale, top: float, bottom: float) -> Iterator[Markup]:
    """Yield an axis of round ratios below a chart, with a dashed vertical line at no difference."""
    for value, label in ratio_ticks(scale.low, scale.high):
        x = scale(value)
        if value:
            yield draw_line(x, bottom - 4, x, bottom + 2, "tick")
        else:
            yield draw_line(x, top, x, bottom + 2, "zero")
        yield draw_label(x, bottom + 16, label, "middle", soft=True)


def draw_ratio_grid(scale: Scale) -> Iterator[Markup]:
    """Yield grid lines at round ratios, labelled at the side; no difference is dashed."""
    for value, label in ratio_ticks(scale.low, scale.high):
        y = scale(value)
        yield draw_line(0, y, 100, y, "grid" if value else "zero")
        yield draw_side_label(y, label)


def _percent(x: float) -> str:
    return f"{x:.2f}%"


def _pixels(y: float) -> str:
    return f"{y:.1f}"
