"""
Inline SVG that needs no script and no scaling: what every chart is drawn with.

Widths are parts of a hundred of whatever width there is, heights and letters are pixels. So a
chart fills a desktop and a phone alike, and its text is as large on both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

STEPS = tuple(digit * 10.0**power for power in range(-4, 6) for digit in (1, 2, 5))


class Html(str):
    """Markup that is ready; any other string is text and is escaped."""

    __slots__ = ()


def text(value: object) -> Html:
    """Markup as it is, anything else escaped; two slashes are spelled out, so no address can be
    mistaken for a request.
    """
    return (
        value if isinstance(value, Html) else Html(escape(str(value)).replace("//", "&#47;&#47;"))
    )


def minus(value: str) -> str:
    """A number with a real minus sign."""
    return value.replace("-", "\N{MINUS SIGN}")


def percent(ratio: float, digits: int = 2) -> str:
    """A ratio as the difference from 1; what rounds to nothing has no sign."""
    said = f"{ratio - 1:+.{digits}%}"
    return minus(said) if any(digit in said for digit in "123456789") else said[1:]


def span(low: float, high: float, digits: int = 2) -> str:
    return f"{percent(low, digits)} to {percent(high, digits)}"


@dataclass(frozen=True)
class Scale:
    """Values to places, in a straight line; values beyond either end are drawn at that end."""

    low: float
    high: float
    begin: float
    end: float

    def __call__(self, value: float) -> float:
        share = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return self.begin + share * (self.end - self.begin)

    def holds(self, value: float) -> bool:
        return self.low <= value <= self.high


def ratio_ticks(low: float, high: float, most: int = 5) -> list[tuple[float, str]]:
    """(log ratio, label) of round differences between two log ratios, 0 % among them where it lies
    between.
    """
    first, last = math.expm1(low), math.expm1(high)
    for step in STEPS:
        multiples = range(math.ceil(first / step - 1e-9), math.floor(last / step + 1e-9) + 1)
        if len(multiples) <= most:
            digits = max(0, -math.floor(math.log10(step)) - 2)
            return [
                (math.log1p(k * step), percent(1 + k * step, digits) if k else "0%")
                for k in multiples
            ]
    return [(0.0, "0%")]


def time_ticks(low_us: float, high_us: float, most: int = 5) -> list[tuple[float, str]]:
    """(log µs, label) of round times for a log axis."""
    for digits in ((1, 2, 5), (1, 3), (1,)):
        found = [d * 10.0**p for p in range(10) for d in digits if low_us <= d * 10.0**p <= high_us]
        if 3 <= len(found) <= most:
            break
    else:
        found = next(
            [k * step for k in range(math.ceil(low_us / step), math.floor(high_us / step) + 1)]
            for step in (d * 10.0**p for p in range(-3, 10) for d in (1, 2, 5))
            if high_us / step - low_us / step < most - 1
        )
    return [(math.log(us), f"{us / 1000:g} ms") for us in found if us > 0]


def picture(
    height: float, title: str, description: str, shapes: Sequence[str], sided: bool = False
) -> Html:
    """One chart, with its words for those who cannot see it; `sided` leaves room for names left of
    it.
    """
    kind = ' class="sided"' if sided else ' width="100%"'
    return Html(
        f'<svg{kind} height="{height:.0f}" role="img"'
        f' aria-label="{text(title)}"><title>{text(title)}</title>'
        f"<desc>{text(description)}</desc>{''.join(shapes)}</svg>"
    )


def label(x: float, y: float, value: str, anchor: str = "start", soft: bool = False) -> str:
    kind = ' class="soft"' if soft else ""
    return f'<text x="{x:.2f}%" y="{y:.1f}" text-anchor="{anchor}"{kind}>{text(value)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1:.2f}%" y1="{y1:.1f}" x2="{x2:.2f}%" y2="{y2:.1f}" class="{kind}"/>'


def box(x1: float, x2: float, y: float, height: float, kind: str) -> str:
    return (
        f'<rect x="{min(x1, x2):.2f}%" y="{y:.1f}" width="{abs(x2 - x1):.2f}%"'
        f' height="{height:.1f}" class="{kind}"/>'
    )


def marker(shape: str, x: float, y: float, kind: str, size: float = 5.0, title: str = "") -> str:
    """A mark whose shape says as much as its colour: circle, ring, diamond, right, left or bar."""
    inside = f"<title>{text(title)}</title>" if title else ""
    if shape in ("circle", "ring"):
        return (
            f'<circle cx="{x:.2f}%" cy="{y:.1f}" r="{size:g}" class="{shape}'
            f' {kind}">{inside}</circle>'
        )
    s = size * 1.25
    points = {
        "diamond": ((0, -s), (s, 0), (0, s), (-s, 0)),
        "right": ((-s, -s), (s, 0), (-s, s)),
        "left": ((s, -s), (-s, 0), (s, s)),
        "bar": ((-1.5, -s), (1.5, -s), (1.5, s), (-1.5, s)),
    }[shape]
    at = " ".join(f"{a:g},{b:g}" for a, b in points)
    # A nested picture is the only thing that can be placed by a percentage and still keep its
    # shape.
    return (
        f'<svg x="{x:.2f}%" y="{y:.1f}" overflow="visible"><polygon points="{at}"'
        f' class="{kind}">{inside}</polygon></svg>'
    )


def curve(points: Sequence[tuple[float, float]], height: float, kind: str) -> str:
    """A line through places (percent, pixels); as thick at every width."""
    path = " ".join(f"{x:.2f},{y:.1f}" for x, y in points)
    return (
        f'<svg width="100%" height="{height:.0f}" viewBox="0 0 100 {height:.0f}"'
        f' preserveAspectRatio="none"><polyline points="{path}" class="{kind}"'
        ' vector-effect="non-scaling-stroke"/></svg>'
    )


def beside(y: float, value: str) -> str:
    """A name left of a chart that is `sided`."""
    return f'<text x="-8" y="{y + 4:.1f}" text-anchor="end" class="soft">{text(value)}</text>'


def ratio_axis(scale: Scale, top: float, bottom: float, most: int = 5) -> list[str]:
    """Round ratios below, with a dashed upright line where there is no difference."""
    shapes = []
    for value, name in ratio_ticks(scale.low, scale.high, most):
        x = scale(value)
        shapes.append(
            line(x, bottom - 4 if value else top, x, bottom + 2, "tick" if value else "zero")
        )
        shapes.append(label(x, bottom + 16, name, "middle", soft=True))
    return shapes


def ratio_levels(scale: Scale, most: int = 5) -> list[str]:
    """Round ratios beside, with a dashed line where there is no difference."""
    shapes = []
    for value, name in ratio_ticks(scale.low, scale.high, most):
        y = scale(value)
        shapes += [line(0, y, 100, y, "grid" if value else "zero"), beside(y, name)]
    return shapes
