"""Runs beside a busy process are counted, and the process ends with them."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from benchmarks.proving import neighbour
from command import BadInput, BadUsage
from proof.plans.plan_file import read_plan
from proof.verdict.judge import judge_run
from proof.verdict.schema import Verdict
from tests.proof.factories import write_evidence


def test_valid_and_equivalent_runs_are_counted_for_each_level(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = write_evidence(tmp_path / "good", noise=0.02, seed=1)
    bad = write_evidence(tmp_path / "bad", factors={"bert-delayed": 1.0}, control=False, seed=1)
    runs = iter([good, bad, good])

    seeds = []

    def judged(plan: Path, evidence: Path) -> tuple[Path, Verdict]:
        seeds.append(read_plan(plan).seed)
        folder = next(runs)
        return folder, judge_run(folder)

    monkeypatch.setattr(neighbour, "run_plan", judged)
    out = tmp_path / "page.md"
    arguments = [str(good / "plan.toml"), "--runs", "3", "--share", "0.01", "--out", str(out)]
    assert neighbour.main(arguments) == 0
    assert seeds == [seeds[0], seeds[0] + 1, seeds[0] + 2]
    assert "| unloaded | 2 of 3 | 2 | " in out.read_text()
    assert (
        "| 2 | invalid: the slowdown of bert-delayed was not detected;" in capsys.readouterr().out
    )


def test_the_busy_process_uses_its_share_and_ends_with_the_block() -> None:
    before = children()
    with neighbour.busy_process(0.5):
        [child] = children() - before
        time.sleep(0.2)
    assert not Path(f"/proc/{child}").exists()
    with neighbour.busy_process(0):
        assert children() <= before


def children() -> set[str]:
    """Return the processes that this one has started."""
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


def test_a_plan_takes_its_pilot_along(tmp_path: Path) -> None:
    plan = tmp_path / "sized.toml"
    plan.write_text('name = "sized"\nseed = 41\n')
    (tmp_path / "sized.pilot.json").write_text("{}")
    (tmp_path / "runs").mkdir()
    written = neighbour.with_seed(plan, 1, tmp_path / "runs")
    assert written.read_text() == 'name = "sized"\nseed = 42\n'
    assert written.with_name("sized.pilot.json").read_text() == "{}"
    plan.write_text('name = "sized"\n')
    with pytest.raises(BadInput, match="has no line `seed = NUMBER`"):
        neighbour.with_seed(plan, 1, tmp_path / "runs")


@pytest.mark.parametrize("option", [("--runs", "0"), ("--share", "1.5")])
def test_numbers_that_cannot_be_are_refused(option: tuple[str, str]) -> None:
    with pytest.raises(BadUsage):
        neighbour.main(["plan.toml", *option])
