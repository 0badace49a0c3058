"""Counts in the evidence of a run: the judge holds them to the plan and to what was measured."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from command import BadInput, CommandError
from proof.commands import main
from proof.evidence.store import EvidenceRejected, read_starts, write_manifest
from proof.measuring.run import finish_run
from proof.plans.plan import WorkCount
from proof.plans.plan_file import read_plan, to_toml
from proof.reports import report
from proof.verdict.judge import judge_run
from proof.work.counting import CountOptions
from proof.work.schema import Work, write_work
from proof.work.sealed import check_countable, count_for_run, lacks_work
from tests.proof.factories import write_evidence, write_plan
from tests.proof.work.test_schema import KEPT_DECODER, TWINS, work_of

TABLE = '\n[work]\nvariant = "cpu-fp32"\nlengths = [8, 32]\nmargin = 0.001\n'


@pytest.fixture
def evidence(tmp_path: Path) -> Path:
    """A run whose plan has work counted; its rows name the plan."""
    folder = write_evidence(tmp_path / "run", noise=0.02, sealed=False)
    plan = folder / "plan.toml"
    old = read_plan(plan).digest
    plan.write_text(plan.read_text() + TABLE)
    new = read_plan(plan).digest
    for rows in (folder / "rows").glob("*.csv"):
        rows.write_text(rows.read_text().replace(old[:16], new[:16]))
    run = folder / "run.json"
    run.write_text(run.read_text().replace(old, new))
    models = {
        arm: {"digest": letter * 64}
        for arm, letter in (("bert", "a"), ("bert-again", "a"), ("drbert", "b"))
    }
    (folder / "environment.json").write_text(json.dumps({"server": {"models": models}}))
    write_work(folder / "work.json", work_of([TWINS]))
    finish_run(folder)
    return folder


def test_counts_are_judged_with_the_run_and_shown_in_its_report(evidence: Path) -> None:
    assert judge_run(evidence).verdict == "equivalent"
    page = (evidence / "report.html").read_text()
    assert "executes as many instructions for a text as bert" in page
    assert "Valgrind emulates a processor without AVX-512" in page
    assert "work.json" in (evidence / "MANIFEST.sha256").read_text()


def test_the_judge_and_the_pull_request_show_the_counts(
    evidence: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["judge", str(evidence)]) == 0
    assert "work: same. drbert executes as many instructions" in capsys.readouterr().out
    assert main(["report", str(evidence), "--markdown"]) == 0
    assert "**same work** drbert executes" in capsys.readouterr().out


def test_a_run_counts_once_and_without_a_table_never(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[tuple[Path, Path, CountOptions]] = []

    def count(first: Path, second: Path, options: CountOptions) -> Work:
        counted.append((first, second, options))
        return work_of([TWINS])

    monkeypatch.setattr("proof.work.counting.count_work", count)
    plan = write_plan(tmp_path)
    count_for_run(plan, tmp_path)
    assert not counted
    plan.path.write_text(plan.path.read_text() + TABLE)
    plan = read_plan(plan.path)
    assert lacks_work(plan, tmp_path)
    for _ in range(2):
        count_for_run(plan, tmp_path)
    assert counted == [(Path("a"), Path("b"), CountOptions(lengths=(8, 32)))]
    assert not lacks_work(plan, tmp_path)


def test_a_plan_whose_servers_are_its_own_cannot_have_work_counted(tmp_path: Path) -> None:
    plan = write_plan(tmp_path)
    plan = dataclasses.replace(
        plan,
        work=WorkCount(),
        arms=tuple(dataclasses.replace(arm, artifact=None, url="http://a") for arm in plan.arms),
    )
    with pytest.raises(BadInput, match="its arms are servers of your own"):
        check_countable(plan)


def test_a_run_without_counts_has_no_such_section(tmp_path: Path) -> None:
    folder = write_evidence(tmp_path / "run")
    assert "Instructions for one text" not in (folder / "report.html").read_text()


def changed(**values: object) -> Callable[[Work], Work]:
    return lambda work: work.model_copy(update=values)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (changed(verdict="different"), "says different, its counts say same"),
        (changed(measurements=[KEPT_DECODER]), "says same, its counts say different"),
        (changed(margin=0.01), "its margin is 0.01, not the plan's"),
        (
            lambda work: work_of([TWINS], digests=("a", "c")),
            "counted another candidate \\(cccccccccccc\\)",
        ),
        (
            lambda work: work_of([TWINS], digests=("b", "a")),
            "counted another reference \\(bbbbbbbbbbbb\\)",
        ),
        (
            lambda work: work.model_copy(
                update={
                    "artifacts": tuple(
                        artifact.model_copy(update={"variant": "cpu-int8"})
                        for artifact in work.artifacts
                    )
                }
            ),
            "counted cpu-int8, and the plan names cpu-fp32",
        ),
    ],
)
def test_damaged_counts_are_refused(
    evidence: Path, change: Callable[[Work], Work], words: str
) -> None:
    write_work(evidence / "work.json", change(work_of([TWINS])))
    write_manifest(evidence)
    with pytest.raises(EvidenceRejected, match=words) as raised:
        main(["judge", str(evidence)])
    assert raised.value.exit_code == 3


def test_missing_counts_are_refused(evidence: Path) -> None:
    (evidence / "work.json").unlink()
    write_manifest(evidence)
    with pytest.raises(EvidenceRejected, match=r"has no work\.json, and its plan has work counted"):
        judge_run(evidence)


def test_counts_that_the_plan_does_not_name_are_refused(tmp_path: Path) -> None:
    folder = write_evidence(tmp_path / "run")
    write_work(folder / "work.json", work_of([TWINS]))
    write_manifest(folder)
    with pytest.raises(EvidenceRejected, match="the plan has no work counted"):
        judge_run(folder)


def test_a_report_written_again_has_the_counts(evidence: Path, tmp_path: Path) -> None:
    assert read_starts(evidence)
    path = report.write(evidence, judge_run(evidence), tmp_path / "again.html")
    assert path.read_text() == (evidence / "report.html").read_text()


def test_a_plan_with_counts_reads_back_the_same(tmp_path: Path) -> None:
    plan = write_plan(tmp_path)
    plan.path.write_text(plan.path.read_text() + TABLE)
    plan = read_plan(plan.path)
    assert plan.work is not None
    assert plan.work.lengths == (8, 32)
    again = tmp_path / "again.toml"
    again.write_text(to_toml(plan, "again"))
    assert read_plan(again).work == plan.work


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("length = [8]", "\\[work\\] has no key 'length'.* did you mean 'lengths'"),
        ("lengths = [0]", "lengths holds 0, which is no number of tokens"),
        ("margin = 2.0", "margin = 2.0 is not between 0 and 1"),
        ("variant = 1", "variant = 1 is not of type str"),
    ],
)
def test_wrong_keys_of_a_plan_are_named(tmp_path: Path, line: str, words: str) -> None:
    plan = write_plan(tmp_path)
    plan.path.write_text(f"{plan.path.read_text()}\n[work]\n{line}\n")
    with pytest.raises(CommandError, match=words):
        read_plan(plan.path)
