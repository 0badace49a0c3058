"""The judge's calibration in small; the committed tables are the same code with more runs."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from benchmarks.proving import large, slice_worlds
from benchmarks.proving.judge import main, rightly_equivalent, wrongly_equivalent
from benchmarks.proving.noise import LATENCY_MODELS, simulate_pilot, simulate_run, simulated_plan
from benchmarks.proving.rates import Rate
from benchmarks.proving.real_runs import on_margin_rates, read_joined, real_rates
from command import BadInput
from proof.evidence.store import RestartRecord, write_manifest
from proof.sizing.power import size_plan
from proof.verdict.judge import judge_level
from tests.proof.factories import write_evidence
from tests.proof.sizing.test_pilot import write_pilot


def test_with_the_truth_on_the_margin_the_judge_seldom_says_equivalent() -> None:
    # Seeded, so it cannot flicker: 5 % is what the test allows, and 600 runs tell it to within 2 %.
    rates = list(
        wrongly_equivalent(600, models=(LATENCY_MODELS[0], LATENCY_MODELS[-1]), sizes=(8,))
    )
    assert len(rates) == 10
    for rate in rates:
        assert rate.interval[0] < 0.05, rate
        assert rate.rate < 0.07, rate


def test_equal_models_come_out_equivalent_in_runs_that_were_sized_for_it() -> None:
    [rate] = rightly_equivalent(3, models=LATENCY_MODELS[:1], runs=20)
    assert rate.runs == 60
    assert rate.rate > 0.8


def test_a_plan_is_large_enough_for_its_delayed_arm_to_be_detected() -> None:
    rng = np.random.default_rng(3)
    detected = []
    for _ in range(6):
        plan, size = size_plan(
            simulate_pilot(LATENCY_MODELS[0], 12, 60, rng),
            simulated_plan(8, 60, {"p50": 0.02}),
            0.8,
            math.inf,
        )
        # One claim alone, so whatever the joint power lacks of it is the control's.
        assert 0.8 <= size.power < min(size.power_by_part.values())
        starts = [RestartRecord(r, r, "", f"i{r}", 1.0, 0.1, 0, "") for r in range(plan.restarts)]
        for _ in range(20):
            readings = simulate_run(
                LATENCY_MODELS[0],
                plan.restarts,
                plan.levels[0].tuples * 3 // 4,
                1.0,
                plan.delay,
                rng,
            )
            breached = judge_level(plan, plan.levels[0], readings, starts).breached
            detected.append(not any("bert-delayed" in gate for gate in breached))
    assert np.mean(detected) > 0.8


def test_an_interval_of_a_rate_is_clopper_and_pearsons() -> None:
    assert Rate("", 8, "", 0, 100).interval == pytest.approx((0.0, 0.0362), abs=1e-4)
    assert Rate("", 8, "", 5, 100).interval == pytest.approx((0.0164, 0.1128), abs=1e-4)


def test_runs_are_drawn_from_a_real_one_in_whole_squares(tmp_path: Path) -> None:
    rates = list(
        real_rates(
            [write_pilot(tmp_path / "run", noise=0.02, restarts=20, levels=("unloaded",))], most=20
        )
    )
    wrong = [rate for rate in rates if rate.label == "wrong"]
    assert {rate.restarts for rate in rates} == {8, 12, 16, 20}
    assert {rate.runs for rate in wrong} == {
        6,
        30,
        60,
    }  # ten pairs of squares of five, ten triples, five fours, all; six ways to divide four copies
    assert sum(rate.hits for rate in wrong) / sum(rate.runs for rate in wrong) < 0.1
    right = [
        rate for rate in rates if rate.label == "right" and rate.case == "unloaded inference p50"
    ]
    assert all(rate.rate > 0.9 for rate in right)


def test_real_runs_of_one_claim_are_joined_and_others_refused(tmp_path: Path) -> None:
    runs = [
        write_pilot(tmp_path / name, noise=0.02, restarts=8, levels=("unloaded",), seed=seed)
        for seed, name in enumerate(("one", "two", "three"))
    ]
    for folder, claim in zip(runs, ("a", "a", "b"), strict=True):
        _claim(folder, claim)
    _, joined = read_joined(runs[:2])
    assert joined["unloaded"].positions.shape[0] == 16
    assert {rate.restarts for rate in real_rates(runs[:2], most=3)} == {8, 12, 16}
    with pytest.raises(BadInput, match="one, two, three are not runs of one claim"):
        read_joined(runs)
    with pytest.raises(BadInput, match="One run is given twice: one, one"):
        read_joined([runs[0], runs[0]])
    longer = write_pilot(tmp_path / "longer", restarts=8, levels=("unloaded", "switchback-50"))
    _claim(longer, "a")
    with pytest.raises(BadInput, match="The runs have other levels"):
        read_joined([runs[0], longer])


def _claim(folder: Path, digest: str) -> None:
    path = folder / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"claim_digest": digest}))
    write_manifest(folder)


def test_the_large_run_is_judged_and_the_page_says_how_it_was_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(large, "RESTARTS", 8)
    monkeypatch.setattr(large, "TUPLES", 64)
    assert main(["--large", "--out", str(tmp_path / "large.md")]) == 0
    assert "| 3,328 | 8 |" in capsys.readouterr().out
    assert (
        "Made by `python -m benchmarks judge --large --out" in (tmp_path / "large.md").read_text()
    )


def test_adjusted_slices_seldom_err_and_a_candidate_that_waits_is_not_equivalent() -> None:
    worlds = slice_worlds.SLICE_WORLDS
    rates = list(slice_worlds.wrong_rates(60, sizes=(8,), worlds=(worlds[0], worlds[-1])))
    assert all(each.adjusted <= 0.15 for each in rates)
    [waiting] = slice_worlds.waiting_rates(60, sizes=(16,))
    assert waiting.adjusted > 0.9
    assert waiting.claimed < 0.2
    [(_, right)] = slice_worlds.right_rates(30, sizes=(16,), scatters=(slice_worlds.MINI,))
    assert right.adjusted > 0.9
    assert right.unadjusted < 0.1


def test_runs_are_drawn_from_one_whose_candidates_are_on_the_margin(tmp_path: Path) -> None:
    folder = write_evidence(
        tmp_path / "run",
        restarts=16,
        noise=0.02,
        levels=("short-slices",),
        schedule_version=2,
        factors=dict.fromkeys(("drbert", "drbert-again"), 1.02),
    )
    rates = {
        rate.case: rate.rate for rate in on_margin_rates([folder], most=70) if rate.restarts == 8
    }
    assert rates["switchback-50 end_to_end_adjusted mean"] <= 0.2
    assert rates["switchback-50 dilation mean"] >= 0.5
    assert main(["--evidence", str(folder), "--on-margin", "--out", str(tmp_path / "t.md")]) == 0
    assert "| switchback-50 all claims | 8 |" in (tmp_path / "t.md").read_text()
