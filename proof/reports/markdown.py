"""
A verdict as Markdown, short enough for a pull request.
"""

from __future__ import annotations

from collections.abc import Iterable

from proof.reports.drawing import percent, span
from proof.verdict.schema import LevelVerdict, Verdict, describe_statistic, metric_label


def markdown(verdict: Verdict) -> str:
    """The sentence, a table a level, controls, gates, and which run of which plan it was."""
    lines = [f"**{verdict.verdict}** {_cell(verdict.sentence)}"]
    for name, level in verdict.levels.items():
        lines += [
            "",
            (
                f"**{name}: {level.verdict}**, {level.restarts_kept} of {level.restarts_planned}"
                f" restarts, {level.restarts_dropped} dropped"
            ),
            "",
            *_table(level, verdict.claim),
        ]
        lines += [f"{line}  " for line in (*_controls(level), _gates(level))]
    run = verdict.run
    return "\n".join(
        [
            *lines,
            "",
            (
                f"Run `{run.run}`, number {run.number_for_this_plan} of plan {verdict.plan.name}"
                f" `{verdict.plan.digest}`"
            ),
        ]
    )


def _table(level: LevelVerdict, claim: str) -> Iterable[str]:
    if not level.statistics:
        yield f"{level.restarts_kept} restarts are too few for an interval."
        yield ""
        return
    yield "| statistic | difference | 90 % interval | margin | reading |"
    yield "|---|---:|---:|---:|---|"
    for item in level.statistics:
        yield (
            f"| {metric_label(item.metric)} {item.statistic} | {percent(item.ratio)} |"
            f" {span(*item.interval)} | ±{100 * item.margin:.3g}% | {describe_statistic(item, claim)} |"
        )
    yield ""


def _controls(level: LevelVerdict) -> Iterable[str]:
    for arm in dict.fromkeys(control.arm for control in level.controls):
        mine = [control for control in level.controls if control.arm == arm]
        made = next(
            (f"made {percent(control.expected)}, " for control in mine if control.expected), ""
        )
        told = "told apart" if any(control.detected for control in mine) else "not told apart"
        seen = "; ".join(
            f"{metric_label(control.metric)} {control.statistic} {percent(control.ratio)}"
            f" ({span(*control.interval)})"
            for control in mine
        )
        yield f"Control {arm}: {made}{told}: {seen}"


def _gates(level: LevelVerdict) -> str:
    failed = [gate for gate in level.gates if not gate.passed]
    if not failed:
        return f"All {len(level.gates)} gates hold."
    return "Gates that failed: " + "; ".join(
        f"{_cell(gate.name)}: {_cell(gate.found)}" for gate in failed
    )


def _cell(value: str) -> str:
    """Text that cannot end a table's cell or begin a tag."""
    return value.replace("|", "\\|").replace("<", "&lt;")
