"""
The sections of a report that are tables; each function returns the data of one section.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from proof.evidence.store import RestartRecord
from proof.plans.plan import DILATION
from proof.reports.chart_sections import claim_marker
from proof.reports.formatting import format_difference, format_range, with_minus_sign
from proof.reports.page import Cell, Column, Row, Table, Tone, optional_table
from proof.reports.reported_run import ReportedLevel, ReportedRun
from proof.verdict.schema import (
    BusyShare,
    Contrast,
    Control,
    Gate,
    LevelTexts,
    Statistic,
    describe_statistic,
    metric_label,
)
from proof.verdict.terminal import describe_load


@dataclass(frozen=True)
class LevelNumbers:
    """The tables of one level; None where there is nothing to show."""

    claimed: Table | None
    texts_per_s: str
    """Texts per second of one reference arm; empty where capacity was not measured."""
    controls: Table | None
    same_model: Table | None
    texts: Table | None
    """Ratios by text."""
    load: str
    """How busy the engine was, in a sentence; empty where it is not known."""


def build_numbers(run: ReportedRun) -> list[LevelNumbers]:
    """Return every number of the verdict, for the levels that have any."""
    sections = [_level_numbers(level, run.verdict.claim) for level in run.levels]
    return [
        section for section in sections if section.claimed or section.controls or section.same_model
    ]


def _level_numbers(level: ReportedLevel, claim: str) -> LevelNumbers:
    verdict = level.verdict
    texts_per_s = ""
    if level.plan.kind == "capacity" and verdict.statistics:
        texts_per_s = f"{1e6 / verdict.statistics[0].reference_us:,.1f}"
    return LevelNumbers(
        claimed=_claimed_table(level.name, verdict.statistics, claim),
        texts_per_s=texts_per_s,
        controls=_controls_table(level.name, verdict.controls),
        same_model=_same_model_table(level.name, verdict.same_model),
        texts=None if verdict.texts is None else _texts_table(level.name, verdict.texts),
        load=_describe_load(level.name, verdict.busy_share),
    )


def _reference(item: Statistic) -> str:
    """Return the reference's statistic: a time, or how much longer than its CPU time it took."""
    if item.metric == DILATION:
        return f"× {item.reference_us:.3f}"
    return f"{item.reference_us / 1000:.3f} ms"


def _describe_load(level: str, share: BusyShare | None) -> str:
    if share is None:
        return ""
    words = describe_load(share)
    return f"At {level} {words}."


def _claimed_table(level: str, statistics: Sequence[Statistic], claim: str) -> Table | None:
    columns = [
        Column("statistic"),
        Column("reference", is_numeric=True),
        Column("difference", is_numeric=True),
        Column("90 % interval", is_numeric=True),
        Column("margin", is_numeric=True),
        Column("sign flip p", is_numeric=True),
        Column("autocorrelation", is_numeric=True),
        Column("reading"),
    ]
    rows: list[Row] = [
        [
            _statistic_name(item),
            _reference(item),
            format_difference(item.ratio),
            format_range(*item.interval),
            _margin(item),
            f"{item.sign_flip_p:.3f}",
            _correlation(item.autocorrelation),
            Cell(describe_statistic(item, claim), _tone(item, claim)),
        ]
        for item in statistics
    ]
    return optional_table(Table(f"{level}: claimed statistics", columns, rows))


def _statistic_name(item: Statistic | Control | Contrast) -> str:
    return f"{metric_label(item.metric)} {item.statistic}"


def _correlation(value: float | None) -> str:
    return "" if value is None else with_minus_sign(f"{value:+.2f}")


def _margin(item: Statistic) -> str:
    gain = f" (gain {item.gain:.2f})" if item.gain != 1 else ""
    return f"±{100 * item.margin:.3g}%{gain}"


def _tone(item: Statistic, claim: str) -> Tone:
    shape, css_class = claim_marker(item, claim)
    if css_class == "bad":
        return "bad"
    return "good" if shape == "circle" else "open"


def _controls_table(level: str, controls: Sequence[Control]) -> Table | None:
    columns = [
        Column("control"),
        Column("difference", is_numeric=True),
        Column("90 % interval", is_numeric=True),
        Column("99.5 % interval", is_numeric=True),
        Column("expected", is_numeric=True),
        Column("reading"),
    ]
    rows: list[Row] = [
        [
            f"{item.arm}: {_statistic_name(item)}",
            format_difference(item.ratio),
            format_range(*item.interval),
            format_range(*item.wide_interval),
            format_difference(item.expected) if item.expected else "",
            Cell("detected", "good") if item.detected else Cell("not detected", "open"),
        ]
        for item in controls
    ]
    return optional_table(Table(f"{level}: controls", columns, rows))


def _same_model_table(level: str, contrasts: Sequence[Contrast]) -> Table | None:
    columns = [
        Column("A/A"),
        Column("difference", is_numeric=True),
        Column("90 % interval", is_numeric=True),
        Column("reading"),
    ]
    rows: list[Row] = [
        [
            f"{item.arms[1]} over {item.arms[0]}: {_statistic_name(item)}",
            format_difference(item.ratio),
            format_range(*item.interval),
            _same_model_reading(item),
        ]
        for item in contrasts
    ]
    caption = f"{level}: one model loaded twice; the only requirement is that it is not biased"
    return optional_table(Table(caption, columns, rows))


def _same_model_reading(item: Contrast) -> str | Cell:
    if item.biased:
        return Cell("biased", "bad")
    return "equivalent" if item.equivalent else "undecided"


def _texts_table(level: str, texts: LevelTexts) -> Table:
    columns = [
        Column("by text"),
        Column("furthest median", is_numeric=True),
        Column("text", is_numeric=True),
        Column("tokens", is_numeric=True),
        Column("longest over shortest", is_numeric=True),
    ]
    rows: list[Row] = [
        [
            name,
            format_difference(text.ratio),
            str(text.text_id),
            str(text.tokens) if text.tokens > 0 else "",
            "" if text.trend is None else format_difference(text.trend),
        ]
        for name, text in (
            ("candidate over reference", texts.candidate),
            ("A/A, second copies over first", texts.same_model),
        )
    ]
    return Table(f"{level}: medians of {texts.texts} texts, which decide nothing", columns, rows)


def build_gates(run: ReportedRun) -> list[Table]:
    """Return the gates, level by level."""
    return [_gates_table(level.name, level.verdict.gates) for level in run.levels]


def _gates_table(level: str, gates: Sequence[Gate]) -> Table:
    columns = [Column(""), Column("gate"), Column("measured")]
    rows: list[Row] = [
        [
            _gate_status(gate),
            gate.name,
            _with_minus_signs(gate.measured)
            + (f"; cannot tell: {gate.undecided}" if gate.undecided else ""),
        ]
        for gate in gates
    ]
    return Table(f"Gates at {level}", columns, rows, layout="plain")


def _gate_status(gate: Gate) -> Cell:
    if not gate.passed:
        return Cell("FAILED", "bad")
    return Cell("cannot tell", "open") if gate.undecided else Cell("holds", "good")


def _with_minus_signs(sentence: str) -> str:
    """Replace the hyphens of negative numbers in a sentence; those inside words stay."""
    return " ".join(
        with_minus_sign(part) if part.lstrip("(").startswith("-") else part
        for part in sentence.split(" ")
    )


@dataclass(frozen=True)
class StartsSection:
    """Every start of the server."""

    total: int
    dropped: int
    table: Table


def build_starts(run: ReportedRun) -> StartsSection:
    """Return every start, and why it was dropped where any was."""
    dropped = sum(bool(start.dropped) for start in run.starts)
    columns = [
        Column("start"),
        Column(""),
        Column("duration", is_numeric=True),
        Column("generator CPU", is_numeric=True),
        Column("throttled", is_numeric=True),
        Column("load order"),
    ]
    rows: list[Row] = [_start_row(start) for start in run.starts]
    if dropped:
        columns.append(Column("reason"))
        rows = [[*row, start.dropped] for row, start in zip(rows, run.starts, strict=True)]
    table = Table("Starts of the server", columns, rows, layout="wide")
    return StartsSection(len(run.starts), dropped, table)


def _start_row(start: RestartRecord) -> Row:
    return [
        str(start.restart),
        Cell("dropped", "bad") if start.dropped else "counts",
        f"{start.seconds:.1f} s",
        f"{start.generator_cpu_share:.1%}",
        f"{start.throttled_us:,} µs",
        start.load_order.replace(" ", " → "),
    ]
