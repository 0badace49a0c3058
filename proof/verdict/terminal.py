"""
A verdict as lines for a terminal.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

from proof.verdict.schema import (
    BusyShare,
    FurthestText,
    Gate,
    LevelTexts,
    LevelVerdict,
    Statistic,
    Verdict,
    describe_statistic,
    format_interval,
    format_percent,
    metric_label,
)
from proof.verdict.scope import describe_scope


def describe(verdict: Verdict) -> str:
    """Return the verdict with every claimed interval and its scope."""
    lines = []
    for name, level in verdict.levels.items():
        lines.append(
            f"level {name}: {level.verdict}; {level.restarts_kept} restarts count,"
            f" {level.restarts_dropped} dropped"
        )
        lines += [f"  {line}" for line in _level_lines(level, verdict.claim)]
    lines.append(f"verdict: {verdict.verdict}. {verdict.sentence} ({verdict.run.numbers})")
    lines += [f"  {line}" for line in describe_in_short(verdict)]
    if verdict.scope is not None:
        lines += [f"  {line}" for line in describe_scope(verdict.scope)]
    return "\n".join(lines)


def describe_in_short(verdict: Verdict) -> Iterator[str]:
    """Yield what the valid levels say of CPU time and of wall time, as lines without an end.

    CPU time is often decided where wall time is not, because other processes do not add to it.
    """
    kinds = {"CPU time": True, "wall time": False}
    for label, is_cpu in kinds.items():
        items = [
            item
            for level in verdict.levels.values()
            if level.verdict != "invalid"
            for item in level.statistics
            if (item.metric == "inference_cpu") == is_cpu
        ]
        if items:
            yield f"{label}: {_in_short(items, verdict.claim)}"


def _in_short(items: list[Statistic], claim: str) -> str:
    """Return in how many statistics a kind of time is equivalent, and what is left open."""
    words = Counter(describe_statistic(item, claim) for item in items)
    if len(words) == 1:
        [word] = words
        widest = 100 * max(item.margin for item in items)
        among = f"all {len(items)} claimed statistics" if len(items) > 1 else "what is claimed"
        return f"{word} in {among}, margin ±{widest:.3g} %"
    return ", ".join(f"{word} in {count}" for word, count in words.most_common())


def _level_lines(level: LevelVerdict, claim: str) -> Iterator[str]:
    for item in level.statistics:
        yield (
            f"{metric_label(item.metric):<19} {item.statistic:<5} {format_percent(item.ratio):>8}  "
            f" 90 % interval {format_interval(item.interval)}   margin ±{100 * item.margin:.3g} %  "
            f" {describe_statistic(item, claim)}"
        )
    for control in level.controls:
        # One statistic beyond its margin is enough for the gate.
        detected = "beyond its margin" if control.detected else "not beyond its margin"
        expected = f", expected {format_percent(control.expected)}" if control.expected else ""
        yield (
            f"control {control.arm} {metric_label(control.metric)} {control.statistic}:"
            f" {format_percent(control.ratio)} ({format_interval(control.interval)}){expected},"
            f" {detected}"
        )
    yield from map(_gate_line, level.gates)
    if level.busy_share is not None:
        yield describe_load(level.busy_share)
    if autocorrelation := describe_autocorrelation(level):
        yield autocorrelation
    if level.texts is not None:
        yield from describe_texts(level.texts)


def _gate_line(gate: Gate) -> str:
    status = ("??? " if gate.undecided else "ok  ") if gate.passed else "FAIL"
    doubt = f"; cannot tell: {gate.undecided}" if gate.undecided else ""
    return f"gate {status} {gate.name}: {gate.measured}{doubt}"


def describe_load(share: BusyShare) -> str:
    """Return how busy the engine was, in one line."""
    return (
        f"the engine was busy {share.mean:.0%} of the time, in single slices {share.least:.0%} to"
        f" {share.most:.0%}"
    )


def describe_autocorrelation(level: LevelVerdict) -> str:
    """Return the lag-1 autocorrelations of a level in one line; empty if there are none."""
    values = [item.autocorrelation for item in level.statistics]
    known = [value for value in values if value is not None]
    if not known:
        return ""
    expected = 1 / math.sqrt(level.restarts_kept)
    return (
        f"lag-1 autocorrelation over restarts {min(known):+.2f} to {max(known):+.2f}; independent"
        f" restarts have about 0 ± {expected:.2f}"
    )


def describe_texts(texts: LevelTexts) -> Iterator[str]:
    """Yield the ratios by text, each with its yardstick, as lines without an end."""
    yield (
        f"by text, of {texts.texts}: furthest median {_furthest(texts.candidate)}; A/A"
        f" {_furthest(texts.same_model)}"
    )
    candidate, same_model = texts.candidate.trend, texts.same_model.trend
    if candidate is not None and same_model is not None:
        yield (
            f"from the shortest to the longest text {format_percent(candidate)}; A/A"
            f" {format_percent(same_model)}"
        )


def _furthest(text: FurthestText) -> str:
    tokens = f", {text.tokens} tokens" if text.tokens > 0 else ""
    return f"{format_percent(text.ratio)} (text {text.text_id}{tokens})"
