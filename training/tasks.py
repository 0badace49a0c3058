"""
Labelled data: which file holds a task's sentences, and what its labels are called.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

from command import BadInput, Unavailable


@dataclass(frozen=True)
class Task:
    name: str
    labels: tuple[str, ...]
    text_column: str
    label_column: str
    source: str
    max_tokens: int = 128


@dataclass(frozen=True)
class Example:
    text: str
    label: int


TASKS = {
    "sst2": Task(
        name="sst2",
        labels=("NEGATIVE", "POSITIVE"),
        text_column="sentence",
        label_column="label",
        source="SST-2 (Socher et al. 2013, in GLUE's split): sentences of film reviews",
    )
}


def task_named(name: str) -> Task:
    if name not in TASKS:
        raise BadInput(f"Unknown task {name!r}; known are {', '.join(TASKS)}.")
    return TASKS[name]


def read_examples(task: Task, data: Path, split: str) -> list[Example]:
    """The examples of `data`/<task>/<split>.tsv, in the file's order."""
    path = data / task.name / f"{split}.tsv"
    if not path.is_file():
        raise Unavailable(f"{path} does not exist; --data names the folder that holds {task.name}/{split}.tsv.")
    examples = []
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        missing = {task.text_column, task.label_column} - set(rows.fieldnames or ())
        if missing:
            raise BadInput(f"{path} has no column {sorted(missing)[0]!r}; its header is {rows.fieldnames}.")
        for row in rows:
            label = row[task.label_column]
            if not label.isdigit() or int(label) >= len(task.labels):
                raise BadInput(f"{path} line {rows.line_num}: label {label!r} is none of 0…{len(task.labels) - 1}.")
            examples.append(Example(row[task.text_column].strip(), int(label)))
    return examples
