"""
A verdict as Markdown, short enough for a pull request.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from proof.reports.formatting import format_difference, format_range
from proof.verdict.failures import describe_failure
from proof.verdict.schema import Control, LevelVerdict, Verdict, describe_statistic, metric_label
from proof.verdict.scope import describe_scope

UNPRINTABLE = "\N{REPLACEMENT CHARACTER}"


def render(verdict: Verdict) -> str:
    """Return the sentence of a verdict, each level, and which run of which plan it was.

    A level has a table of its statistics, its controls, and its gates.
    """
    lines = [f"**{verdict.verdict}** {escape(verdict.sentence)}"]
    if verdict.scope is not None:
        lines += ["", *(f"- {escape(line)}" for line in describe_scope(verdict.scope))]
    for name, level in verdict.levels.items():
        lines += ["", *_level_lines(name, level, verdict.claim)]
    run = verdict.run
    lines += [
        "",
        f"Run `{escape(run.run)}`, {run.numbers}: {escape(verdict.plan.name)}"
        f" `{verdict.plan.digest}`",
    ]
    return "\n".join(lines)


def _level_lines(name: str, level: LevelVerdict, claim: str) -> Iterator[str]:
    yield (
        f"**{name}: {level.verdict}**, {level.restarts_kept} of {level.restarts_planned}"
        f" restarts, {level.restarts_dropped} dropped"
    )
    yield ""
    yield from _table(level, claim)
    yield ""
    # Two spaces at the end of a line break it.
    for arm in dict.fromkeys(control.arm for control in level.controls):
        controls = [control for control in level.controls if control.arm == arm]
        yield f"{_describe_control(arm, controls)}  "
    yield f"{_describe_gates(level)}  "


def _table(level: LevelVerdict, claim: str) -> Iterator[str]:
    if not level.statistics:
        yield f"{level.restarts_kept} restarts are too few for an interval."
        return
    yield "| statistic | difference | 90 % interval | margin | reading |"
    yield "|---|---:|---:|---:|---|"
    for item in level.statistics:
        cells = (
            f"{metric_label(item.metric)} {item.statistic}",
            format_difference(item.ratio),
            format_range(*item.interval),
            f"±{100 * item.margin:.3g}%",
            describe_statistic(item, claim),
        )
        yield f"| {' | '.join(cells)} |"


def _describe_control(arm: str, controls: Sequence[Control]) -> str:
    detected = any(control.detected for control in controls)
    expected = [format_difference(item.expected) for item in controls if item.expected]
    prefix = f"expected {expected[0]}, " if expected else ""
    statistics = "; ".join(
        f"{metric_label(control.metric)} {control.statistic} {format_difference(control.ratio)}"
        f" ({format_range(*control.interval)})"
        for control in controls
    )
    return f"Control {arm}: {prefix}{'detected' if detected else 'not detected'}: {statistics}"


def _describe_gates(level: LevelVerdict) -> str:
    failed = [gate for gate in level.gates if not gate.passed]
    undecided = [gate for gate in level.gates if gate.undecided]
    if not failed and undecided:
        return "Gates that cannot tell: " + "; ".join(
            f"{escape(gate.name)}: {escape(gate.measured)}" for gate in undecided
        )
    if not failed:
        return f"All {len(level.gates)} gates hold."
    return "Failed: " + "; ".join(
        f"{escape(describe_failure(gate.name))} ({escape(gate.measured)})" for gate in failed
    )


def escape(text: str) -> str:
    """Return text that cannot end a table's cell, begin a tag, or steer a terminal."""
    printable = "".join(
        letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text
    )
    return printable.replace("|", "\\|").replace("<", "&lt;")
