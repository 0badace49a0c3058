"""A failed gate is reported as what happened, and not as what should have held."""

from __future__ import annotations

from pathlib import Path

import pytest

from proof.verdict.failures import describe_failure
from proof.verdict.judge import judge_run
from tests.proof.factories import write_evidence


@pytest.mark.parametrize("seed", [1, 2])
def test_every_gate_of_a_run_has_words_for_its_failure(tmp_path: Path, seed: int) -> None:
    folder = write_evidence(
        tmp_path / "run",
        seed=seed,
        levels=("unloaded", "mixed-50-busy", "short-slices"),
        schedule_version=2,
        noise=0.02,
    )
    gates = [gate.name for level in judge_run(folder).levels.values() for gate in level.gates]
    assert len(gates) > 5
    for gate in gates:
        assert not describe_failure(gate).startswith("this does not hold")
        assert describe_failure(gate) != gate


def test_a_run_whose_control_was_not_detected_says_so(tmp_path: Path) -> None:
    folder = write_evidence(tmp_path / "run", factors={"bert-delayed": 1.0}, control=False)
    verdict = judge_run(folder)
    assert verdict.verdict == "invalid"
    assert verdict.sentence.startswith("This run supports no claim: at unloaded ")
    assert "the slowdown of bert-delayed was not detected" in verdict.sentence


def test_an_undecided_run_names_a_statistic_that_is_not_within_its_margin(tmp_path: Path) -> None:
    verdict = judge_run(write_evidence(tmp_path / "run", noise=0.1, seed=1))
    assert verdict.verdict == "inconclusive"
    assert "statistics are within their margins, and " in verdict.sentence
    assert "is not within ±2 %" in verdict.sentence


def test_a_gate_of_a_later_version_is_named_as_what_does_not_hold() -> None:
    assert describe_failure("a new one") == "this does not hold: a new one"
