"""
Runs a paired experiment.

The runs of a pair have the same seed: the same order of the text, the same masks and, for encoders
of one kind, the same first weights. So most of what chance does to a run does the same to the
other, and cancels in their difference. A pair is on one kind of machine: one that was begun
elsewhere gets no further runs here, and another pair takes its place.

A unit is one run of one arm. It is pretrained, its encoder is measured (readout.py, probes.py), and
its numbers become a row (pair_records.py). Units that are done are skipped, interrupted ones
continue, and several processes may work on one folder.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from atomic import write_text_atomic
from command import BadInput
from training import probes
from training.config import with_defaults
from training.corpus import prepare
from training.frozen import FrozenEncoder, load_frozen
from training.locks import lock_unit, wait_for_lock
from training.pair_records import (
    ACCURACY,
    MEASURED,
    READ_OUT,
    Beginning,
    Cost,
    Record,
    append_record,
    check_all,
    check_pair,
    check_records,
    read_records,
)
from training.pairs_file import PairedExperiment, Unit, describe_size, planned_units
from training.pretrain import choose_precision, pretrain, processor_model, set_up
from training.readout import read_out_loss

MOST_PAIRS = 1_000
"""Pairs from the first one on that can be of one experiment."""


def run_pairs(experiment: PairedExperiment, data: Path, out: Path, records: Path) -> None:
    """Run every unit that is neither done nor locked by another process.

    Raises BadInput if a run would begin with another text, other tasks, other masks or other first
    weights than those that it is compared with, or if a finished one had another config. SIGINT and
    SIGTERM end it as they end `pretrain`.
    """
    print(remaining(experiment, out, read_records(records)), flush=True)
    while _run_next(experiment, data, out, records):
        print(remaining(experiment, out, read_records(records)), flush=True)


def _run_next(experiment: PairedExperiment, data: Path, out: Path, records: Path) -> bool:
    """Run the first unit that is free; return False if there is none.

    The plan is made anew for each, because other processes, also on other machines, may have begun
    pairs meanwhile.
    """
    for unit in _units(experiment, out, read_records(records)):
        with lock_unit(out, unit.name) as locked:
            if not locked or not _begin(experiment, unit, data, out, records):
                continue
            beginning = _beginnings(out)[unit.pair][unit.arm]
            if not _is_pretrained(unit, out):
                pretrain(unit.config, data, unit.folder(out), resume=True)
            append_record(records, measure(unit, beginning, data, out))
            # What a run resumes from is three times as large as its weights.
            shutil.rmtree(unit.folder(out) / "progress", ignore_errors=True)
            return True
    return False


def _begin(experiment: PairedExperiment, unit: Unit, data: Path, out: Path, records: Path) -> bool:
    """Write down what a unit begins with; return False if it is done, or its pair is elsewhere.

    Raises BadInput if it does not fit to the runs that were begun before. One process at a time
    does this, so that no two begin a pair differently.
    """
    with wait_for_lock(out, "begin"):
        done = read_records(records)
        for record in done:
            if (record.arm, record.pair) == (unit.arm, unit.pair):
                if record.beginning.config != unit.config_digest():
                    raise BadInput(
                        f"{unit.name} in {records} was trained with another config; give other"
                        " --records and another --out."
                    )
                return False
        here = machine(experiment)
        begun = {**_beginnings(out).get(unit.pair, {}), **_done_beginnings(done).get(unit.pair, {})}
        if any(each.machine != here for each in begun.values()):
            return False
        beginning = beginning_of(unit, here, data, out)
        _check(unit, beginning, done, _beginnings(out))
        path = out / "beginnings" / f"{unit.name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomic(path, json.dumps(asdict(beginning)))
        return True


def _check(
    unit: Unit,
    beginning: Beginning,
    done: Sequence[Record],
    begun: Mapping[int, Mapping[str, Beginning]],
) -> None:
    """Raise BadInput if a unit does not begin as the runs that it is compared with."""
    nothing = Cost(0, 0, 0, 0.0, 0.0, 0.0)
    record = Record(unit.arm, unit.pair, beginning, nothing, {})
    others = [
        *done,
        *(
            Record(arm, pair, each, nothing, {})
            for pair in begun
            for arm, each in begun[pair].items()
        ),
    ]
    for other in others:
        check_all(record, other)
        if other.pair == unit.pair:
            check_pair(record, other)


def machine(experiment: PairedExperiment) -> str:
    """Return what the weights depend on here besides the config: a pair needs one of it."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else processor_model()
    precision = choose_precision(experiment.precision, device)
    return f"{name}, {precision}, {torch.get_num_threads()} thread(s), torch {torch.__version__}"


def beginning_of(unit: Unit, here: str, data: Path, out: Path) -> Beginning:
    """Return what the unit begins with on the machine `here`."""
    run = set_up(unit.config, data, corpora=unit.folder(out).parent)
    encoder = unit.config.encoder
    return Beginning(
        machine=here,
        corpus=run.corpus.directory.name,
        tasks=probes.digest(data),
        batch=run.first_step.batch,
        weights=run.first_step.weights,
        kind=f"{encoder.family}, {encoder.initialisation}",
        config=unit.config_digest(),
    )


def _beginnings(out: Path) -> dict[int, dict[str, Beginning]]:
    """Return what the units below `out` began with, by pair and arm."""
    begun: dict[int, dict[str, Beginning]] = {}
    for path in sorted((out / "beginnings").glob("*.json")):
        arm, _, pair = path.stem.rpartition("-")
        try:
            beginning = Beginning(**json.loads(path.read_text(encoding="utf-8")))
        except (TypeError, ValueError):
            raise BadInput(f"{path} is of another version; give another --out.") from None
        begun.setdefault(int(pair), {})[arm] = beginning
    return begun


def _done_beginnings(records: Sequence[Record]) -> dict[int, dict[str, Beginning]]:
    done: dict[int, dict[str, Beginning]] = {}
    for record in records:
        done.setdefault(record.pair, {})[record.arm] = record.beginning
    return done


def _units(experiment: PairedExperiment, out: Path, records: Sequence[Record]) -> list[Unit]:
    """Return the planned units, done ones too."""
    done, begun = (
        {
            pair: {arm: each.machine for arm, each in arms.items()}
            for pair, arms in beginnings.items()
        }
        for beginnings in (_done_beginnings(records), _beginnings(out))
    )
    return list(planned_units(experiment, done, begun, machine(experiment)))


def _is_pretrained(unit: Unit, out: Path) -> bool:
    """Return whether the checkpoint exists; BadInput if it was trained with another config."""
    path = unit.folder(out) / "checkpoint/training.json"
    if not path.is_file():
        return False
    config = with_defaults(json.loads(path.read_text(encoding="utf-8"))["config"])
    if config != unit.config.as_dict():
        raise BadInput(
            f"{unit.folder(out)} was trained with another config; give another --out, or remove it"
            " to train it again."
        )
    return True


def measure(unit: Unit, beginning: Beginning, data: Path, out: Path) -> Record:
    """Measure a pretrained encoder; parts that were measured before an interruption are kept.

    Raises BadInput if the encoder has another size than the unit's config says.
    """
    folder = unit.folder(out)
    encoder = load_frozen(folder / "checkpoint")
    _check_size(encoder, unit)
    weights = (folder / "checkpoint/model.safetensors").read_bytes()
    path = folder / f"measured-{hashlib.sha256(weights).hexdigest()[:12]}.json"
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
    cost = Cost(
        steps=summary["steps"],
        tokens=summary["tokens"],
        flops=summary["flops"],
        minutes=round(summary["seconds"] / 60, 1),
        measuring_minutes=round(measured["seconds"] / 60, 1),
        held_out_loss=round(summary["held_out_loss"], 5),
    )
    numbers = {name: measured[name] for name in MEASURED}
    return Record(unit.arm, unit.pair, beginning, cost, numbers)


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
    config: Any = encoder.model.config
    wanted = unit.config.encoder
    size = (config.num_hidden_layers, config.hidden_size, config.intermediate_size)
    if size != (wanted.layers, wanted.hidden_size, wanted.intermediate_size):
        raise BadInput(
            f"{unit.name} has an encoder of {size[0]} layers of {size[1]} and {size[2]}, and the"
            f" experiment compares encoders of {describe_size(wanted)}."
        )


def records_of(experiment: PairedExperiment, records: Sequence[Record]) -> list[Record]:
    """Return the records, all of which are of the experiment's arms and pairs.

    Raises BadInput if one is not, or if runs that are compared did not begin alike.
    """
    arms = {arm.name for arm in experiment.arms}
    for record in records:
        if record.arm not in arms or record.pair - experiment.first_pair not in range(MOST_PAIRS):
            raise BadInput(
                f"The records hold {record.arm!r} in pair {record.pair}, which is not of"
                f" {experiment.path}; name the records of this experiment."
            )
    check_records(records)
    return list(records)


def remaining(experiment: PairedExperiment, out: Path, records: Sequence[Record]) -> str:
    """Return how many units are left on this machine, and how long one process needs for them."""
    done = {(record.arm, record.pair) for record in records}
    left = [unit for unit in _units(experiment, out, records) if (unit.arm, unit.pair) not in done]
    text = f"{len(records)} units are done and {len(left)} are left"
    if not left or not records:
        return f"{text}."
    minutes = sum(_expected_minutes(unit, records) for unit in left)
    return f"{text}, which take one process some {minutes / 60:.1f} hours."


def _expected_minutes(unit: Unit, records: Sequence[Record]) -> float:
    """Return the unit's minutes by those of a step of its arm; of all arms, if it has no run."""
    costs = [record.cost for record in records if record.arm == unit.arm]
    costs = costs or [record.cost for record in records]
    of_step = fmean(cost.minutes / cost.steps for cost in costs)
    return unit.config.optimisation.steps * of_step + fmean(c.measuring_minutes for c in costs)
