"""Evidence and plans that somebody changed: what the judge says, as an exit code and one line."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from command import BadInput, CommandError
from proof.commands import main
from proof.evidence.store import read_manifest_digest, write_manifest
from proof.measuring.run import finish_run
from proof.plans.plan_file import read_plan
from proof.reports.markdown import render
from proof.verdict.judge import judge_run
from proof.verdict.schema import PlanName
from tests.proof.factories import write_evidence, write_plan

INVALID = 3
CANDIDATES = ("drbert", "drbert-again")
DEEP = "[" * 100_000
LONG = "x" * 200_000


Change = Callable[[Path], object]
"""Changes the evidence in a folder."""


def replace_in(name: str, old: str, new: str) -> Change:
    def change(folder: Path) -> None:
        path = folder / name
        content = path.read_text()
        assert old in content
        path.write_text(content.replace(old, new, 1))

    return change


def overwrite(name: str, text: str) -> Change:
    def change(folder: Path) -> None:
        (folder / name).write_text(text)

    return change


def remove(name: str) -> Change:
    return lambda folder: (folder / name).unlink()


def change_rows(column: str, change: Callable[[list[object]], list[object]]) -> Change:
    def apply(folder: Path) -> None:
        table = pq.read_table(folder / "requests.parquet")
        index = table.column_names.index(column)
        values = pa.array(change(table[column].to_pylist()), table.schema.field(column).type)
        pq.write_table(table.set_column(index, column, values), folder / "requests.parquet")

    return apply


def drop_row(folder: Path) -> None:
    table = pq.read_table(folder / "requests.parquet")
    pq.write_table(
        pa.concat_tables([table.slice(0, 50), table.slice(51)]), folder / "requests.parquet"
    )


def faster_candidate(values: list[object]) -> list[object]:
    return [0.9 * float(str(value)) if i == 40 else value for i, value in enumerate(values)]


def halved(values: list[object]) -> list[object]:
    return [2 if i % 3 == 0 else value for i, value in enumerate(values)]


def change_verdict(change: Callable[[dict[str, Any]], object]) -> Change:
    def apply(folder: Path) -> None:
        path = folder / "verdict.json"
        verdict = json.loads(path.read_text())
        change(verdict)
        path.write_text(json.dumps(verdict))

    return apply


def repeat_times(folder: Path) -> None:
    """Give each arm in restart 5 the times that it had in restart 2, under its own ids."""
    table = pq.read_table(folder / "requests.parquet")
    rows = table.to_pylist()
    for arm in {row["arm"] for row in rows}:
        best, worst = (
            [row for row in rows if row["arm"] == arm and row["restart"] == restart]
            for restart in (2, 5)
        )
        for source, target in zip(best, worst, strict=True):
            target["inference_us"], target["total_us"] = source["inference_us"], source["total_us"]
            target["done_ns"] = target["sent_ns"] + source["done_ns"] - source["sent_ns"]
    pq.write_table(pa.Table.from_pylist(rows, table.schema), folder / "requests.parquet")


# What was changed, how, and what the judge's line says. The manifest is written again each time.
TAMPERED: list[tuple[str, Change, str]] = [
    ("one time is shorter", change_rows("inference_us", faster_candidate), "does not follow from"),
    ("a row is missing", drop_row, "requests|schedule|rows"),
    ("tokens are halved", change_rows("tokens", halved), "every arm must read all of a text"),
    (
        "batches are invented",
        change_rows("batch_size", lambda values: [7 for _ in values]),
        "a batch of several texts at level unloaded",
    ),
    ("answers are empty", change_rows("bytes", lambda values: [0 for _ in values]), "no bytes"),
    ("a margin is wider", replace_in("plan.toml", "p50 = 0.02", "p50 = 0.04"), "another plan"),
    (
        "the plan is of another seed",
        replace_in("plan.toml", "seed = 7", "seed = 8"),
        "not the plan's order",
    ),
    (
        "a number has 5,000 digits",
        replace_in("plan.toml", "seed = 7", f"seed = {'9' * 5000}"),
        "TOML",
    ),
    ("the plan is nested deeply", overwrite("plan.toml", f"name = {DEEP}"), "nested too deeply"),
    ("identity.json is nested deeply", overwrite("identity.json", DEEP), "nested too deeply"),
    ("identity.json is a list", overwrite("identity.json", "[]"), "list, not an object"),
    (
        "environment.json is a list",
        overwrite("environment.json", "[]"),
        "list, not an object",
    ),
    ("run.json is a number", overwrite("run.json", "1"), "int, not an object"),
    (
        "run.json names another run",
        replace_in("run.json", '"run": "run"', '"run": "other"'),
        "its rows are of run run-.*, run.json says other-",
    ),
    (
        "a cell is too large",
        overwrite("restarts.csv", f"level\n{'x' * 200_000}\n"),
        "cannot be read",
    ),
    (
        "a start is too large",
        overwrite("starts.csv", f"restart\n{'x' * 200_000}\n"),
        "cannot be read",
    ),
    (
        "a restart is dropped",
        replace_in("restarts.csv", "\nunloaded", "\nelsewhere"),
        "follow from",
    ),
    (
        "the page says the opposite",
        replace_in("report.html", "Equivalent", "Not equivalent"),
        "report.html is not the page that follows from the evidence",
    ),
    (
        "the page has a script",
        replace_in("report.html", "</body>", "<script>alert()</script></body>"),
        "report.html is not the page that follows",
    ),
    ("the page is no text", lambda folder: (folder / "report.html").write_bytes(b"\xff"), "utf-8"),
    (
        "the sentence says more",
        replace_in("verdict.json", "p50 and mean of end to end", "everything"),
        "does not follow from the evidence: verdict.sentence",
    ),
    (
        "the scope is narrower",
        replace_in("verdict.json", '"widest_margin": 0.1', '"widest_margin": 0.02'),
        "verdict.scope.widest_margin",
    ),
    (
        "an autocorrelation is hidden",
        change_verdict(lambda v: v["levels"]["unloaded"]["statistics"][0].pop("autocorrelation")),
        "verdict.levels.unloaded.statistics",
    ),
    (
        "the verdict says that it is of an earlier schema",
        change_verdict(lambda v: v.update(schema_version=2)),
        "does not follow from the evidence: verdict: scope",
    ),
    (
        "the engine is another",
        overwrite("environment.json", '{"packages": {}, "server": {"version": "9"}}'),
        "verdict.scope.service_version",
    ),
    (
        "a restart repeats another's times",
        repeat_times,
        "restart 5: bert took exactly the times of restart 2",
    ),
    (
        "run.json counts runs of another claim",
        replace_in(
            "run.json",
            '"number_for_this_plan": 1',
            f'"number_for_this_plan": 1, "claim_digest": "{"0" * 64}", "number_for_this_claim": 1',
        ),
        "run.json counts runs of another claim",
    ),
    ("texts are gone", remove("texts.txt"), "does not list texts.txt"),
    ("rows are gone", remove("requests.parquet"), "does not list requests.parquet"),
    ("starts are gone", remove("starts.csv"), "does not list starts.csv"),
    ("a file is added", lambda folder: (folder / "more").mkdir(), "not listed"),
]


def answered_as(column: str, value: object) -> Change:
    """Give the first row another answer."""
    return change_rows(column, lambda values: [value, *values[1:]])


# The same of what rows and answers.json say of the answers.
TAMPERED_ANSWERS: list[tuple[str, Change, str]] = [
    (
        "a label is garbage",
        answered_as("label", "garbage"),
        "says equivalent, the evidence .* invalid",
    ),
    ("a label is empty", answered_as("label", ""), "evidence says invalid"),
    ("a score is another", answered_as("score", 0.77), "evidence says invalid"),
    ("a score is not a number", answered_as("score", float("nan")), "evidence says invalid"),
    ("a score is missing", answered_as("score_count", 1), "evidence says invalid"),
    ("an answer is unreadable", answered_as("score_count", 0), "evidence says invalid"),
    ("other scores changed", answered_as("score_checksum", 9.0), "evidence says invalid"),
    ("one answer is not recorded", answered_as("score_count", -1), "some do not"),
    (
        "no answer is recorded",
        change_rows("score_count", lambda values: [-1 for _ in values]),
        "it lacks the answers in its rows",
    ),
    ("answers.json is gone", remove("answers.json"), "it lacks answers.json"),
    ("answers.json is no JSON", overwrite("answers.json", "["), "answers.json cannot be read"),
    ("answers.json is nested deeply", overwrite("answers.json", DEEP), "answers.json cannot be"),
    (
        "answers.json has another answer",
        replace_in("answers.json", '"score":0.8', '"score":0.7'),
        "evidence says invalid",
    ),
    (
        "answers.json has another label",
        replace_in("answers.json", '"label":"POSITIVE"', '"label":"SPAM"'),
        "evidence says invalid",
    ),
    (
        "answers.json allows everything",
        replace_in("answers.json", '"tolerance":0.01', '"tolerance":2'),
        "answers.json cannot be read: models.0.tolerance",
    ),
    (
        "answers.json is of other texts",
        replace_in("answers.json", '"texts_sha256":"', '"texts_sha256":"0'),
        "the answers to other texts",
    ),
    (
        "answers.json is of other arms",
        replace_in("answers.json", '"bert-again"', '"bert-2"'),
        "the answers of other arms",
    ),
    (
        "answers.json is of another artifact",
        overwrite("environment.json", '{"server": {"models": {"bert": {"digest": "other"}}}}'),
        "the digest a, arm bert had loaded other",
    ),
]


@pytest.mark.parametrize(
    ("change", "words"),
    [case[1:] for case in TAMPERED_ANSWERS],
    ids=[case[0] for case in TAMPERED_ANSWERS],
)
def test_changed_answers_are_rejected_in_one_line(
    tmp_path: Path, change: Change, words: str
) -> None:
    folder = write_evidence(tmp_path / "run", answers=True)
    assert main(["judge", str(folder)]) == 0
    change(folder)
    write_manifest(folder)
    with pytest.raises(CommandError) as rejected:
        main(["judge", str(folder)])
    assert rejected.value.exit_code == INVALID
    assert re.search(words, str(rejected.value)), str(rejected.value)
    assert "\n" not in str(rejected.value)


@pytest.mark.parametrize(
    ("change", "words"), [case[1:] for case in TAMPERED], ids=[case[0] for case in TAMPERED]
)
def test_changed_evidence_is_rejected_in_one_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: Change,
    words: str,
) -> None:
    folder = write_evidence(tmp_path / "run")
    change(folder)
    write_manifest(folder)
    with pytest.raises(CommandError) as rejected:
        main(["judge", str(folder)])
    assert rejected.value.exit_code == INVALID
    assert re.search(words, str(rejected.value)), str(rejected.value)
    assert "\n" not in str(rejected.value)
    assert capsys.readouterr().out == ""


def test_a_byte_that_was_flipped_is_named_with_its_file(tmp_path: Path) -> None:
    folder = write_evidence(tmp_path / "run")
    path = folder / "environment.json"
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(CommandError, match=r"environment.json has changed since the run"):
        main(["judge", str(folder)])


def test_an_author_who_rewrites_everything_is_believed_but_for_the_published_digest(
    tmp_path: Path,
) -> None:
    folder = write_evidence(tmp_path / "run", factors={"drbert": 1.1, "drbert-again": 1.1})
    assert main(["judge", str(folder)]) == 1
    published = read_manifest_digest(folder)
    table = pq.read_table(folder / "requests.parquet")
    arms, times = table["arm"].to_pylist(), table["inference_us"].to_pylist()
    saved = pa.array(
        [time / 11 if arm in CANDIDATES else 0.0 for arm, time in zip(arms, times, strict=True)]
    )
    for column in ("inference_us", "total_us"):
        index = table.column_names.index(column)
        table = table.set_column(index, column, pc.subtract(table[column], saved))
    saved_ns = pc.multiply(saved, 1000).cast(pa.int64(), safe=False)
    index = table.column_names.index("done_ns")
    table = table.set_column(index, "done_ns", pc.subtract(table["done_ns"], saved_ns))
    pq.write_table(table, folder / "requests.parquet")
    finish_run(folder)
    assert main(["judge", str(folder)]) == 0
    assert read_manifest_digest(folder) != published


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('name = "small"', 'name = "../x"', "cannot name a folder"),
        ('name = "small"', 'name = ""', "cannot name a folder"),
        ('name = "small"', 'name = ".hidden"', "cannot name a folder"),
        ('name = "small"', 'name = "a\\u0000b"', "cannot name a folder"),
        ('name = "small"', f'name = "{"x" * 200}"', "1 to 80 characters"),
        ("tuples = 64", "tuples = 1000000000000", "above 2,000,000; give it fewer tuples"),
        ("restarts = 8", "restarts = 8\nwait_for_calm_s = 1e12", "above 3600"),
        ("seed = 7", f"seed = {'9' * 5000}", "is not TOML"),
    ],
)
def test_a_plan_that_asks_for_the_absurd_is_refused_before_any_work(
    tmp_path: Path, old: str, new: str, words: str
) -> None:
    path = write_plan(tmp_path).path
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(BadInput, match=words):
        read_plan(path)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--minutes", "nan"),
        ("--minutes", "0"),
        ("--floor-us", "nan"),
        ("--floor-us", "-1"),
        ("--power", "1"),
        ("--power", "inf"),
    ],
)
def test_numbers_that_size_no_plan_are_refused(
    tmp_path: Path, option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(CommandError) as refused:
        main(
            ["plan", str(tmp_path), "--template", "t", "--out", "o", f"{option}={value}"],
        )
    assert refused.value.exit_code == 64
    assert option in str(refused.value)


def test_a_name_cannot_steer_a_terminal_or_a_page(tmp_path: Path) -> None:
    verdict = judge_run(write_evidence(tmp_path / "run"))
    name = "\x1b[2J<script>|"
    changed = verdict.model_copy(update={"plan": PlanName(name=name, digest=verdict.plan.digest)})
    markdown = render(changed)
    assert "\N{REPLACEMENT CHARACTER}[2J&lt;script>\\|" in markdown
    assert "\x1b" not in markdown
    assert "<script>" not in markdown
