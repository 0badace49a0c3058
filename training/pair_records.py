"""
The rows of a paired experiment: one for each run, with what it began with and what was measured.
"""

from __future__ import annotations

import csv
import fcntl
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from command import BadInput, Unavailable
from training import probes

READ_OUT = "read-out loss"
"""Name of a measurement: nats a masked token (readout.py)."""
ACCURACY = "probe accuracy"
"""Name of a measurement: the mean of all accuracies of logistic regression (probes.py)."""
MEASURED = (READ_OUT, ACCURACY, *probes.names())
"""Names of all measurements, in the order of the columns."""


@dataclass(frozen=True)
class Beginning:
    """What a run begins with."""

    machine: str
    """The processor or GPU, precision, threads and version of torch: equal within a pair."""
    corpus: str
    """Name of the corpus' folder, a digest of its text and tokenizer: equal for all runs."""
    tasks: str
    """Digest of the probes' files: equal for all runs."""
    batch: str
    """Digest of the first step's batch: equal within a pair."""
    weights: str
    """Digest of the encoder's first weights: equal within a pair for encoders of one kind."""
    kind: str
    """The encoder's family and initialisation."""
    config: str
    """Digest of the arm's config without its seed: equal for all runs of an arm."""


@dataclass(frozen=True)
class Cost:
    """What a run took."""

    steps: int
    tokens: int
    flops: int
    """Of all steps' matrix products."""
    minutes: float
    """Wall-clock time of its pretraining."""
    measuring_minutes: float
    held_out_loss: float
    """The design's own, in nats."""


@dataclass(frozen=True)
class Record:
    """A run that is done."""

    arm: str
    pair: int
    beginning: Beginning
    cost: Cost
    measured: Mapping[str, float]
    """What its encoder was measured to hold, by name."""

    def row(self) -> dict[str, Any]:
        """Return the row of the run."""
        return {
            "arm": self.arm,
            "pair": self.pair,
            **asdict(self.beginning),
            **asdict(self.cost),
            **{name: round(self.measured[name], 6) for name in MEASURED},
        }

    @classmethod
    def from_row(cls, row: Mapping[str, str]) -> Record:
        """Return the run of a row; raises ValueError if a cell is not a number."""
        beginning = Beginning(**{name: row[name] for name in _names(Beginning)})
        cost = Cost(
            *(int(row[name]) for name in ("steps", "tokens", "flops")),
            *(float(row[name]) for name in ("minutes", "measuring_minutes", "held_out_loss")),
        )
        measured = {name: float(row[name]) for name in MEASURED}
        return cls(row["arm"], int(row["pair"]), beginning, cost, measured)


def _names(described: type) -> tuple[str, ...]:
    return tuple(field.name for field in fields(described))


COLUMNS = ("arm", "pair", *_names(Beginning), *_names(Cost), *MEASURED)


def read_records(path: Path, must_exist: bool = False) -> list[Record]:
    """Return the runs that are done, in the order in which they ended.

    Raises Unavailable if the file is missing and must exist. Raises BadInput if it has other
    columns, a broken row, or two rows of one run.
    """
    if not path.is_file():
        if must_exist:
            raise Unavailable(f"{path} does not exist; name the file of --records or --out.")
        return []
    with path.open(newline="", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        text = file.read()
    if not text:  # Its first writer has not written yet.
        return []
    reader = csv.DictReader(io.StringIO(text))
    columns = tuple(reader.fieldnames or ())
    if columns != COLUMNS:
        other = sorted(set(columns) ^ set(COLUMNS)) or ["their order"]
        raise BadInput(
            f"{path} has other columns than this version writes ({', '.join(other)}); give another"
            " --records."
        )
    records: dict[tuple[str, int], Record] = {}
    for row in reader:
        place = f"{path}, line {reader.line_num}"
        if None in row or None in row.values():
            raise BadInput(f"{place}: {len(COLUMNS)} cells are needed; remove the line.")
        try:
            record = Record.from_row(row)
        except ValueError as error:
            raise BadInput(f"{place}: {error}; remove the line.") from None
        if (record.arm, record.pair) in records:
            raise BadInput(
                f"{place} is a second row of {record.arm!r} in pair {record.pair}; remove one."
            )
        records[record.arm, record.pair] = record
    return list(records.values())


def append_record(path: Path, record: Record) -> None:
    """Add a row and hand it to the disk; processes that add one at once wait for each other.

    Half a row, which a full disk may have left at the end, is removed first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        before = file.read()
        complete = before.rfind(b"\n") + 1
        file.truncate(complete)
        added = io.StringIO()
        writer = csv.DictWriter(added, COLUMNS, lineterminator="\n")
        if not complete:
            writer.writeheader()
        writer.writerow(record.row())
        file.write(added.getvalue().encode())
        file.flush()
        os.fsync(file.fileno())


def check_records(records: Sequence[Record]) -> None:
    """Raise BadInput if runs that are compared did not begin alike."""
    first: dict[int | str, Record] = {}
    for record in records:
        for group in (record.pair, record.arm, "all"):
            other = first.setdefault(group, record)
            if isinstance(group, int):
                check_pair(record, other)
            elif group == "all":
                check_all(record, other)
            elif other.beginning.config != record.beginning.config:
                raise BadInput(
                    f"{_named(record)} has another config than {_named(other)}; runs of one arm"
                    " must have one."
                )


def check_pair(record: Record, other: Record) -> None:
    """Raise BadInput if two runs of a pair differ in what they began with."""
    same = ["machine", "batch"]
    if record.beginning.kind == other.beginning.kind:
        same.append("weights")
    _check(record, other, same)


def check_all(record: Record, other: Record) -> None:
    """Raise BadInput if two runs of an experiment differ in their text or tasks."""
    _check(record, other, ["corpus", "tasks"])


def _check(record: Record, other: Record, names: Sequence[str]) -> None:
    for name in names:
        values = [getattr(each.beginning, name) for each in (record, other)]
        if values[0] != values[1]:
            raise BadInput(
                f"{_named(record)} began with {_WORDS[name]} {values[0][:60]}, and {_named(other)}"
                f" with {values[1][:60]}; {_REMEDIES[name]}"
            )


_WORDS = {
    "machine": "the machine",
    "batch": "the first batch",
    "weights": "the first weights",
    "corpus": "the text",
    "tasks": "the probes' files",
}
_REMEDIES = {
    "machine": "a pair must be on one.",
    "batch": "their configs must have the same data, objective and batch_size.",
    "weights": "their encoders must have the same config.",
    "corpus": "give the same --data, or another --out and --records.",
    "tasks": "give the same --data, or another --out and --records.",
}


def _named(record: Record) -> str:
    return f"{record.arm!r} of pair {record.pair}"
