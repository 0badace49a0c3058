"""Tasks are read in the format that their owners publish, and errors name the row."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from command import BadInput, Unavailable
from tests.requirements import SHARED, shared_data
from training.tasks import Example, find_task, read_examples


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_pairs_and_label_names_are_read(tmp_path: Path) -> None:
    write(
        tmp_path / "rte/dev.tsv",
        'index\tsentence1\tsentence2\tlabel\n0\tA "cat" sleeps.\tIt'
        " sleeps.\tentailment\n1\ta\tb\tnot_entailment\n",
    )
    assert read_examples(find_task("rte"), tmp_path, "dev") == [
        Example('A "cat" sleeps.', 0, "It sleeps."),
        Example("a", 1, "b"),
    ]


def test_files_without_a_header_are_read_by_column(tmp_path: Path) -> None:
    write(
        tmp_path / "cola/dev.tsv",
        "gj04\t1\t\tThe sailors rode the breeze.\ngj04\t0\t*\tThe more does Bill smoke.\n",
    )
    assert [e.label for e in read_examples(find_task("cola"), tmp_path, "dev")] == [1, 0]


def test_scores_are_numbers(tmp_path: Path) -> None:
    write(tmp_path / "stsb/dev.tsv", "sentence1\tsentence2\tscore\na\tb\t3.8\n")
    assert read_examples(find_task("stsb"), tmp_path, "dev") == [Example("a", 3.8, "b")]


def test_classes_that_the_data_name_are_numbered_in_the_alphabets_order(tmp_path: Path) -> None:
    write(
        tmp_path / "clinc150/data_full.json",
        json.dumps(
            {"train": [["play it", "music"], ["wake me", "alarm"]], "val": [["louder", "music"]]}
        ),
    )
    task = find_task("clinc150")
    assert task.class_names(tmp_path) == ("alarm", "music")
    assert read_examples(task, tmp_path, "dev") == [Example("louder", 1)]
    write(tmp_path / "banking77/train.csv", 'text,category\r\n"Is it, ""really"", here?",card\r\n')
    assert read_examples(find_task("banking77"), tmp_path, "train") == [
        Example('Is it, "really", here?', 0)
    ]


@pytest.mark.parametrize(
    ("task", "text", "words"),
    [
        ("sst2", "sentence\tlabel\nfine\t1\nodd\t7\n", r"dev row 2: label '7' is not 0, 1"),
        (
            "stsb",
            "sentence1\tsentence2\tscore\na\tb\thigh\n",
            r"dev row 1: label 'high' is not a number",
        ),
        ("sst2", "sentence\nfine\n", "has no column 'label'"),
        ("sst2", "sentence\tlabel\nfine\n", "line 2 has 1 columns; 2 are needed"),
        ("sst2", "sentence\tlabel\n", "holds no dev rows"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_by_row(
    tmp_path: Path, task: str, text: str, words: str
) -> None:
    write(tmp_path / task / "dev.tsv", text)
    with pytest.raises(BadInput, match=words):
        read_examples(find_task(task), tmp_path, "dev")


def test_a_missing_file_and_an_unknown_task_are_named(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match=r"sst2/train\.tsv does not exist"):
        read_examples(find_task("sst2"), tmp_path, "train")
    with pytest.raises(BadInput, match="known are sst2, cola"):
        find_task("sst3")


@shared_data
@pytest.mark.parametrize(
    ("name", "sizes", "classes"),
    [
        ("sst2", [67349, 872], 2),
        ("cola", [8551, 1043], 2),
        ("mrpc", [3668, 408], 2),
        ("rte", [2490, 277], 2),
        ("stsb", [5749, 1500], 1),
        ("banking77", [10003, 3080], 77),
        ("clinc150", [15000, 3000], 150),
        ("ag_news", [10001, 7600], 4),
    ],
)
def test_the_real_files_are_read_whole(name: str, sizes: list[int], classes: int) -> None:
    task = find_task(name)
    assert [len(read_examples(task, SHARED, split)) for split in ("train", "dev")] == sizes
    assert len(task.class_names(SHARED)) == classes
