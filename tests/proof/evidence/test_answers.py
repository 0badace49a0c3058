"""Answers in rows: what counts as a model's own answer, and what makes a run invalid."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from proof.commands import main
from proof.evidence.store import write_manifest
from proof.plans.answers import Answer, read_answer, score_checksum, summarize
from proof.verdict.judge import judge_run
from proof.verdict.schema import Gate
from tests.proof.factories import SCORES, answer_columns, write_evidence

INVALID = 3
OWN = "answers are the artifact's own"


def gate(folder: Path, name: str) -> Gate:
    [level] = judge_run(folder).levels.values()
    return next(gate for gate in level.gates if gate.name == name)


def for_arms(start: str, columns: Callable[[int], dict[str, Any]]) -> Callable[..., None]:
    """Return a change that gives other answers to the arms whose name begins with `start`."""

    def change(row: dict[str, Any]) -> None:
        if row["arm"].startswith(start):
            row |= columns(row["text_id"])

    return change


def scored(*scores: tuple[str, float]) -> dict[str, Any]:
    answer = summarize(list(scores))
    return {key: value for key, value in vars(answer).items() if key != "tokens"}


def test_a_run_whose_answers_are_the_artifacts_own_is_valid(tmp_path: Path) -> None:
    folder = write_evidence(tmp_path / "run", answers=True)
    assert main(["judge", str(folder)]) == 0
    found = gate(folder, OWN)
    assert found.passed
    assert found.measured.startswith("0 of ")
    assert "(scores within 0.01)" in found.measured
    assert "give 100.0% of the texts the same label" in found.measured


def test_a_candidate_that_answers_garbage_quickly_is_invalid(tmp_path: Path) -> None:
    garbage = for_arms("drbert", lambda _: scored(("NEGATIVE", 1.0), ("POSITIVE", 0.0)))
    folder = write_evidence(tmp_path / "run", answers=True, change=garbage)
    assert main(["judge", str(folder)]) == INVALID
    measured = gate(folder, OWN).measured
    assert "answers differ, the first of request unloaded.0.-1." in measured


@pytest.mark.parametrize(
    ("columns", "is_own"),
    [
        ([scored(("NEGATIVE", 0.195), ("POSITIVE", 0.805)), answer_columns(1)], True),
        # The best two scores of the second text are closer than rounding is.
        ([answer_columns(0), scored(("NEGATIVE", 0.498), ("POSITIVE", 0.502))], True),
        ([answer_columns(0), scored(("NEGATIVE", 0.498), ("OTHER", 0.502))], False),
        ([scored(("NEGATIVE", 0.17), ("POSITIVE", 0.83)), answer_columns(1)], False),
        ([scored(("NEGATIVE", 0.8), ("POSITIVE", 0.2)), answer_columns(1)], False),
        ([scored(("POSITIVE", 0.8)), answer_columns(1)], False),
        ([vars(Answer()) | {"tokens": 5}, answer_columns(1)], False),
    ],
)
def test_rounding_is_told_from_another_answer(
    tmp_path: Path, columns: list[dict[str, Any]], is_own: bool
) -> None:
    folder = write_evidence(
        tmp_path / "run", answers=True, change=for_arms("drbert", lambda text: columns[text])
    )
    assert gate(folder, OWN).passed == is_own


def test_the_delayed_arm_answers_as_the_copy_that_is_delayed(tmp_path: Path) -> None:
    folder = write_evidence(tmp_path / "run", answers=True, schedule_version=2)
    assert gate(folder, OWN).passed
    other = scored(("NEGATIVE", 0.7), ("POSITIVE", 0.3))
    content = (folder / "answers.json").read_text()
    b = content.index('{"artifact":"b"')
    (folder / "answers.json").write_text(
        content[:b] + content[b:].replace('"score":0.8', f'"score":{other["score"]}', 1)
    )
    write_manifest(folder)
    # Both candidates, the delayed arm when it is one of them, and nothing else.
    counts = gate(folder, OWN).measured.split(" answers differ")[0].split(" of ")
    rows = pq.read_table(folder / "requests.parquet").to_pylist()
    delayed = [row for row in rows if row["arm"] == "bert-delayed" and row["text_id"] == 0]
    candidates = [
        row for row in rows if row["arm"] in ("drbert", "drbert-again") and row["text_id"] == 0
    ]
    differing = int(counts[0].replace(",", ""))
    assert len(candidates) < differing < len(candidates) + len(delayed)


def test_runs_that_recorded_no_answers_have_no_such_gate(tmp_path: Path) -> None:
    folder = write_evidence(tmp_path / "run")
    [level] = judge_run(folder).levels.values()
    assert OWN not in [gate.name for gate in level.gates]


@pytest.mark.parametrize(
    "body",
    [
        b'{"data": [{"label": "B", "score": 0.9, "scores": [{"label": "B", "score": 0.9},'
        b' {"label": "A", "score": 0.1}]}]}',
        b'{"data": [[{"label": "A", "score": 0.1}, {"label": "B", "score": 0.9}]]}',
        b'[{"label": "B", "score": 0.9}, {"label": "A", "score": 0.1}]',
        b'[[{"label": "B", "score": 0.9}, {"label": "A", "score": 0.1}]]',
        b'{"predictions": [{"A": 0.1, "B": 0.9}]}',
    ],
)
def test_an_answer_reads_alike_in_every_dialect(body: bytes) -> None:
    scores = [("A", 0.1), ("B", 0.9)]
    checksum = float(f"{score_checksum(scores):.5g}")
    assert read_answer(body) == Answer(0, "B", 0.9, 2, checksum)


def test_answers_of_class_numbers_are_read_too() -> None:
    by_number = read_answer(b'{"data": [{"label": "B", "probs": [0.1, 0.9], "num_classes": 2}]}')
    assert (by_number.label, by_number.score, by_number.score_count) == ("B", 0.9, 2)
    assert read_answer(b'{"predictions": [1]}').label == "1"
    assert read_answer(b'{"predictions": [[0.2, 0.8]]}').label == "1"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>",
        b"{}",
        b"[]",
        b'{"data": []}',
        b'{"data": [{"label": "A"}]}',
        b'{"data": [{"label": "A", "scores": [{"label": "B", "score": 0.9},'
        b' {"label": "A", "score": 0.1}]}]}',
        b'[{"label": "A", "score": NaN}]',
        b'[{"label": "A", "score": "high"}]',
        b"[" * 100_000,
        b"7",
    ],
)
def test_what_is_no_classification_has_no_label(body: bytes) -> None:
    assert read_answer(body) == Answer()


def test_a_checksum_moves_with_every_score_and_not_with_their_order() -> None:
    scores = SCORES[0]
    assert score_checksum(scores) == pytest.approx(score_checksum(scores[::-1]))
    for i, (label, score) in enumerate(scores):
        moved = [*scores[:i], (label, score + 0.1), *scores[i + 1 :]]
        assert 0.001 < score_checksum(moved) - score_checksum(scores) < 0.1


def test_a_label_of_many_lines_takes_one_line_of_a_row() -> None:
    assert summarize([("a\nb\r\n" + "c" * 200, 1.0)]).label == "a b " + "c" * 96
