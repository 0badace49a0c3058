"""
Compares pretraining designs by pairs.

The runs of a pair have the same seed: the same first weights, order of the text, and masks. So most
of what chance does to a run does the same to the other, and cancels in their difference. A pair is
always trained on one kind of machine: where one was begun elsewhere, another pair takes its place.

A unit is one run of one arm. It is pretrained, its encoder is measured (readout.py, probes.py), and
its numbers become a row of units.csv. Units that are done are skipped, interrupted ones continue,
and several processes may work on one folder.
"""

from __future__ import annotations

import csv
import fcntl
import itertools
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch
from pydantic import Field

from atomic import write_text_atomic
from command import BadInput
from training import probes
from training.config import (
    Config,
    Count,
    Encoder,
    Number,
    Table,
    read_config,
    validate,
    with_optimisation,
)
from training.corpus import prepare
from training.frozen import FrozenEncoder, load_frozen
from training.locks import lock_unit
from training.pretrain import choose_precision, pretrain, processor_model, set_up
from training.readout import read_out_loss

CONFIGS = Path(__file__).parent / "configs"
READ_OUT = "read-out loss"
"""Name of a measurement: nats a masked token (readout.py)."""
ACCURACY = "probe accuracy"
"""Name of a measurement: the mean of all accuracies of logistic regression (probes.py)."""


@dataclass(frozen=True)
class Arm:
    """A design, and how many pairs have a run of it."""

    name: str
    config: Config
    pairs: int


@dataclass(frozen=True)
class Unit:
    """The run of one arm in one pair."""

    arm: str
    pair: int
    """The pair's number, which is the seed of its runs."""
    config: Config

    @property
    def name(self) -> str:
        """The unit's name, ARM-PAIR."""
        return f"{self.arm}-{self.pair}"

    def folder(self, out: Path) -> Path:
        """Return the unit's folder below `out`."""
        return out / "pretraining" / self.name


@dataclass(frozen=True)
class PairedExperiment:
    """Arms that are compared with a reference, pair by pair."""

    path: Path
    """The TOML file."""
    reference: str
    """The arm that the others are compared with at equal tokens."""
    longer: str
    """An arm like the reference with more steps, for comparisons at equal work; may be empty."""
    claim: str
    """The design whose claim the first sentence judges; may be empty."""
    control: str
    """The positive control: an arm whose effect is known to be large; may be empty."""
    arms: tuple[Arm, ...]
    first_pair: int
    question: str
    """What is asked and what is expected, in Markdown, for the report."""
    notes: str
    """What else the report says, in Markdown."""


class PairedTable(Table):
    """A paired experiment's TOML file."""

    kind: Literal["pairs"]
    reference: str
    longer: str = ""
    claim: str = ""
    control: str = ""
    question: str = ""
    notes: str = ""
    first_pair: Count = 1
    """Number of the first pair; a pilot has others than the experiment."""
    optimisation: dict[str, int] = Field(default={})
    """Changes to the optimisation of every arm's config: steps, checkpoint_every, average."""
    arm: dict[str, object]
    """An ArmTable for each arm."""


class ArmTable(Table):
    """An arm of a paired experiment's TOML file."""

    config: str
    """Name of a file in training/configs."""
    pairs: Count
    steps_factor: Number = Field(default=1.0, gt=0)
    """Steps of this arm by those of the others."""


def read_paired(path: Path, values: Mapping[str, Any]) -> PairedExperiment:
    """Return the experiment of a TOML file's values; BadInput if it cannot work."""
    table = validate(PairedTable, values, f"{path}:")
    arms = tuple(_read_arm(path, name, arm, table) for name, arm in table.arm.items())
    for role in ("reference", "longer", "claim", "control"):
        name = getattr(table, role)
        if name not in table.arm and (name or role == "reference"):
            raise BadInput(
                f"{path}: {role} {name!r} is no arm; the arms are {', '.join(table.arm)}."
            )
    shape = _size(arms[0].config.encoder)
    for arm in arms:
        if _size(arm.config.encoder) != shape:
            raise BadInput(
                f"{path}: arm {arm.name!r} has an encoder of {_described(arm.config.encoder)}, and"
                f" {arms[0].name!r} one of {_described(arms[0].config.encoder)}; encoders of one"
                " size can be compared."
            )
    return PairedExperiment(
        path=path,
        reference=table.reference,
        longer=table.longer,
        claim=table.claim,
        control=table.control,
        arms=arms,
        first_pair=table.first_pair,
        question=table.question,
        notes=table.notes,
    )


def _read_arm(path: Path, name: str, values: object, table: PairedTable) -> Arm:
    source = f"{path}: [arm.{name}]"
    arm = validate(ArmTable, values, source)
    config = read_config(CONFIGS / arm.config)
    changes = dict(table.optimisation)
    steps = changes.get("steps", config.optimisation.steps)
    changes["steps"] = round(steps * arm.steps_factor)
    return Arm(name, with_optimisation(config, changes, source), arm.pairs)


def _with_seed(config: Config, seed: int, source: Path) -> Config:
    return with_optimisation(config, {"seed": seed}, f"{source}:")


def _size(encoder: Encoder) -> tuple[int, int]:
    return encoder.layers, encoder.hidden_size


def _described(encoder: Encoder) -> str:
    return f"{encoder.layers} layers of {encoder.hidden_size}"


# Rows of units.csv.


@dataclass(frozen=True)
class Beginning:
    """What the runs of a pair must have in common."""

    machine: str
    """The processor's model."""
    corpus: str
    """Name of the corpus' folder, a digest of its text and tokenizer."""
    batch: str
    """Digest of the first step's batch."""
    weights: str
    """Digest of the encoder's first weights."""
    shape: str
    """The encoder's family and initialisation; other families have other first weights."""


@dataclass(frozen=True)
class Record:
    """A row of units.csv: a unit that is done."""

    arm: str
    pair: int
    beginning: Beginning
    run: Mapping[str, Any]
    """Cost and circumstances of its pretraining, by column."""
    measured: Mapping[str, float]
    """What its encoder was measured to hold, by column."""

    def row(self) -> dict[str, Any]:
        """Return the row."""
        return {
            "arm": self.arm,
            "pair": self.pair,
            **asdict(self.beginning),
            **self.run,
            **{name: round(value, 6) for name, value in self.measured.items()},
        }

    @classmethod
    def from_row(cls, row: Mapping[str, str]) -> Record:
        """Return the record of a row; BadInput if a cell is missing or is not a number."""
        beginning = Beginning(**{name: row[name] for name in Beginning.__dataclass_fields__})
        run = {name: row[name] for name in RUN_COLUMNS}
        numbers = {name: float(row[name]) for name in MEASURED}
        return cls(row["arm"], int(row["pair"]), beginning, run, numbers)


RUN_COLUMNS = (
    "steps",
    "tokens",
    "flops",
    "minutes",
    "measuring_minutes",
    "held_out_loss",
    "precision",
    "threads",
    "torch",
)
MEASURED = (READ_OUT, ACCURACY, *probes.names())
COLUMNS = ("arm", "pair", *Beginning.__dataclass_fields__, *RUN_COLUMNS, *MEASURED)


def read_records(path: Path) -> list[Record]:
    """Return the units that are done; BadInput if the file has other columns."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise BadInput(f"{path} has other columns than units.csv of this version.")
        try:
            return [Record.from_row(row) for row in reader]
        except (ValueError, TypeError) as error:
            raise BadInput(f"{path}, line {reader.line_num}: {error}.") from None


def append_record(path: Path, record: Record) -> None:
    """Add a row; processes that add one at the same time wait for each other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if file.seek(0, 2) == 0:
            writer.writeheader()
        writer.writerow(record.row())


# The run.


def run_pairs(experiment: PairedExperiment, data: Path, out: Path, records: Path) -> None:
    """Run every unit that is neither done nor locked by another process.

    Raises BadInput if a pair was begun with another text, other masks or other first weights.
    SIGINT and SIGTERM end it as they end `pretrain`.
    """
    done = begun_pairs(out, read_records(records))
    for unit in planned_units(experiment, done, this_machine(experiment)):
        with lock_unit(out, unit.name) as locked:
            if not locked or _is_done(unit, read_records(records)):
                continue
            beginning = begin(unit, data, out)
            check_pair(unit, beginning, begun_pairs(out, read_records(records)))
            _remember(unit, beginning, out)
            if not (unit.folder(out) / "checkpoint").is_dir():
                pretrain(unit.config, data, unit.folder(out), resume=True)
            append_record(records, measure(unit, beginning, data, out))
            # What a run resumes from is three times as large as its weights.
            shutil.rmtree(unit.folder(out) / "progress", ignore_errors=True)
        print(remaining(experiment, out, read_records(records)), flush=True)


def planned_units(
    experiment: PairedExperiment, begun: Mapping[int, Mapping[str, Beginning]], machine: str
) -> Iterator[Unit]:
    """Yield the units that make the pairs of every arm complete, done ones too, pair by pair.

    `begun` has the beginnings by pair and arm. A pair that was begun on another machine counts for
    the arms that have a run in it, next to the reference's, and gets no further runs here.
    """
    missing = {arm.name: arm.pairs for arm in experiment.arms}
    for pair in itertools.count(experiment.first_pair):
        if not any(missing.values()):
            return
        others = begun.get(pair, {})
        wanted = [arm.name for arm in experiment.arms if missing[arm.name]]
        if any(beginning.machine != machine for beginning in others.values()):
            for name in wanted:
                missing[name] -= {name, experiment.reference} <= others.keys()
            continue
        for arm in experiment.arms:
            # No pair without the reference, also if that has enough of them.
            if arm.name in wanted or arm.name == experiment.reference:
                missing[arm.name] -= arm.name in wanted
                yield Unit(arm.name, pair, _with_seed(arm.config, pair, experiment.path))


def this_machine(experiment: PairedExperiment) -> str:
    """Return the processor's model, and the precision that the experiment has on it."""
    precision = experiment.arms[0].config.optimisation.precision
    return f"{processor_model()}, {choose_precision(precision, torch.device('cpu'))}"


def begin(unit: Unit, data: Path, out: Path) -> Beginning:
    """Return what the unit begins with on this machine."""
    run = set_up(unit.config, data, corpora=unit.folder(out).parent)
    encoder = unit.config.encoder
    return Beginning(
        machine=f"{processor_model()}, {run.precision}",
        corpus=run.corpus.directory.name,
        batch=run.first_step.batch,
        weights=run.first_step.weights,
        shape=f"{encoder.family}, {encoder.initialisation}",
    )


def begun_pairs(out: Path, records: Sequence[Record]) -> dict[int, dict[str, Beginning]]:
    """Return the beginnings of all units that are done or were begun below `out`, by pair."""
    begun: dict[int, dict[str, Beginning]] = {}
    for path in sorted((out / "beginnings").glob("*.json")):
        arm, _, pair = path.stem.rpartition("-")
        text = path.read_text(encoding="utf-8")
        begun.setdefault(int(pair), {})[arm] = Beginning(**json.loads(text))
    for record in records:
        begun.setdefault(record.pair, {})[record.arm] = record.beginning
    return begun


def _remember(unit: Unit, beginning: Beginning, out: Path) -> None:
    path = out / "beginnings" / f"{unit.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(path, json.dumps(asdict(beginning)))


def check_pair(
    unit: Unit, beginning: Beginning, begun: Mapping[int, Mapping[str, Beginning]]
) -> None:
    """Raise BadInput if the unit begins with another text, other masks or weights than its pair."""
    for arm, other in begun.get(unit.pair, {}).items():
        pair = f"Pair {unit.pair} was begun by {arm!r}"
        if other.corpus != beginning.corpus:
            raise BadInput(
                f"{pair} on the text {other.corpus}, and --data holds {beginning.corpus}; give the"
                " same text, or another --out and --records."
            )
        if other.batch != beginning.batch:
            raise BadInput(
                f"{pair} with another first batch than {unit.arm!r} has: their configs differ in"
                " data, objective or batch_size."
            )
        if other.shape == beginning.shape and other.weights != beginning.weights:
            raise BadInput(f"{pair} with other first weights than {unit.arm!r} has.")


def measure(unit: Unit, beginning: Beginning, data: Path, out: Path) -> Record:
    """Measure a pretrained encoder; parts that were measured before an interruption are kept.

    Raises BadInput if the encoder has another size than the unit's config says.
    """
    folder = unit.folder(out)
    encoder = load_frozen(folder / "checkpoint")
    _check_size(encoder, unit)
    path = folder / "measured.json"
    measured: dict[str, float] = {}
    if path.is_file():
        measured |= json.loads(path.read_text(encoding="utf-8"))
    for names, measure_part in _parts(unit, encoder, data, folder):
        if not set(names) <= measured.keys():
            started = time.monotonic()
            measured |= measure_part()
            seconds = measured.get("seconds", 0.0) + time.monotonic() - started
            measured["seconds"] = seconds
            write_text_atomic(path, json.dumps(measured))
    measured[ACCURACY] = probes.mean_accuracy(measured)
    summary = json.loads((folder / "checkpoint/training.json").read_text(encoding="utf-8"))
    run = {
        **summary,
        "minutes": round(summary["seconds"] / 60, 1),
        "measuring_minutes": round(measured["seconds"] / 60, 1),
        "held_out_loss": round(summary["held_out_loss"], 5),
    }
    return Record(
        unit.arm,
        unit.pair,
        beginning,
        {name: run[name] for name in RUN_COLUMNS},
        {name: measured[name] for name in MEASURED},
    )


def _parts(
    unit: Unit, encoder: FrozenEncoder, data: Path, folder: Path
) -> Iterator[tuple[Sequence[str], Callable[[], dict[str, float]]]]:
    """Yield the names of measurements that are made together, and what makes them."""

    def read_out() -> dict[str, float]:
        corpus = prepare(unit.config.data, data, folder.parent)
        return {READ_OUT: read_out_loss(encoder, corpus)}

    yield (READ_OUT,), read_out
    for task in probes.TASKS:
        yield probes.names(task), partial(probes.probe, encoder, data, task)


def _check_size(encoder: FrozenEncoder, unit: Unit) -> None:
    config = encoder.model.config
    layers, hidden_size = config.num_hidden_layers, config.hidden_size
    if (layers, hidden_size) != _size(unit.config.encoder):
        raise BadInput(
            f"{unit.name} has an encoder of {layers} layers of {hidden_size}, and the experiment"
            f" compares encoders of {_described(unit.config.encoder)}."
        )


def _is_done(unit: Unit, records: Sequence[Record]) -> bool:
    return any((record.arm, record.pair) == (unit.arm, unit.pair) for record in records)


def remaining(experiment: PairedExperiment, out: Path, records: Sequence[Record]) -> str:
    """Return how many units are left on this machine, and how long one process needs for them."""
    begun = begun_pairs(out, records)
    units = list(planned_units(experiment, begun, this_machine(experiment)))
    left = [unit for unit in units if not _is_done(unit, records)]
    text = f"{len(records)} units are done and {len(left)} are left"
    if not left or not records:
        return f"{text}."
    minutes = sum(_expected_minutes(unit, records) for unit in left)
    return f"{text}, which take one process some {minutes / 60:.1f} hours."


def _expected_minutes(unit: Unit, records: Sequence[Record]) -> float:
    """Return the unit's minutes by those of a step of its arm; of all arms, if it has no run."""
    of_arm = [record.run for record in records if record.arm == unit.arm]
    runs = of_arm or [record.run for record in records]
    rates = [float(run["minutes"]) / int(run["steps"]) for run in runs]
    measuring = [float(run["measuring_minutes"]) for run in runs]
    return unit.config.optimisation.steps * fmean(rates) + fmean(measuring)
