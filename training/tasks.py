"""
Labelled tasks: the files that hold their examples, the names of their labels, and their metrics.

A task reads the folder of its name below the data folder, in the format that its owners publish.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, TextIO

from command import BadInput, Unavailable

Row = tuple[str, str | None, str]
"""Text, second text of a pair, and the label as the file has it."""


@dataclass(frozen=True)
class Example:
    """A text or a pair of texts with its label."""

    text: str
    label: float
    """The class number, or the score of a regression."""
    text_pair: str | None = None


@dataclass(frozen=True)
class Task:
    """A labelled task."""

    name: str
    """The task's name, and that of its folder below the data folder."""
    source: str
    """The publication, and what the task is, for reports."""
    read_rows: Callable[[Path, str], Iterator[Row]]
    """Function of the task's folder and a split, "train" or "dev", that yields the rows."""
    labels: tuple[str, ...] = ()
    """Names of the classes; if empty, the labels of the training rows, sorted."""
    file_labels: tuple[str, ...] = ()
    """Labels as the file has them, if these are neither the classes' names nor their numbers."""
    kind: Literal["single_label", "regression"] = "single_label"
    metrics: tuple[str, ...] = ("accuracy",)
    """Names of the task's metrics (metrics.py); comparisons use the first."""
    epochs: int = 3
    """Number of fine-tuning epochs, unless a recipe says otherwise."""
    max_tokens: int = 128
    """Length that texts are truncated to in training."""

    def class_names(self, data: Path) -> tuple[str, ...]:
        """Return the names of the classes, or the one name of a regression's score.

        They are read from the training rows if the task does not name them.
        """
        if self.labels:
            return self.labels
        return tuple(sorted({label for _, _, label in _read_rows(self, data, "train")}))

    def file_label_numbers(self, data: Path) -> dict[str, int]:
        """Return the class number of every label that the files may have."""
        names = self.class_names(data)
        if self.file_labels:
            names = self.file_labels
        elif self.labels:
            names = tuple(str(number) for number in range(len(names)))
        return {name: number for number, name in enumerate(names)}


def read_examples(task: Task, data: Path, split: str) -> list[Example]:
    """Return the examples of a split, "train" or "dev", in the file's order.

    Raises BadInput if a row's label is not one of the task's.
    """
    if task.kind == "regression":
        examples = _read_scored(task, data, split)
    else:
        examples = _read_classified(task, data, split)
    if not examples:
        raise BadInput(f"{data / task.name} holds no {split} rows.")
    return examples


def _read_scored(task: Task, data: Path, split: str) -> list[Example]:
    examples = []
    for number, (text, pair, label) in enumerate(_read_rows(task, data, split), start=1):
        try:
            examples.append(Example(text, float(label), pair))
        except ValueError:
            raise _bad_label(data / task.name, split, number, label, "a number") from None
    return examples


def _read_classified(task: Task, data: Path, split: str) -> list[Example]:
    numbers = task.file_label_numbers(data)
    examples = []
    for number, (text, pair, label) in enumerate(_read_rows(task, data, split), start=1):
        if label not in numbers:
            known = ", ".join(numbers) if len(numbers) < 6 else f"one of {len(numbers)} labels"
            raise _bad_label(data / task.name, split, number, label, known)
        examples.append(Example(text, numbers[label], pair))
    return examples


def _bad_label(folder: Path, split: str, number: int, label: str, expected: str) -> BadInput:
    return BadInput(f"{folder}, {split} row {number}: label {label!r} is not {expected}.")


def _read_rows(task: Task, data: Path, split: str) -> Iterator[Row]:
    try:
        yield from task.read_rows(data / task.name, split)
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, csv.Error) as error:
        raise BadInput(
            f"{data / task.name}, {split}: not in the format that its owners publish"
            f" ({type(error).__name__}: {error})."
        ) from None


def read_table(
    folder: Path,
    split: str,
    *,
    text: str | int,
    label: str | int,
    pair: str | int | None = None,
    train: str = "train.tsv",
    dev: str = "dev.tsv",
    quoted: bool = False,
) -> Iterator[Row]:
    """Yield the rows of a tsv or csv file.

    Columns are named if the file has a header, and numbered if it has none.
    """
    path = folder / {"train": train, "dev": dev}[split]
    columns = [text, label] if pair is None else [text, label, pair]
    with _open(path) as file:
        rows = csv.reader(
            file,
            delimiter="," if path.suffix == ".csv" else "\t",
            quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE,
        )
        header = next(rows, []) if isinstance(text, str) else []
        missing = [column for column in columns if isinstance(column, str) and column not in header]
        if missing:
            raise BadInput(f"{path} has no column {missing[0]!r}; its header is {header}.")
        indices = [
            header.index(column) if isinstance(column, str) else column for column in columns
        ]
        for row in rows:
            if len(row) <= max(indices):
                raise BadInput(
                    f"{path} line {rows.line_num} has {len(row)} columns; {max(indices) + 1} are"
                    " needed."
                )
            cells = [row[index].strip() for index in indices]
            yield cells[0], cells[2] if pair is not None else None, cells[1]


def read_clinc150(folder: Path, split: str) -> Iterator[Row]:
    """Yield the in-scope rows of data_full.json; its split "val" is our "dev"."""
    with _open(folder / "data_full.json") as file:
        for text, intent in json.load(file)[{"train": "train", "dev": "val"}[split]]:
            yield text.strip(), None, intent


def _open(path: Path) -> TextIO:
    if not path.is_file():
        raise Unavailable(
            f"{path} does not exist; --data names the folder that holds"
            f" {path.parent.name}/{path.name}."
        )
    return path.open(encoding="utf-8", newline="")


TASKS = {
    task.name: task
    for task in (
        Task(
            "sst2",
            "SST-2 (Socher et al. 2013, in GLUE's split): sentences of film reviews",
            partial(read_table, text="sentence", label="label"),
            ("NEGATIVE", "POSITIVE"),
        ),
        Task(
            "cola",
            "CoLA (Warstadt et al. 2019): is a sentence acceptable English",
            partial(read_table, text=3, label=1),
            ("UNACCEPTABLE", "ACCEPTABLE"),
            metrics=("matthews", "accuracy"),
            epochs=5,
        ),
        Task(
            "mrpc",
            "MRPC (Dolan and Brockett 2005): do two sentences say the same",
            partial(read_table, text="#1 String", pair="#2 String", label="Quality"),
            ("DIFFERENT", "PARAPHRASE"),
            metrics=("f1", "accuracy"),
            epochs=5,
        ),
        Task(
            "rte",
            "RTE (PASCAL RTE 1-3 and TAC RTE-5, in GLUE's split): does one text entail another",
            partial(read_table, text="sentence1", pair="sentence2", label="label"),
            ("ENTAILMENT", "NOT_ENTAILMENT"),
            file_labels=("entailment", "not_entailment"),
            epochs=5,
        ),
        Task(
            "stsb",
            "STS-B (Cer et al. 2017): how alike are two sentences, from 0 to 5",
            partial(read_table, text="sentence1", pair="sentence2", label="score"),
            ("similarity",),
            kind="regression",
            metrics=("pearson", "spearman"),
            epochs=5,
        ),
        Task(
            "banking77",
            "banking77 (Casanueva et al. 2020, CC BY 4.0): what a bank's customer wants",
            partial(
                read_table,
                text="text",
                label="category",
                train="train.csv",
                dev="test.csv",
                quoted=True,
            ),
            epochs=10,
        ),
        Task(
            "clinc150",
            "clinc150 (Larson et al. 2019, CC BY 3.0): what an assistant's user wants, in scope",
            read_clinc150,
            epochs=10,
        ),
        Task(
            "ag_news",
            "AG News (Zhang et al. 2015), 10,001 of its training rows: the subject of a news item",
            partial(read_table, text="text", label="label", train="train_10k.tsv", dev="test.tsv"),
            ("WORLD", "SPORTS", "BUSINESS", "TECHNOLOGY"),
        ),
    )
}


def find_task(name: str) -> Task:
    """Return the task of that name; BadInput if there is none."""
    if name not in TASKS:
        raise BadInput(f"Unknown task {name!r}; known are {', '.join(TASKS)}.")
    return TASKS[name]
