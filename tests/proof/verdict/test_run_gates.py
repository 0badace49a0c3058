"""A cache that answers repeated texts makes a run invalid."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from command import BadInput
from proof.commands import main
from proof.plans.claim_digest import digest_claim
from proof.plans.plan_file import read_plan, to_toml
from proof.plans.schedule import FIRST, REPEATED, WARM_UP, build_schedule
from proof.verdict.judge import judge_run
from tests.proof.factories import LEVELS, write_evidence, write_plan

INVALID = 3
CACHE = "no cache answers repeated texts"


def repeats_take(share: float, start: str = "") -> Callable[[dict[str, Any]], None]:
    """Return a change after which repeated answers of some arms take a share of their time."""

    def change(row: dict[str, Any]) -> None:
        is_repeated = row["level"] == "repeat" and row["slice_id"] == REPEATED
        if is_repeated and row["arm"].startswith(start):
            row["total_us"] *= share
            row["inference_us"] *= 0.9 * share
            row["tokenize_us"] = row["queue_us"] = 0.0
            row["done_ns"] = row["sent_ns"] + int(share * (row["done_ns"] - row["sent_ns"]))

    return change


@pytest.mark.parametrize(
    ("share", "start", "code"),
    [(1.0, "", 0), (0.95, "", 0), (0.5, "", INVALID), (0.5, "drbert", INVALID)],
)
def test_a_cache_is_found_by_its_fast_repeats(
    tmp_path: Path, share: float, start: str, code: int
) -> None:
    folder = write_evidence(
        tmp_path / "run",
        levels=("unloaded", "repeat"),
        answers=True,
        change=repeats_take(share, start),
    )
    assert main(["judge", str(folder)]) == code
    verdict = judge_run(folder)
    assert list(verdict.levels) == ["unloaded"]
    [gate] = [gate for gate in verdict.levels["unloaded"].gates if gate.name == CACHE]
    assert gate.passed == (code == 0)
    assert "reference -" in gate.measured or "reference +" in gate.measured


def test_an_interval_that_is_too_wide_says_so(tmp_path: Path) -> None:
    def change(row: dict[str, Any]) -> None:
        repeats_take(0.4 if row["restart"] % 2 else 1.0)(row)

    folder = write_evidence(tmp_path / "run", levels=("unloaded", "repeat"), change=change)
    [gate] = [gate for gate in judge_run(folder).levels["unloaded"].gates if gate.name == CACHE]
    assert gate.passed
    assert gate.measured.count(", cannot tell)") == 2


def test_the_schedule_sends_first_answers_and_repeats_alike(tmp_path: Path) -> None:
    plan = write_plan(tmp_path / "plan", levels=("unloaded", "repeat"))
    level = plan.level("repeat")
    schedule = build_schedule(plan, level, 0, 2)
    assert len(schedule) == level.requests(len(plan.claimed_arms)) == (4 + 8) * 3 * 4
    assert set(schedule.arm) == set(plan.claimed_arms)
    for kind, times in ((FIRST, 1), (REPEATED, level.repeats)):
        chosen = schedule.slice_id == kind
        for arm in plan.claimed_arms:
            blocks = schedule.block_id[chosen & (schedule.arm == arm)].tolist()
            assert sorted(blocks) == sorted([*range(4, 12)] * times)
    # Every answer follows one to another text, but for those of the other arms.
    of_one_arm = schedule.block_id[schedule.arm == plan.claimed_arms[0]]
    assert (of_one_arm[1:] != of_one_arm[:-1]).all()
    assert set(schedule.slice_id[: 4 * 3 * 4]) == {WARM_UP}


def test_a_plan_with_repeats_reads_back_the_same(tmp_path: Path) -> None:
    plan = write_plan(tmp_path / "plan", levels=("unloaded", "repeat"))
    path = tmp_path / "again.toml"
    path.write_text(to_toml(plan, "again"))
    assert read_plan(path).levels == plan.levels


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("texts = 8", "texts = 6", r"texts = 6 is no multiple of 4"),
        ("repeats = 2", "repeats = 0", r"repeats = 0 is less than 1"),
        ("repeats = 2", "margins = {}", r"\[level.repeat\] has no key 'margins'"),
        ("repeats = 2", "repeats = 2000000", r"above 2,000,000"),
        (LEVELS["unloaded"], "", r"no level that claims anything"),
    ],
)
def test_a_level_that_repeats_nothing_or_stands_alone_is_refused(
    tmp_path: Path, old: str, new: str, words: str
) -> None:
    path = write_plan(tmp_path / "plan", control=False, levels=("unloaded", "repeat")).path
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(BadInput, match=words):
        read_plan(path)


def test_the_level_changes_neither_the_claim_nor_what_the_verdict_says_of_its_texts(
    tmp_path: Path,
) -> None:
    def lengthen(row: dict[str, Any]) -> None:
        row["tokens"] = row["batch_tokens"] = 21 if row["level"] == "repeat" else 5

    # The level comes first, so that its texts are the first ones with their numbers.
    levels = ("repeat", "unloaded")
    verdict = judge_run(
        write_evidence(tmp_path / "run", control=True, levels=levels, change=lengthen)
    )
    assert verdict.scope is not None
    assert list(verdict.scope.claimed) == list(verdict.scope.not_claimed) == ["unloaded"]
    assert verdict.scope.tokens == (5, 5)
    plain = write_plan(tmp_path / "plain")
    repeating = write_plan(tmp_path / "repeating", levels=levels)
    artifacts = {arm.name: "a" for arm in plain.arms}
    assert digest_claim(repeating, artifacts, b"") == digest_claim(plain, artifacts, b"")
