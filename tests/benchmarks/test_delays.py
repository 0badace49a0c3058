"""Delays that a proxy adds from outside."""

from __future__ import annotations

import urllib.request
from pathlib import Path

from benchmarks.harness.proxy import proxy
from benchmarks.proving.delays import Outcome, holds, measure, table
from proof.plans.plan_file import read_plan
from proof.verdict.schema import LevelVerdict, Verdict
from service.artifact import Artifact
from tests.proof.measuring.test_run import plan as plan
from tests.service.test_server import serving


def test_a_proxy_adds_its_share_of_the_servers_own_time(artifact: Artifact) -> None:
    with (
        serving(artifact) as (url, _),
        proxy(int(url.rpartition(":")[2]), 1.0, set()) as (port, stats),
    ):
        for _ in range(5):
            request = urllib.request.Request(
                f"http://127.0.0.1:{port}/classify", b'{"input": "good"}'
            )
            with urllib.request.urlopen(request, timeout=30) as response:
                assert response.status == 200
                assert b"POSITIVE" in response.read()
    assert stats.requests == 5
    assert stats.added_ns >= stats.took_ns


def test_a_delay_is_measured_through_the_whole_run(plan: Path, tmp_path: Path) -> None:
    text = plan.read_text().replace(
        "margins = { inference = { p50 = 0.5 }, end_to_end = { p50 = 0.5 } }",
        "margins = { end_to_end = { p50 = 0.3 } }",
    )
    plan.write_text(text)
    outcome = measure(read_plan(plan), 2.0, tmp_path / "evidence")
    assert outcome.true_ratio > 1.5
    [estimate] = outcome.verdict.levels["unloaded"].statistics
    assert estimate.ratio > 1.5
    shown = table(read_plan(plan), [outcome])
    assert "| 200% |" in shown


def test_only_no_delay_at_all_must_be_equivalent(plan: Path) -> None:
    read = read_plan(plan)  # its tightest margin is 50 %

    def outcome(share: float, word: str) -> Outcome:
        levels = {level.name: LevelVerdict.model_construct(verdict=word) for level in read.levels}
        return Outcome(share, 1 + share, Verdict.model_construct(levels=levels))

    assert holds(
        read,
        [
            outcome(0.0, "equivalent"),
            outcome(0.2, "equivalent"),
            outcome(0.5, "inconclusive"),
            outcome(0.9, "not-equivalent"),
        ],
    )
    assert not holds(read, [outcome(0.0, "inconclusive")])
    assert not holds(read, [outcome(0.5, "equivalent")])
    assert not holds(read, [outcome(0.5, "invalid")])
