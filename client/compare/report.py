"""
A comparison as text, as JSON and as a page.
"""

from __future__ import annotations

import dataclasses
import datetime
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from client.compare.answers import Agreement, DifferingText
from client.compare.formats import printable
from client.compare.target import Target
from client.compare.timing import Level, Ratio

SHOWN_TEXTS = 5
"""Differing texts that the terminal shows; JSON and the page have all of them."""
SHOWN_CHARS = 60
QUICK_LOOK = (
    "This is a quick look: one run on this machine, whose noise is in it. `drbert-prove` is the"
    " proof."
)


HOW_READ = (
    "Rates and times are medians of nine rounds; a ratio is the median of the ratios within the"
    " rounds."
)
BUSY = (
    "This command itself used most of a processor, so the rates may be its own; compare from"
    " another machine."
)


@dataclass(frozen=True)
class Requirement:
    """A bound that a comparison must keep to."""

    name: str
    bound: float
    measured: float
    is_upper: bool = False
    """Whether the value may be at most the bound, and not at least."""

    @property
    def is_met(self) -> bool:
        """Whether the measured value, not its interval, keeps to the bound."""
        return self.measured <= self.bound if self.is_upper else self.measured >= self.bound


@dataclass(frozen=True)
class Comparison:
    """Everything that was measured."""

    old: Target
    new: Target
    texts: int
    """Number of texts in the file."""
    agreement: Agreement
    levels: Sequence[Level]
    requirements: Sequence[Requirement]
    seconds: float
    """How long it took."""
    is_client_busy: bool = False
    """Whether this command needed so much processor time that it may have limited the rates."""

    @property
    def is_accepted(self) -> bool:
        """Whether every requirement is met."""
        return all(requirement.is_met for requirement in self.requirements)


def describe(comparison: Comparison) -> str:
    """Return a comparison as lines for a terminal."""
    return "\n".join(_lines(comparison))


def _lines(comparison: Comparison) -> Iterator[str]:
    for target in (comparison.old, comparison.new):
        yield f"{target.role}  {target.url}  {describe_format(target)}"
    yield ""
    yield from _agreement_lines(comparison.agreement, comparison.texts)
    yield ""
    yield from _table(header(), [row(level) for level in comparison.levels])
    yield HOW_READ
    yield from (note for level in comparison.levels if (note := failure_note(level)))
    yield ""
    if comparison.is_client_busy:
        yield BUSY
    for requirement in comparison.requirements:
        yield describe_requirement(requirement)
    yield f"{QUICK_LOOK} ({comparison.seconds:.0f} s)"


def describe_format(target: Target) -> str:
    """Return the format and the model of a server."""
    model = f", model {target.format.model}" if target.format.model else ""
    return f"{target.format.name} at {target.format.path}{model}"


def _agreement_lines(agreement: Agreement, texts: int) -> Iterator[str]:
    yield from agreement_facts(agreement, texts)
    for text in agreement.differing[:SHOWN_TEXTS]:
        yield f"  line {text.index}: old {text.old}, new {text.new}: {shortened(text)}"
    if len(agreement.differing) > SHOWN_TEXTS:
        yield f"  and {len(agreement.differing) - SHOWN_TEXTS} more; --json and --html have them"


def agreement_facts(agreement: Agreement, texts: int) -> Iterator[str]:
    """Yield what there is to say about the answers, in sentences."""
    low, high = agreement.interval
    yield (
        f"same answer for {agreement.same:,} of {agreement.texts:,} texts:"
        f" {percent(agreement.share)} (95 % interval {percent(low)} to {percent(high)})"
    )
    if agreement.texts < texts:
        yield (
            f"{agreement.texts:,} of {texts:,} texts were compared, chosen at random; for more,"
            " raise --seconds"
        )
    if agreement.largest_text:
        yield (
            f"largest difference of a score: {agreement.largest_difference:.2g}"
            f" (line {agreement.largest_text})"
        )
    for role, failed in (("old", agreement.failed_old), ("new", agreement.failed_new)):
        if failed:
            yield f"the {role} server did not answer {failed:,} of the texts"
    if agreement.has_foreign_labels:
        yield (
            f"the servers name labels differently: {', '.join(agreement.labels_old[:4])} and"
            f" {', '.join(agreement.labels_new[:4])}; map them with --labels OLD=NEW,…"
        )


def header() -> list[str]:
    """Return the columns of the table of times."""
    return [
        "in flight",
        "texts/s old",
        "new",
        "speed-up (95 % interval)",
        "p50 ms old",
        "new",
        "new ÷ old (95 % interval)",
        "p95 ms old",
        "new",
    ]


def row(level: Level) -> list[str]:
    """Return the table's row of a level."""
    return [
        "alone" if level.in_flight == 1 else str(level.in_flight),
        *(number(value) for value in level.texts_per_s),
        ratio(level.speed_up),
        *(number(1000 * value) for value in level.p50_s),
        ratio(level.latency),
        *(number(1000 * value) for value in level.p95_s),
    ]


def failure_note(level: Level) -> str:
    """Return how many requests of a level failed; empty if none did."""
    old, new = level.failures
    if not old + new:
        return ""
    return (
        f"with {level.in_flight} in flight, {old:,} requests to the old and {new:,} to the new"
        f" server failed; the first: {level.first_failure}"
    )


def describe_requirement(requirement: Requirement) -> str:
    """Return a requirement and whether it is met."""
    status = "met" if requirement.is_met else "NOT met"
    sign = "≤" if requirement.is_upper else "≥"
    return (
        f"required {requirement.name} {sign} {requirement.bound:g}: {status}"
        f" ({requirement.measured:.4g})"
    )


def percent(share: float) -> str:
    """Return a share in percent, never rounded up to 100."""
    return f"{math.floor(share * 1000) / 10:.1f} %" if share < 1 else "100 %"


def number(value: float) -> str:
    """Return a number with three digits, or more if it is large."""
    if math.isnan(value):
        return "–"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def ratio(value: Ratio) -> str:
    """Return a ratio with its interval."""
    if math.isnan(value.median):
        return "–"
    high = "∞" if math.isinf(value.high) else f"{value.high:.2f}"
    return f"{value.median:.2f} ({value.low:.2f}–{high})"


def shortened(text: DifferingText) -> str:
    """Return a text in one line of at most SHOWN_CHARS characters."""
    line = printable(" ".join(text.text.split()))
    return line if len(line) <= SHOWN_CHARS else f"{line[:SHOWN_CHARS]}…"


def _table(columns: list[str], rows: list[list[str]]) -> Iterator[str]:
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    for cells in (columns, *rows):
        yield "  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))


def to_json(comparison: Comparison) -> dict[str, Any]:
    """Return a comparison as JSON values."""
    agreement = dataclasses.asdict(comparison.agreement)
    low, high = comparison.agreement.interval
    return {
        "date": _today(),
        "accepted": comparison.is_accepted,
        "servers": {
            target.role: {
                "url": target.url,
                "format": target.format.name,
                "path": target.format.path,
                "model": target.format.model,
            }
            for target in (comparison.old, comparison.new)
        },
        "answers": agreement
        | {
            "share": comparison.agreement.share,
            "interval": [low, high],
            "largest_difference": finite(comparison.agreement.largest_difference),
            "texts_in_file": comparison.texts,
        },
        "levels": [
            {
                key: {inner: finite(each) for inner, each in value.items()}
                if isinstance(value, dict)
                else [finite(each) for each in value]
                if isinstance(value, tuple)
                else value
                for key, value in dataclasses.asdict(level).items()
            }
            for level in comparison.levels
        ],
        "requirements": [
            dataclasses.asdict(requirement)
            | {"measured": finite(requirement.measured), "met": requirement.is_met}
            for requirement in comparison.requirements
        ],
        "seconds": comparison.seconds,
    }


def finite(value: Any) -> Any:
    """Return a value as JSON knows it: null for what is no number."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_page(comparison: Comparison, path: Path) -> None:
    """Write a comparison as a page in one file, which loads nothing."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    templates = Environment(
        loader=PackageLoader("client.compare", ""), autoescape=True, undefined=StrictUndefined
    )
    page = templates.get_template("page.html.j2").render(
        comparison=comparison,
        date=_today(),
        facts=list(agreement_facts(comparison.agreement, comparison.texts)),
        columns=header(),
        rows=[row(level) for level in comparison.levels],
        failures=[note for level in comparison.levels if (note := failure_note(level))],
        requirements=[describe_requirement(each) for each in comparison.requirements],
        describe_format=describe_format,
        quick_look=QUICK_LOOK,
        busy=BUSY,
        how_read=HOW_READ,
    )
    path.write_text(page, encoding="utf-8")


def _today() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
