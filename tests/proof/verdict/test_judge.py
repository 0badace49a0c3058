from __future__ import annotations

import csv
import hashlib
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy import stats

from proof.commands import main
from proof.evidence.audit import read_sealed_plan
from proof.evidence.statistics import (
    adjusted_contrast,
    lag_one_autocorrelation,
    plain_contrast,
    slope,
    summarize_latencies,
)
from proof.evidence.store import EvidenceRejected, read_starts, write_csv, write_manifest
from proof.measuring.run import finish_run, resume_run
from proof.verdict.controls import control_gates
from proof.verdict.judge import judge_run
from proof.verdict.outcome import level_outcome
from proof.verdict.scope import write_sentence
from proof.verdict.terminal import describe
from tests.proof.factories import write_evidence


def test_equal_arms_are_equivalent_and_the_kept_decoder_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_evidence(tmp_path / "run", noise=0.02)
    assert main(["judge", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "verdict: equivalent. drbert is as fast as bert" in printed
    assert re.search(
        r"control drbert-with-decoder inference p50: \+(39|40)\.\d\d% .*, beyond",
        printed,
    )
    assert re.search(
        r"control bert-delayed inference p50: \+[56]\.\d\d% .*, expected \+6.00%, beyond",
        printed,
    )


def test_a_slower_candidate_is_not_equivalent(tmp_path: Path) -> None:
    folder = write_evidence(
        tmp_path / "run", factors={"drbert": 1.1, "drbert-again": 1.1}, noise=0.02
    )
    verdict = judge_run(folder)
    assert verdict.verdict == "not-equivalent"
    assert verdict.levels["unloaded"].direction == "slower"
    assert main(["judge", str(folder)]) == 1


def test_a_faster_candidate_is_not_equivalent_but_not_slower_either(tmp_path: Path) -> None:
    factors = {"drbert": 0.9, "drbert-again": 0.9}
    equivalence = judge_run(write_evidence(tmp_path / "a", factors=factors, noise=0.02))
    inferiority = judge_run(
        write_evidence(tmp_path / "b", factors=factors, noise=0.02, claim="non-inferiority")
    )
    assert equivalence.verdict == "not-equivalent"
    assert equivalence.levels["unloaded"].direction == "faster"
    assert inferiority.verdict == "not-slower"
    level = inferiority.levels["unloaded"]
    assert (level.not_slower, level.equivalent) == (True, False)


def test_noise_that_hides_the_difference_is_inconclusive(tmp_path: Path) -> None:
    folder = write_evidence(tmp_path / "run", noise=0.2, seed=1)
    assert judge_run(folder).verdict == "inconclusive"
    assert main(["judge", str(folder)]) == 2


def test_fewer_restarts_than_planned_are_never_equivalent(tmp_path: Path) -> None:
    short = judge_run(write_evidence(tmp_path / "short", restarts=8, planned=12, noise=0.01))
    few = judge_run(write_evidence(tmp_path / "few", restarts=4, noise=0.01))
    assert short.levels["unloaded"].equivalent
    assert (short.verdict, few.verdict) == ("inconclusive", "inconclusive")


def test_a_run_that_does_not_detect_its_control_is_invalid(tmp_path: Path) -> None:
    folder = write_evidence(tmp_path / "run", factors={"drbert-with-decoder": 1.0}, noise=0.02)
    assert judge_run(folder).verdict == "invalid"
    assert main(["judge", str(folder)]) == 3


def test_a_biased_copy_makes_the_run_invalid(tmp_path: Path) -> None:
    verdict = judge_run(write_evidence(tmp_path / "run", factors={"bert-again": 1.05}, noise=0.01))
    assert verdict.verdict == "invalid"
    assert any("A/A: bert and bert-again" in name for name in verdict.levels["unloaded"].breached)


def test_too_many_dropped_restarts_make_the_run_invalid(tmp_path: Path) -> None:
    verdict = judge_run(write_evidence(tmp_path / "run", dropped=(1, 4, 7), noise=0.01))
    assert verdict.verdict == "invalid"
    assert verdict.levels["unloaded"].breached == ["few restarts dropped"]
    assert verdict.levels["unloaded"].restarts_kept == 8


def test_a_dropped_restart_keeps_its_rows_and_does_not_count(tmp_path: Path) -> None:
    folder = write_evidence(tmp_path / "run", dropped=(3,), noise=0.01)
    verdict = judge_run(folder)
    assert verdict.verdict == "equivalent"
    assert verdict.levels["unloaded"].restarts_kept == 8
    assert 3 in pq.read_table(folder / "requests.parquet")["restart"].to_pylist()
    assert "3" not in {
        row["restart"] for row in csv.DictReader((folder / "restarts.csv").read_text().splitlines())
    }


ALL_LEVELS = ("unloaded", "mixed-50", "switchback-50", "capacity")


def test_every_level_has_a_verdict_and_the_run_takes_the_worst(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_evidence(tmp_path / "run", noise=0.02, levels=ALL_LEVELS)
    assert main(["judge", str(folder)]) == 0
    verdict = judge_run(folder)
    assert {name: level.verdict for name, level in verdict.levels.items()} == dict.fromkeys(
        ALL_LEVELS, "equivalent"
    )
    assert [(s.metric, s.statistic) for s in verdict.levels["mixed-50"].statistics] == [
        ("inference", "p50"),
        ("inference", "mean"),
    ]
    # What the queue multiplies, the margin is widened by.
    widened = verdict.levels["switchback-50"].statistics[0]
    assert widened.gain == 1.5
    assert widened.margin == pytest.approx(1.02**1.5 - 1)
    slower = judge_run(
        write_evidence(
            tmp_path / "slower",
            noise=0.02,
            levels=("mixed-50", "capacity"),
            factors={"drbert": 1.1, "drbert-again": 1.1},
        )
    )
    assert slower.verdict == "not-equivalent"
    assert (
        "slower than bert by more than a claimed margin at mixed-50 and capacity" in slower.sentence
    )


@pytest.mark.parametrize("level", ALL_LEVELS)
def test_a_delay_that_is_not_detected_makes_the_level_invalid(tmp_path: Path, level: str) -> None:
    verdict = judge_run(
        write_evidence(tmp_path / "run", noise=0.02, levels=(level,), factors={"bert-delayed": 1.0})
    )
    assert verdict.verdict == "invalid"
    assert "bert-delayed is told apart" in verdict.levels[level].breached


def test_a_delay_that_is_read_as_another_makes_the_run_invalid(tmp_path: Path) -> None:
    verdict = judge_run(write_evidence(tmp_path / "run", noise=0.02, factors={"bert-delayed": 1.2}))
    assert verdict.levels["unloaded"].breached == ["bert-delayed is as slow as it was made"]


def test_a_drift_common_to_all_copies_is_no_breach_and_one_of_their_ratio_is(
    tmp_path: Path,
) -> None:
    def common(row: dict[str, Any]) -> None:
        row["inference_us"] *= 1 + row["block_id"] / 100

    def of_one_copy(row: dict[str, Any]) -> None:
        if row["arm"] == "bert-again":
            row["inference_us"] *= 1 + 0.1 * (row["block_id"] / 64 - 0.5)

    drifting = judge_run(
        write_evidence(tmp_path / "common", noise=0.02, change=common, control=False)
    ).levels["unloaded"]
    assert "no drift of the ratio within restarts" not in drifting.breached
    alone = judge_run(
        write_evidence(tmp_path / "alone", noise=0.02, change=of_one_copy, control=False)
    ).levels["unloaded"]
    assert "no drift of the ratio within restarts" in alone.breached


def test_a_same_model_pair_is_reported_in_full(tmp_path: Path) -> None:
    level = judge_run(write_evidence(tmp_path / "run", noise=0.02)).levels["unloaded"]
    assert {contrast.arms for contrast in level.same_model} == {
        ("bert", "bert-again"),
        ("drbert", "drbert-again"),
    }
    assert len(level.same_model) == 2 * len(level.statistics)
    assert not any(contrast.biased for contrast in level.same_model)


def test_rows_that_were_due_at_another_time_than_the_plans_are_refused(tmp_path: Path) -> None:
    folder = write_evidence(tmp_path / "run", levels=("mixed-50",))
    table = pq.read_table(folder / "requests.parquet")
    change_table(folder, "scheduled_ns", table["scheduled_ns"][40].as_py() - 2000)
    with pytest.raises(EvidenceRejected, match="was due at another time than the plan's"):
        judge_run(folder)


def test_a_slice_that_began_before_the_last_was_answered_is_refused(tmp_path: Path) -> None:
    folder = write_evidence(tmp_path / "run", levels=("switchback-50",))
    table = pq.read_table(folder / "requests.parquet")
    change_table(folder, "done_ns", table["done_ns"][299].as_py() + 10**9, row=299)
    with pytest.raises(EvidenceRejected, match="a slice of switchback-50 began before"):
        judge_run(folder)


def test_two_restarts_of_one_start_of_a_server_are_no_two(tmp_path: Path) -> None:
    def one_server(row: dict[str, Any]) -> None:
        row["instance"] = "i0"

    folder = write_evidence(tmp_path / "run", change=one_server, sealed=False)
    starts = (folder / "starts.csv").read_text()
    (folder / "starts.csv").write_text(re.sub(r",i\d,", ",i0,", starts))
    with pytest.raises(
        EvidenceRejected, match="answered by the same start of a server as restart 0"
    ):
        finish_run(folder)


def test_a_plan_computed_from_a_pilot_is_nothing_without_it(tmp_path: Path) -> None:
    folder = write_evidence(tmp_path / "run")
    (folder / "plan.toml").write_text(
        f'pilot = "{"0" * 64}"\n' + (folder / "plan.toml").read_text()
    )
    write_manifest(folder)
    with pytest.raises(EvidenceRejected, match=r"has no pilot\.json"):
        judge_run(folder)
    (folder / "pilot.json").write_text("{}")
    write_manifest(folder)
    with pytest.raises(
        EvidenceRejected, match=r"pilot\.json is not the pilot that the plan was computed from"
    ):
        judge_run(folder)


def test_a_gain_beyond_what_the_pilot_found_is_refused(tmp_path: Path) -> None:
    folder = write_evidence(tmp_path / "run", levels=("switchback-50",))
    small = json.dumps(
        {"levels": {"switchback-50": {"statistics": {"end_to_end.p50": {"gain": 1.2}}}}}
    )
    digest = hashlib.sha256(small.encode()).hexdigest()
    (folder / "pilot.json").write_text(small)
    (folder / "plan.toml").write_text(
        re.sub(r'pilot = "\w+"', f'pilot = "{digest}"', (folder / "plan.toml").read_text())
    )
    write_manifest(folder)
    with pytest.raises(
        EvidenceRejected,
        match=(
            r"the gain 1\.5 of switchback-50 end_to_end p50 is more than its pilot found \(1\.2\)"
        ),
    ):
        judge_run(folder)


def test_texts_the_plan_binds_are_the_texts_of_the_evidence(tmp_path: Path) -> None:
    folder = write_evidence(tmp_path / "run")
    plan = (folder / "plan.toml").read_text()
    (folder / "plan.toml").write_text(f'texts_sha256 = "{"0" * 64}"\n' + plan)
    write_manifest(folder)
    with pytest.raises(
        EvidenceRejected, match="does not hold the texts that the plan was made for"
    ):
        judge_run(folder)


@pytest.mark.parametrize(
    "content",
    ["[]", "{}", '{"run": "r", "plan": "p", "plan_digest": "0", "number_for_this_plan": 1}'],
)
def test_a_run_json_of_no_run_or_of_another_plan_is_rejected(tmp_path: Path, content: str) -> None:
    folder = write_evidence(tmp_path / "run")
    (folder / "run.json").write_text(content)
    write_manifest(folder)
    with pytest.raises(
        EvidenceRejected, match=r"run\.json (cannot be read|tells of another plan|holds list|says)"
    ):
        judge_run(folder)


def test_a_byte_flipped_in_the_manifest_itself_is_refused(tmp_path: Path) -> None:
    folder = write_evidence(tmp_path / "run")
    content = bytearray((folder / "MANIFEST.sha256").read_bytes())
    for place in (3, 70):
        flipped = bytearray(content)
        flipped[place] ^= 0x80
        (folder / "MANIFEST.sha256").write_bytes(flipped)
        with pytest.raises(EvidenceRejected):
            judge_run(folder)


def test_a_restart_that_was_killed_after_its_last_row_is_recorded_and_does_not_count(
    tmp_path: Path,
) -> None:
    folder = write_evidence(tmp_path / "run", sealed=False)
    lines = (folder / "starts.csv").read_text().splitlines(keepends=True)
    (folder / "starts.csv").write_text(
        "".join(lines[:-1]) + lines[-1][:9]
    )  # the line itself was cut short
    verdict = finish_run(folder)
    level = verdict.levels["unloaded"]
    assert (level.restarts_kept, level.restarts_dropped) == (7, 1)
    assert judge_run(folder) == verdict


def test_a_run_that_was_killed_while_it_was_sealed_loses_and_doubles_nothing(
    tmp_path: Path,
) -> None:
    folder = write_evidence(tmp_path / "run", sealed=False)
    shutil.copytree(folder / "rows", tmp_path / "rows")
    whole = finish_run(folder)
    rows = pq.read_table(folder / "requests.parquet").num_rows
    # The new file was there and the old ones not yet removed; nor was there a verdict.
    shutil.copytree(tmp_path / "rows", folder / "rows")
    for name in ("MANIFEST.sha256", "verdict.json", "restarts.csv", "report.html"):
        (folder / name).unlink()
    _, again = resume_run(folder)
    assert again == whole
    assert pq.read_table(folder / "requests.parquet").num_rows == rows


def test_a_run_interrupted_before_its_first_control_is_sealed_all_the_same(tmp_path: Path) -> None:
    folder = write_evidence(tmp_path / "run", restarts=4, sealed=False)
    (folder / "starts.csv").unlink()
    for part in sorted((folder / "rows").glob("*.csv"))[1:]:
        part.unlink()
    path = folder / "rows/000.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:20]))
    assert finish_run(folder).verdict == "invalid"
    assert judge_run(folder).levels["unloaded"].restarts_kept == 0


def test_levels_that_ran_side_by_side_are_refused(tmp_path: Path) -> None:
    folder = write_evidence(tmp_path / "run", levels=("unloaded", "mixed-50"), control=False)
    table = pq.read_table(folder / "requests.parquet")
    last = max(i for i, name in enumerate(table["level"].to_pylist()[:400]) if name == "unloaded")
    change_table(folder, "done_ns", table["done_ns"][last].as_py() + 10**12, row=last)
    with pytest.raises(
        EvidenceRejected, match="level mixed-50 began before the one before it was answered"
    ):
        judge_run(folder)


def test_a_verdict_of_another_schema_is_refused(tmp_path: Path) -> None:
    folder = write_evidence(tmp_path / "run")
    for change, words in (
        ({"schema_version": 99}, "schema_version 99 is unknown"),
        ({"colour": 1}, "colour: Extra inputs"),
    ):
        verdict = json.loads((folder / "verdict.json").read_text())
        (folder / "verdict.json").write_text(json.dumps(verdict | change))
        write_manifest(folder)
        with pytest.raises(EvidenceRejected, match=words):
            main(["judge", str(folder)])
        (folder / "verdict.json").write_text(json.dumps(verdict))


def change_table(folder: Path, column: str, value: Any, row: int = 40) -> None:
    table = pq.read_table(folder / "requests.parquet")
    values = table[column].to_pylist()
    values[row] = value
    place = table.column_names.index(column)
    table = table.set_column(place, column, pa.array(values, table.schema.field(column).type))
    pq.write_table(table, folder / "requests.parquet")
    write_manifest(folder)


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        ("inference_us", float("nan"), "column inference_us holds NaN"),
        ("queue_us", -1.0, "column queue_us holds a negative time"),
        ("done_ns", 0, "times run backward"),
        ("request_id", "unloaded.0.-1.0.0", "the request_id unloaded.0.-1.0.0 occurs twice"),
        ("request_id", "elsewhere", "has request_id elsewhere, the plan unloaded"),
        ("arm", "stranger", "an arm stranger that the plan has not"),
        ("run", "r-0000000000000000", "made under another plan"),
        ("status", 500, r"is counted, its rows say: dropped \(1 requests without a good answer"),
        ("restart", 99, "restart 99 has rows and no line"),
        ("slice_id", 5, "has slice_id 5, the plan 0"),
        ("text_id", 7, "has text_id 7, the plan"),
        ("load_position", 9, "has load_position 9, the plan"),
        ("instance", "i99", "answered by i99, which starts.csv does not know|the server of "),
        ("level", "switchback-80", "rows of another level"),
        ("tokens", 2, "has 2 and 5 tokens; every arm must read all of a text"),
        ("batch_size", 7, "a batch of several texts at level unloaded"),
        ("batch_tokens", 1, "a batch has fewer tokens than its text"),
        ("bytes", 0, "an answer has no batch, or no bytes"),
        ("inference_cpu_us", float("nan"), "column inference_cpu_us holds no time"),
        ("inference_cpu_us", -0.5, "column inference_cpu_us holds no time"),
    ],
)
def test_rows_that_cannot_be_are_refused(
    tmp_path: Path, column: str, value: Any, words: str
) -> None:
    folder = write_evidence(tmp_path / "run")
    change_table(folder, column, value)
    with pytest.raises(EvidenceRejected, match=words):
        judge_run(folder)


def test_one_changed_byte_is_refused(tmp_path: Path) -> None:
    folder = write_evidence(tmp_path / "run")
    path = folder / "requests.parquet"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    with pytest.raises(EvidenceRejected, match=r"requests\.parquet has changed"):
        judge_run(folder)


FILES = [
    "requests.parquet",
    "restarts.csv",
    "starts.csv",
    "plan.toml",
    "texts.txt",
    "verdict.json",
    "run.json",
    "report.html",
]


@pytest.mark.parametrize("name", [*FILES, "MANIFEST.sha256"])
def test_a_missing_file_is_refused_by_name(tmp_path: Path, name: str) -> None:
    folder = write_evidence(tmp_path / "run")
    (folder / name).unlink()
    with pytest.raises(EvidenceRejected, match=name):
        judge_run(folder)


@pytest.mark.parametrize("name", FILES)
def test_a_file_left_out_of_the_manifest_too_is_still_missed(tmp_path: Path, name: str) -> None:
    folder = write_evidence(tmp_path / "run")
    (folder / name).unlink()
    write_manifest(folder)
    with pytest.raises(EvidenceRejected, match=name):
        judge_run(folder)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("plan.toml", "["),
        ("starts.csv", "restart\nx\n"),
        ("verdict.json", "{"),
        ("verdict.json", "[]"),
        ("run.json", "?"),
        ("requests.parquet", "?"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_and_no_bug(
    tmp_path: Path, name: str, content: str
) -> None:
    folder = write_evidence(tmp_path / "run")
    (folder / name).write_text(content)
    write_manifest(folder)
    with pytest.raises(EvidenceRejected):
        main(["judge", str(folder)])


def change_starts(folder: Path, **values: str) -> None:
    """Changes the third start's line and seals the folder again."""
    path = folder / "starts.csv"
    lines = list(csv.DictReader(path.read_text().splitlines()))
    lines[2] |= values
    write_csv(path, list(lines[0]), lines)
    write_manifest(folder)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            {"dropped": "a neighbour was noisy"},
            r"dropped \(a neighbour was noisy\), its rows say: counted",
        ),
        ({"dropped": "interrupted"}, r"dropped \(interrupted\), its rows say: counted"),
        (
            {"throttled_us": "5"},
            r"counted, its rows say: dropped \(the container was throttled for 5",
        ),
        ({"gpu_slowed": "heat"}, r"counted, its rows say: dropped \(a GPU was slowed down by heat"),
        ({"slot": "1"}, "took slot 1 of the load orders, 2 was next"),
        (
            {"load_order": "drbert-with-decoder drbert bert bert-again drbert-again"},
            "is not the plan's order",
        ),
        ({"load_order": "nobody"}, "is not the plan's order"),
        ({"generator_cpu_share": "nan"}, "generator_cpu_share = nan"),
        ({"throttled_us": "-5"}, "throttled_us = -5"),
    ],
)
def test_a_start_that_cannot_be_or_that_its_rows_contradict_is_rejected(
    tmp_path: Path, values: dict[str, str], words: str
) -> None:
    folder = write_evidence(tmp_path / "run")
    change_starts(folder, **values)
    with pytest.raises(EvidenceRejected, match=words):
        judge_run(folder)


def test_rows_of_two_runs_do_not_make_one(tmp_path: Path) -> None:
    folder = write_evidence(tmp_path / "run")
    table = pq.read_table(folder / "requests.parquet")
    change_table(folder, "run", "other-" + table["run"][0].as_py()[-16:])
    with pytest.raises(EvidenceRejected, match="come from 2 runs"):
        judge_run(folder)


def test_the_order_of_the_rows_in_the_file_does_not_matter(tmp_path: Path) -> None:
    folder = write_evidence(tmp_path / "run")
    before = judge_run(folder)
    table = pq.read_table(folder / "requests.parquet")
    shuffled = np.random.default_rng(0).permutation(table.num_rows)
    pq.write_table(table.take(shuffled), folder / "requests.parquet")
    write_manifest(folder)
    assert judge_run(folder) == before


def test_a_verdict_touched_up_anywhere_is_refused(tmp_path: Path) -> None:
    folder = write_evidence(tmp_path / "run")
    verdict = json.loads((folder / "verdict.json").read_text())
    verdict["levels"]["unloaded"]["statistics"][0]["interval"][1] = 1.001
    (folder / "verdict.json").write_text(json.dumps(verdict))
    write_manifest(folder)
    with pytest.raises(
        EvidenceRejected, match=r"verdict\.levels\.unloaded\.statistics\[0\]\.interval\[1\]"
    ):
        main(["judge", str(folder)])


def test_a_file_that_the_manifest_does_not_list_is_rejected(tmp_path: Path) -> None:
    folder = write_evidence(tmp_path / "run")
    (folder / "notes.txt").write_text("?")
    with pytest.raises(EvidenceRejected, match=r"notes\.txt is not listed"):
        judge_run(folder)


def test_restarts_that_do_not_follow_from_the_rows_are_refused(tmp_path: Path) -> None:
    folder = write_evidence(tmp_path / "run")
    change_table(folder, "inference_us", 1.0)
    with pytest.raises(EvidenceRejected, match="does not follow from the rows"):
        judge_run(folder)


def test_rows_of_another_plan_are_rejected(tmp_path: Path) -> None:
    folder = write_evidence(tmp_path / "run")
    (folder / "plan.toml").write_text(
        (folder / "plan.toml").read_text().replace("p50 = 0.02", "p50 = 0.20")
    )
    write_manifest(folder)
    with pytest.raises(EvidenceRejected, match="made under another plan"):
        judge_run(folder)


def test_a_committed_verdict_that_the_evidence_does_not_bear_is_refused(tmp_path: Path) -> None:
    folder = write_evidence(tmp_path / "run", noise=0.2, seed=1)
    verdict = json.loads((folder / "verdict.json").read_text())
    (folder / "verdict.json").write_text(json.dumps(verdict | {"verdict": "equivalent"}))
    write_manifest(folder)
    with pytest.raises(EvidenceRejected, match="says equivalent, the evidence says inconclusive"):
        main(["judge", str(folder)])


def test_judging_changes_nothing(tmp_path: Path) -> None:
    folder = write_evidence(tmp_path / "run")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    main(["judge", str(folder)])
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_the_verdict_follows_from_restarts_csv_by_hand(tmp_path: Path) -> None:
    folder = write_evidence(tmp_path / "run")
    item = next(
        i
        for i in judge_run(folder).levels["unloaded"].statistics
        if (i.metric, i.statistic) == ("inference", "p50")
    )
    rows = [
        r
        for r in csv.DictReader((folder / "restarts.csv").read_text().splitlines())
        if (r["block"], r["metric"], r["statistic"]) == ("plain", "inference", "p50")
    ]
    logs = {(int(r["restart"]), r["arm"]): float(r["log"]) for r in rows}
    delta = np.mean(
        [
            (logs[r, "drbert"] + logs[r, "drbert-again"] - logs[r, "bert"] - logs[r, "bert-again"])
            / 2
            for r in range(8)
        ]
    )
    assert item.ratio == pytest.approx(math.exp(delta), abs=1e-12)
    # The interval, too: deviations from restart, arm and load position, as a spreadsheet would do
    # it.
    arms = ["bert", "bert-again", "drbert", "drbert-again"]
    place = {(int(r["restart"]), r["arm"]): int(r["load_position"]) for r in rows}
    e = {(r, a): logs[r, a] - np.mean([logs[r, b] for b in arms]) for r in range(8) for a in arms}
    by_arm = {a: np.mean([e[r, a] for r in range(8)]) for a in arms}
    by_place = {p: np.mean([e[cell] for cell in e if place[cell] == p]) for p in range(4)}
    u = [
        sum(
            c * (e[r, a] - by_arm[a] - by_place[place[r, a]])
            for a, c in zip(arms, (-0.5, -0.5, 0.5, 0.5), strict=True)
        )
        for r in range(8)
    ]
    reach = stats.t.ppf(0.95, 6) * math.sqrt(sum(x * x for x in u) / 6 / 8)
    assert item.interval == pytest.approx(
        (math.exp(delta - reach), math.exp(delta + reach)), abs=1e-12
    )


def test_the_interval_is_students_when_load_position_has_no_effect() -> None:
    # Two arms a restart, each at both positions equally: removing the (zero) position effect costs
    # one degree of freedom.
    rng = np.random.default_rng(0)
    y = rng.standard_normal((12, 2))
    positions = np.array([[0, 1], [1, 0]] * 6)
    estimate = adjusted_contrast(y, positions, np.array([-1.0, 1.0]))
    difference = y[:, 1] - y[:, 0]
    sign = np.array([1, -1] * 6)
    residual = difference - difference.mean() - sign * (difference * sign).mean()
    error = math.sqrt((residual**2).sum() / 10 / 12)
    assert estimate.delta == pytest.approx(difference.mean())
    assert estimate.error == pytest.approx(error)
    low, high = estimate.interval(0.9)
    assert high - low == pytest.approx(2 * stats.t.ppf(0.95, 10) * error)


def test_a_load_position_effect_does_not_widen_the_interval() -> None:
    rng = np.random.default_rng(1)
    noise = 0.001 * rng.standard_normal((8, 4))
    positions = np.array([np.roll(np.arange(4), shift) for shift in range(8)])
    contrast = np.array([-0.5, -0.5, 0.5, 0.5])
    without = adjusted_contrast(noise, positions, contrast)
    large = adjusted_contrast(
        noise + np.array([0.5, 0.1, -0.2, -0.4])[positions], positions, contrast
    )
    assert large.delta == pytest.approx(without.delta)
    assert large.error == pytest.approx(without.error)


def test_the_plain_interval_is_scipys() -> None:
    values = np.random.default_rng(2).standard_normal(10)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.9)
    assert plain_contrast(values).interval(0.9) == pytest.approx((expected.low, expected.high))


def test_statistics_are_numpys() -> None:
    values = np.arange(1.0, 102.0)
    assert summarize_latencies(values) == {"p50": 51.0, "mean": 51.0, "p95": 96.0, "p99": 100.0}
    assert slope(np.arange(11.0)) == pytest.approx(10.0)


def test_wrong_equivalence_at_the_margin_is_rare() -> None:
    # The truth exactly on the margin: a right judge says "equivalent" in about 5 % of the cases.
    # Seeded, so it cannot flicker.
    rng = np.random.default_rng(3)
    positions = np.array([np.roll(np.arange(4), shift) for shift in range(8)])
    contrast = np.array([-0.5, -0.5, 0.5, 0.5])
    margin = math.log1p(0.02)
    wrong = 0
    for _ in range(2000):
        y = (
            0.004 * rng.standard_normal((8, 4))
            + rng.standard_normal((8, 1))
            + np.array([0, 0, margin, margin])
        )
        y += np.array([0.01, 0, -0.006, -0.007])[positions]
        low, high = adjusted_contrast(y, positions, contrast).interval(0.9)
        wrong += -margin < low and high < margin
    assert 0.035 < wrong / 2000 < 0.065


def with_cpu_time(row: dict[str, Any]) -> None:
    """Report the CPU time of inference: 1 ms for every arm but the delayed one and the control."""
    factor = {"bert-delayed": 1.06, "drbert-with-decoder": 1.4}.get(row["arm"], 1.0)
    row["inference_cpu_us"] = 1000.0 * factor * (1 + row["text_id"] / 100)


def test_cpu_time_is_judged_next_to_wall_time(tmp_path: Path) -> None:
    folder = write_evidence(tmp_path / "run", levels=("unloaded-cpu",), change=with_cpu_time)
    verdict = judge_run(folder)
    assert [(s.metric, s.statistic) for s in verdict.levels["unloaded"].statistics] == [
        ("inference", "p50"),
        ("inference_cpu", "p50"),
        ("inference_cpu", "mean"),
    ]
    for statistic in verdict.levels["unloaded"].statistics[1:]:
        assert statistic.ratio == pytest.approx(1.0, abs=1e-9)
        assert statistic.equivalent


def test_a_claim_on_cpu_time_that_no_server_reported_drops_the_restarts(tmp_path: Path) -> None:
    folder = write_evidence(tmp_path / "run", levels=("unloaded-cpu",), sealed=False, restarts=4)
    dropped = [start.dropped for start in read_starts(folder)]
    assert set(dropped) == {"answers without the CPU time of inference, which the plan claims"}


def test_a_control_that_cannot_tell_makes_a_level_inconclusive_at_best(tmp_path: Path) -> None:
    folder = write_evidence(tmp_path / "run")
    level = judge_run(folder).levels["unloaded"]
    assert level.verdict == "equivalent"
    assert not any(gate.undecided for gate in level.gates)
    wide = [
        control.model_copy(update={"wide_interval": (0.9, 1.2), "as_expected": True})
        if control.expected
        else control
        for control in level.controls
    ]
    [known] = [
        gate
        for gate in control_gates(read_sealed_plan(folder), wide)
        if gate.name.endswith("as slow as it was made")
    ]
    assert known.passed
    assert known.undecided == "the intervals hold no delay at all, too"
    undecided = level.model_copy(update={"gates": [*level.gates, known]})
    assert level_outcome(undecided, "equivalence") == "inconclusive"
    assert level_outcome(undecided, "equivalence", may_be_undecided=False) == "equivalent"
    verdict = judge_run(folder)
    changed = undecided.model_copy(update={"verdict": "inconclusive"})
    sentence = write_sentence(
        verdict.model_copy(update={"verdict": "inconclusive", "levels": {"unloaded": changed}})
    )
    assert "Gates that cannot tell: bert-delayed is as slow as it was made" in sentence
    # One statistic that tells is enough, as for detection.
    narrow = [*wide[:1], level.controls[1], *wide[2:]]
    assert not any(gate.undecided for gate in control_gates(read_sealed_plan(folder), narrow))


def test_a_sentence_names_what_was_claimed(tmp_path: Path) -> None:
    verdict = judge_run(write_evidence(tmp_path / "run"))
    assert verdict.sentence == (
        "drbert is as fast as bert in p50 and mean of end to end and p50, mean and p99 of inference"
        " at unloaded, within ±2 % to ±10 % (8 restarts)."
    )
    assert verdict.scope is not None
    assert verdict.scope.not_claimed["unloaded"]["end_to_end"] == ["p95", "p99"]
    assert verdict.scope.tokens == (5, 5)
    printed = describe(verdict)
    assert "measured: variant, precision, engine and packing are unknown" in printed
    assert "both copies of a model from one folder: these two files on this boot" in printed


def test_autocorrelation_over_restarts_is_reported(tmp_path: Path) -> None:
    verdict = judge_run(write_evidence(tmp_path / "run"))
    item = verdict.levels["unloaded"].statistics[0]
    logs = np.log(item.restart_ratios) - np.log(item.restart_ratios).mean()
    assert item.autocorrelation == pytest.approx((logs[1:] @ logs[:-1]) / (logs @ logs))
    assert "lag-1 autocorrelation over restarts" in describe(verdict)
    assert lag_one_autocorrelation(np.ones(5)) is None
    assert lag_one_autocorrelation(np.array([1.0, -1.0] * 4)) == pytest.approx(-7 / 8)


def test_a_text_that_is_slower_is_seen_next_to_the_same_model(tmp_path: Path) -> None:
    def slow_for_one_text(row: dict[str, Any]) -> None:
        row["tokens"] = 4 + 10 * row["text_id"]
        row["batch_tokens"] = 30
        if row["text_id"] == 1 and row["arm"].startswith("drbert"):
            row["inference_us"] *= 1.1
            row["total_us"] += row["inference_us"]
            row["done_ns"] += int(row["inference_us"] * 1000)

    verdict = judge_run(write_evidence(tmp_path / "run", noise=0.02, change=slow_for_one_text))
    texts = verdict.levels["unloaded"].texts
    assert texts is not None
    assert (texts.texts, texts.candidate.text_id, texts.candidate.tokens) == (2, 1, 14)
    assert texts.candidate.ratio == pytest.approx(1.1, abs=0.01)
    assert texts.candidate.trend == pytest.approx(1.1, abs=0.01)
    assert texts.same_model.ratio == pytest.approx(1, abs=0.01)
    assert "from the shortest to the longest text +" in describe(verdict)
