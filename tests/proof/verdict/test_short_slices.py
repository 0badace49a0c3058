"""Schedule 2: short slices, adjusted for dilation, with each copy delayed in turn."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from proof.evidence.audit import read_sealed_plan
from proof.evidence.readings import collect_readings
from proof.evidence.store import EvidenceRejected, read_starts
from proof.verdict.judge import judge_level, judge_run
from proof.verdict.schema import LevelVerdict
from tests.proof.factories import write_evidence, write_plan

LEVELS = ("unloaded", "mixed-50-busy", "short-slices")
CANDIDATES = ("drbert", "drbert-again")


def write_run(folder: Path, **options: Any) -> Path:
    return write_evidence(
        folder, **{"noise": 0.02, "levels": LEVELS, "schedule_version": 2, "seed": 1} | options
    )


def slices_of(folder: Path, **options: Any) -> LevelVerdict:
    options = {"levels": ("short-slices",)} | options
    return judge_run(write_run(folder, **options)).levels["switchback-50"]


def page_of(folder: Path) -> str:
    return (folder / "report.html").read_text()


def ratio(level: LevelVerdict, metric: str, statistic: str = "mean") -> float:
    return next(
        item.ratio
        for item in level.statistics
        if (item.metric, item.statistic) == (metric, statistic)
    )


def test_equal_arms_are_equivalent_at_every_level(tmp_path: Path) -> None:
    verdict = judge_run(write_run(tmp_path / "run"))
    assert {name: level.breached for name, level in verdict.levels.items()} == {
        "unloaded": [],
        "mixed-50": [],
        "switchback-50": [],
    }
    assert verdict.verdict == "equivalent"


def test_a_candidate_that_computes_more_is_slower_and_no_more_dilated(tmp_path: Path) -> None:
    level = slices_of(tmp_path / "run", factors=dict.fromkeys(CANDIDATES, 1.03))
    assert level.verdict == "not-equivalent"
    assert ratio(level, "end_to_end_adjusted") == pytest.approx(1.03, abs=0.005)
    assert ratio(level, "dilation") == pytest.approx(1.0, abs=0.02)


def test_a_candidate_that_waits_is_never_equivalent_although_the_adjustment_hides_it(
    tmp_path: Path,
) -> None:
    level = slices_of(tmp_path / "run", waits=dict.fromkeys(CANDIDATES, 0.02))
    assert ratio(level, "end_to_end_adjusted") == pytest.approx(1.004, abs=0.004)
    assert ratio(level, "dilation") == pytest.approx(1.02, abs=0.02)
    assert level.verdict in ("inconclusive", "not-equivalent", "invalid")
    far = slices_of(tmp_path / "far", waits=dict.fromkeys(CANDIDATES, 0.05))
    assert "end to end mean agrees with and without the adjustment" in far.breached


def test_the_adjustment_takes_the_noise_of_the_slices_away(tmp_path: Path) -> None:
    level = slices_of(tmp_path / "run")
    widths = {item.metric: item.interval[1] - item.interval[0] for item in level.statistics}
    assert widths["end_to_end_adjusted"] < widths["end_to_end"] / 3


@pytest.mark.parametrize("name", LEVELS)
def test_a_delay_of_each_copy_in_turn_that_is_not_detected_makes_the_level_invalid(
    tmp_path: Path, name: str
) -> None:
    folder = write_run(
        tmp_path / "run", levels=(name,), factors={"bert-delayed": 1.0}, control=False
    )
    [level] = judge_run(folder).levels.values()
    assert "bert-delayed is told apart" in level.breached


def test_the_delay_is_one_line_of_each_restart_that_a_spreadsheet_averages(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", levels=("short-slices",))
    with (folder / "restarts.csv").open() as file:
        logs = [
            float(line["log"])
            for line in csv.DictReader(file)
            if line["block"] == "delay" and line["metric"] == "end_to_end_adjusted"
            if line["statistic"] == "mean"
        ]
    [control] = [
        control
        for control in judge_run(folder).levels["switchback-50"].controls
        if (control.metric, control.statistic) == ("end_to_end_adjusted", "mean")
    ]
    assert len(logs) == 8
    assert sum(logs) / 8 == pytest.approx(math.log(control.ratio))
    assert control.expected == pytest.approx(1.06)


def test_a_set_that_was_sent_late_is_left_out_for_all_arms(tmp_path: Path) -> None:
    def late(row: dict[str, Any]) -> None:
        # One slice of the second set: its requests go out 5 ms late, and are answered later too.
        if row["level"] == "switchback-50" and row["slice_id"] == 7:
            row["sent_ns"] += 5_000_000
            row["done_ns"] += 5_000_000

    usual = slices_of(tmp_path / "usual")
    level = slices_of(tmp_path / "late", change=late)
    assert not level.restarts_dropped
    assert ratio(level, "end_to_end") == pytest.approx(ratio(usual, "end_to_end"), abs=0.005)
    assert "; 8 of 128 sets were sent late and are left out" in page_of(tmp_path / "late")
    assert "; 0 of 128 sets were sent late and are left out" in page_of(tmp_path / "usual")


def test_a_restart_that_was_mostly_sent_late_is_dropped(tmp_path: Path) -> None:
    def late(row: dict[str, Any]) -> None:
        if row["restart"] == 2 and row["level"] == "switchback-50" and row["block_id"] > 120:
            row["sent_ns"] += 5_000_000
            row["done_ns"] += 5_000_000

    folder = write_run(tmp_path / "run", levels=("short-slices",), change=late)
    assert read_starts(folder)[2].dropped.startswith("at level switchback-50 62% of the sets")


def test_a_restart_whose_engine_was_mostly_kept_from_computing_is_dropped(tmp_path: Path) -> None:
    def starved(row: dict[str, Any]) -> None:
        if row["restart"] == 2:
            row["inference_cpu_us"] /= 4

    folder = write_run(tmp_path / "run", levels=("short-slices",), change=starved)
    assert "times its CPU time, more than 3" in read_starts(folder)[2].dropped


def test_a_beta_that_is_not_the_pilots_is_refused(tmp_path: Path) -> None:
    plan = write_plan(tmp_path, levels=("short-slices",), schedule_version=2).path
    read_sealed_plan(tmp_path)
    plan.write_text(plan.read_text().replace("{ p50 = 0.8,", "{ p50 = 0.3,"))
    with pytest.raises(EvidenceRejected, match=r"the β 0.3 of .* p50 is not its pilot's \(0.8\)"):
        read_sealed_plan(tmp_path)


@pytest.mark.parametrize(
    ("delayed", "breached"), [(1.064, []), (1.08, ["bert-delayed is as slow as it was made"])]
)
def test_a_delay_is_read_as_it_was_made_within_the_accuracy_that_margins_need(
    tmp_path: Path, delayed: float, breached: list[str]
) -> None:
    folder = write_run(tmp_path / "run", levels=("unloaded",), control=False)
    plan, starts = read_sealed_plan(folder), read_starts(folder)
    with (folder / "restarts.csv").open() as file:
        readings = collect_readings(plan, plan.level("unloaded"), list(csv.DictReader(file)))
    # So many rows that the interval is narrower than what a server can keep to.
    exact = math.log(delayed) + 1e-4 * np.resize([-1.0, 1.0], len(readings.restarts))
    narrow = replace(readings, delays=dict.fromkeys(readings.delays, exact))
    assert judge_level(plan, plan.level("unloaded"), narrow, starts).breached == breached
