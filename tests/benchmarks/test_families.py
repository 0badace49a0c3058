from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from benchmarks import families
from benchmarks.commands import main
from benchmarks.families import FAMILIES, HEAD, SAME
from command import BadInput, BadUsage

pytestmark = pytest.mark.filterwarnings(
    "ignore"
)  # torch's tracer warns of what verification checks

TABLE = Path("benchmarks/families.md")


def test_families_are_compared_with_bert_and_the_table_says_what_came_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = ["BERT, other weights", "BERT, 3 labels", "BERT, other tokenizer", "DeBERTa", "Funnel"]
    assert main(["families", *chosen, "--out", str(tmp_path / "table.md")]) == 0
    assert capsys.readouterr().out.endswith("all 5 as expected\n")
    rows = [
        line.strip("| ").split(" | ")
        for line in (tmp_path / "table.md").read_text().splitlines()
        if line.startswith("| ")
    ][2:]
    assert [(name, result) for name, _, result, *_ in rows] == [
        ("BERT, other weights", "the same work"),
        ("BERT, 3 labels", "encoder equal, head differs"),
        ("BERT, other tokenizer", "encoder and head equal, tokenizer not"),
        ("DeBERTa", "they do not do the same work"),
        ("Funnel", "refused"),
    ]
    assert str(tmp_path.parent) not in "".join(line for row in rows for line in row)


def test_a_family_that_comes_out_otherwise_than_expected_ends_with_65_and_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wrong = dataclasses.replace(
        next(f for f in FAMILIES if f.name == "BERT, 3 layers"), expected=SAME
    )
    monkeypatch.setattr(families, "FAMILIES", (wrong,))
    with pytest.raises(
        BadInput,
        match=(
            "1 of 1 had an unexpected outcome: BERT, 3 layers: they do not do the same work,"
            " not the same work"
        ),
    ):
        main(["families"])


def test_the_committed_table_holds_every_family_and_each_came_out_as_expected() -> None:
    rows = [line for line in TABLE.read_text().splitlines() if line.startswith("| ")][2:]
    assert len(rows) == len(FAMILIES)
    for family, row in zip(FAMILIES, rows, strict=True):
        assert row.startswith(
            f"| {family.name} | {family.expected}: {family.reason} | {family.expected} | "
        )
    assert f"{len(FAMILIES)} of {len(FAMILIES)} came out as expected" in TABLE.read_text()


def test_only_a_head_makes_electra_different() -> None:
    assert next(family for family in FAMILIES if family.name == "ELECTRA").expected == HEAD


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["famlies"], "Unknown benchmark 'famlies'; known are .*families"),
        (["families", "BART"], "Unknown family 'BART'; known are BERT, other weights;"),
        (["families", "--variants", "cpu-int3"], "Unknown variant 'cpu-int3'; known are cpu-fp32"),
    ],
)
def test_a_name_that_is_not_known_lists_those_that_are(arguments: list[str], message: str) -> None:
    with pytest.raises(BadUsage, match=message):
        main(arguments)
