"""
Labelled data: which file holds a task's texts, what its labels are called, and by which measure it
is judged.

Every task reads a folder of its own name below the data folder, in the form its owners publish.
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
"""Text, second text of a pair, the label as it stands in the file."""


@dataclass(frozen=True)
class Example:
    text: str
    label: float
    """A class's number, or a score."""
    text_pair: str | None = None


@dataclass(frozen=True)
class Task:
    name: str
    source: str
    rows: Callable[[Path, str], Iterator[Row]]
    """The rows of a split, "train" or "dev", below the task's folder."""
    labels: tuple[str, ...] = ()
    """The classes' names; without any they are what the training rows call them, sorted."""
    written: tuple[str, ...] = ()
    """What the file calls them, where it is neither their names nor their numbers."""
    kind: Literal["single_label", "regression"] = "single_label"
    metrics: tuple[str, ...] = ("accuracy",)
    """Measures of metrics.py; the first one judges."""
    epochs: int = 3
    max_tokens: int = 128

    def class_names(self, data: Path) -> tuple[str, ...]:
        """The labels, read from the training rows where the task does not name them; one for a
        regression.
        """
        return self.labels or tuple(
            sorted({written for _, _, written in _readable(self, data, "train")})
        )


def read_examples(task: Task, data: Path, split: str) -> list[Example]:
    """The examples of one split, in the file's order; BadInput names a row whose label is none of
    the task's.
    """
    names = task.class_names(data)
    known = {
        name: i
        for i, name in enumerate(
            task.written or ([str(i) for i in range(len(names))] if task.labels else names)
        )
    }
    examples = []
    for number, (text, pair, written) in enumerate(_readable(task, data, split), start=1):
        try:
            examples.append(
                Example(text, float(written) if task.kind == "regression" else known[written], pair)
            )
        except (KeyError, ValueError):
            wanted = (
                "a number"
                if task.kind == "regression"
                else ", ".join(known)
                if len(known) < 6
                else f"one of {len(known)} labels"
            )
            raise BadInput(
                f"{data / task.name}, {split} row {number}: label {written!r} is not {wanted}."
            ) from None
    if not examples:
        raise BadInput(f"{data / task.name} holds no {split} rows.")
    return examples


def _readable(task: Task, data: Path, split: str) -> Iterator[Row]:
    try:
        yield from task.rows(data / task.name, split)
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, csv.Error) as error:
        raise BadInput(
            f"{data / task.name}, {split}: not in the form its owners publish"
            f" ({type(error).__name__}: {error})."
        ) from None


def table(
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
    """A tsv or csv file; columns by name where it has a header, by number where it has none."""
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
        places = [header.index(column) if isinstance(column, str) else column for column in columns]
        for row in rows:
            if len(row) <= max(places):
                raise BadInput(
                    f"{path} line {rows.line_num} has {len(row)} columns; {max(places) + 1} are"
                    " needed."
                )
            cells = [row[place].strip() for place in places]
            yield cells[0], cells[2] if pair is not None else None, cells[1]


def clinc150(folder: Path, split: str) -> Iterator[Row]:
    """The in-scope intents of data_full.json; its "val" is our "dev"."""
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
            partial(table, text="sentence", label="label"),
            ("NEGATIVE", "POSITIVE"),
        ),
        Task(
            "cola",
            "CoLA (Warstadt et al. 2019): is a sentence acceptable English",
            partial(table, text=3, label=1),
            ("UNACCEPTABLE", "ACCEPTABLE"),
            metrics=("matthews", "accuracy"),
            epochs=5,
        ),
        Task(
            "mrpc",
            "MRPC (Dolan and Brockett 2005): do two sentences say the same",
            partial(table, text="#1 String", pair="#2 String", label="Quality"),
            ("DIFFERENT", "PARAPHRASE"),
            metrics=("f1", "accuracy"),
            epochs=5,
        ),
        Task(
            "rte",
            "RTE (PASCAL RTE 1-3 and TAC RTE-5, in GLUE's split): does one text entail another",
            partial(table, text="sentence1", pair="sentence2", label="label"),
            ("ENTAILMENT", "NOT_ENTAILMENT"),
            written=("entailment", "not_entailment"),
            epochs=5,
        ),
        Task(
            "stsb",
            "STS-B (Cer et al. 2017): how alike are two sentences, from 0 to 5",
            partial(table, text="sentence1", pair="sentence2", label="score"),
            ("similarity",),
            kind="regression",
            metrics=("pearson", "spearman"),
            epochs=5,
        ),
        Task(
            "banking77",
            "banking77 (Casanueva et al. 2020, CC BY 4.0): what a bank's customer wants",
            partial(
                table, text="text", label="category", train="train.csv", dev="test.csv", quoted=True
            ),
            epochs=10,
        ),
        Task(
            "clinc150",
            "clinc150 (Larson et al. 2019, CC BY 3.0): what an assistant's user wants, in scope",
            clinc150,
            epochs=10,
        ),
        Task(
            "ag_news",
            "AG News (Zhang et al. 2015), 10,001 of its training rows: the subject of a news item",
            partial(table, text="text", label="label", train="train_10k.tsv", dev="test.tsv"),
            ("WORLD", "SPORTS", "BUSINESS", "TECHNOLOGY"),
        ),
    )
}


def task_named(name: str) -> Task:
    if name not in TASKS:
        raise BadInput(f"Unknown task {name!r}; known are {', '.join(TASKS)}.")
    return TASKS[name]
