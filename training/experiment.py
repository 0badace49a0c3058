"""
Compares pretraining designs: pretrains each at one budget, fine-tunes each on several tasks with
several seeds, and writes a report.

    drbert-experiment training/experiments/mini.toml --data DIR \\
        --out build/experiment --threads 1
    drbert-experiment training/experiments/mini.toml --data DIR \\
        --out build/experiment --report training/RESULTS.md

An experiment file with kind = "pairs" compares encoders by pairs of runs instead (pairs.py).

A unit is one pretraining or one fine-tuning. Units that are done are skipped, interrupted ones
continue. Several processes may work on one folder; each unit is locked by one of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from command import BadInput, BadUsage, Parser, Unavailable, finish
from training import results
from training.config import (
    CONFIGS,
    Config,
    Table,
    read_config,
    validate,
    with_defaults,
    with_optimisation,
)
from training.finetune import Recipe, finetune
from training.locks import lock_unit
from training.pair_records import read_records
from training.pairs import records_of, run_pairs
from training.pairs_file import PairedExperiment, read_paired
from training.pairs_page import Page, power_table
from training.pretrain import pretrain
from training.tasks import Task, find_task


@dataclass(frozen=True)
class Pretraining:
    """The pretraining of one encoder: a design and a seed."""

    design: str
    seed: int
    config: Config

    @property
    def name(self) -> str:
        """The unit's name, DESIGN-SEED."""
        return f"{self.design}-{self.seed}"

    def folder(self, out: Path) -> Path:
        """Return the unit's folder below `out`."""
        return out / "pretraining" / self.name

    def is_done(self, out: Path) -> bool:
        """Return whether the checkpoint exists; BadInput if it was trained with another config."""
        summary = self.folder(out) / "checkpoint/training.json"
        if not summary.is_file():
            return False
        if with_defaults(results.read_json(summary)["config"]) != self.config.as_dict():
            raise BadInput(
                f"{self.folder(out)} was trained with another config; give another --out, or remove"
                " it to train it again."
            )
        return True


@dataclass(frozen=True)
class Finetuning:
    """The fine-tuning of one classifier: an encoder, a task and a seed."""

    encoder: Pretraining
    task: Task
    recipe: Recipe

    @property
    def name(self) -> str:
        """The unit's name, DESIGN-SEED-TASK-SEED."""
        return f"{self.encoder.name}-{self.task.name}-{self.recipe.seed}"

    def folder(self, out: Path) -> Path:
        """Return the unit's folder below `out`."""
        return out / "finetuning" / self.name

    def is_done(self, out: Path) -> bool:
        """Return whether the classifier exists; BadInput if its recipe or encoder is another."""
        summary = self.folder(out) / "training.json"
        if not summary.is_file():
            return False
        before = results.read_json(summary)
        # What an earlier version did not record had its default.
        recipe = {
            field.name: before["finetuning"].get(field.name, field.default)
            for field in dataclasses.fields(Recipe)
        }
        encoder = results.read_json(self.encoder.folder(out) / "checkpoint/training.json")
        if recipe != dataclasses.asdict(self.recipe) or before["pretraining"] != encoder:
            raise BadInput(
                f"{self.folder(out)} was trained with another recipe or on another encoder; give"
                " another --out, or remove it to train it again."
            )
        return True


@dataclass(frozen=True)
class Experiment:
    """All pretrainings and fine-tunings of a comparison."""

    path: Path
    """The TOML file."""
    history: str
    """What was tried before, in Markdown, for the report."""
    reference: str
    """The design that the others are compared with."""
    tasks: tuple[Task, ...]
    pretrainings: tuple[Pretraining, ...]
    finetunings: tuple[Finetuning, ...]


class ExperimentTable(Table):
    """An experiment's TOML file."""

    tasks: list[str]
    finetuning_seeds: list[int]
    reference: str
    """The design that the others are compared with."""
    pretraining: dict[str, object]
    """A DesignTable for each design."""
    steps: int | None = Field(default=None, ge=1)
    """Steps of every pretraining; by default those of its config."""
    epochs: dict[str, int] = Field(default={})
    """Fine-tuning epochs by task; by default the task's own."""
    history: str = ""


class DesignTable(Table):
    """A design of an experiment's TOML file."""

    config: str
    """Name of a file in training/configs."""
    seeds: list[int]


def read_toml(path: Path) -> dict[str, Any]:
    """Return a TOML file's values; Unavailable if it cannot be read, BadInput if it is not TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise Unavailable(f"{path} cannot be read; training/experiments holds one.") from None
    except tomllib.TOMLDecodeError as error:
        raise BadInput(f"{path} is not TOML: {error}.") from None


def read_experiment(path: Path) -> Experiment:
    """Read an experiment from a TOML file.

    Raises Unavailable if the file cannot be read, BadInput if it cannot work.
    """
    table = validate(ExperimentTable, read_toml(path), f"{path}:")
    tasks = tuple(find_task(name) for name in table.tasks)
    pretrainings: list[Pretraining] = []
    for design, design_values in table.pretraining.items():
        source = f"{path}: [pretraining.{design}]"
        pretrainings += _pretrainings(design, design_values, table.steps, source)
    if table.reference not in table.pretraining:
        raise BadInput(
            f"{path}: reference {table.reference!r} is unknown; known are"
            f" {', '.join(table.pretraining)}."
        )
    for name in sorted(table.epochs.keys() - set(table.tasks)):
        raise BadInput(
            f"{path}: [epochs] {name} is not one of the tasks, {', '.join(table.tasks)}."
        )
    finetunings = tuple(
        Finetuning(
            encoder, task, Recipe(epochs=table.epochs.get(task.name, task.epochs), seed=seed)
        )
        for seed in table.finetuning_seeds
        for encoder in pretrainings
        for task in tasks
    )
    return Experiment(path, table.history, table.reference, tasks, tuple(pretrainings), finetunings)


def _pretrainings(
    design: str, values: object, steps: int | None, source: str
) -> Iterator[Pretraining]:
    """Yield a pretraining for each seed of a design."""
    table = validate(DesignTable, values, source)
    config = read_config(CONFIGS / table.config)
    changes: dict[str, int] = {} if steps is None else {"steps": steps}
    for seed in table.seeds:
        yield Pretraining(
            design, seed, with_optimisation(config, {**changes, "seed": seed}, source)
        )


def run_experiment(experiment: Experiment, data: Path, out: Path) -> None:
    """Run every unit that is neither done nor locked by another process, pretraining first."""
    # Results of another recipe are refused before anything is trained.
    units: list[Pretraining | Finetuning] = [*experiment.pretrainings, *experiment.finetunings]
    for unit in units:
        unit.is_done(out)
    for pretraining in experiment.pretrainings:
        with lock_unit(out, pretraining.name) as locked:
            if locked and not pretraining.is_done(out):
                pretrain(pretraining.config, data, pretraining.folder(out), resume=True)
    # Repeat while a pass trains something: another process may have finished an encoder meanwhile.
    while sum(_finetune(finetuning, data, out) for finetuning in experiment.finetunings):
        pass


def _finetune(unit: Finetuning, data: Path, out: Path) -> bool:
    """Run a fine-tuning; return False if it is done, locked, or its encoder is not done."""
    with lock_unit(out, unit.name) as locked:
        if not locked or not unit.encoder.is_done(out) or unit.is_done(out):
            return False
        finetune(
            unit.encoder.folder(out) / "checkpoint", unit.task, data, unit.folder(out), unit.recipe
        )
        # The predictions stay; the weights of hundreds of classifiers would take too much space.
        (unit.folder(out) / "model.safetensors").unlink()
        return True


def collect_records(
    experiment: Experiment, out: Path
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the records of all pretrainings and of all fine-tunings that are done."""
    pretrained = [
        results.pretraining_record(unit.design, unit.seed, unit.folder(out))
        for unit in experiment.pretrainings
        if unit.is_done(out)
    ]
    finetuned = [
        results.finetuning_record(unit.encoder.design, unit.encoder.seed, unit.folder(out))
        for unit in experiment.finetunings
        if unit.is_done(out)
    ]
    return pretrained, finetuned


def main(arguments: Sequence[str]) -> int:
    """Run the command line and return its exit code."""
    parser = Parser(
        prog="drbert-experiment",
        description="Compare pretraining designs at one budget, on several tasks and seeds.",
    )
    parser.add_argument("experiment", type=Path, help="a TOML file, see training/experiments")
    parser.add_argument(
        "--data", type=Path, help="the folder that holds the text and the tasks; needed to train"
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="the folder to write the units to; units that are done there are skipped",
    )
    parser.add_argument(
        "--threads", type=int, help="processor threads to use (default: torch's choice)"
    )
    parser.add_argument(
        "--report",
        type=Path,
        help=(
            "train nothing; write the results so far to this Markdown file, with tables and a plot"
            " in results/ next to it"
        ),
    )
    parser.add_argument(
        "--records",
        type=Path,
        help="a paired experiment's rows, one for each run (default: NAME.csv in --out)",
    )
    parser.add_argument(
        "--power",
        type=Path,
        metavar="RECORDS",
        help="train nothing; print what a paired experiment can show, by the rows of a pilot",
    )
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    values = read_toml(options.experiment)
    if "kind" in values:
        return _compare_pairs(read_paired(options.experiment, values), options)
    for name in ("records", "power"):
        if getattr(options, name) is not None:
            raise BadUsage(f'--{name} is for paired experiments, whose file says kind = "pairs".')
    experiment = read_experiment(options.experiment)
    if options.out is None or (options.report is None and options.data is None):
        raise BadUsage("--data and --out are needed to train, and --out for a report.")
    if options.report is not None:
        pretrained, finetuned = collect_records(experiment, options.out)
        report = results.Report(
            experiment=experiment.path,
            history=experiment.history,
            reference=experiment.reference,
            tasks=experiment.tasks,
            planned=len(experiment.finetunings),
            pretrained=pretrained,
            finetuned=finetuned,
        )
        report.write(options.report)
        print(
            f"{options.report}: {len(pretrained)} of {len(experiment.pretrainings)} encoders,"
            f" {len(finetuned)} of {len(experiment.finetunings)} classifiers"
        )
        return 0
    run_experiment(experiment, options.data, options.out)
    return 0


def _compare_pairs(experiment: PairedExperiment, options: argparse.Namespace) -> int:
    if options.power is not None:
        pilot = read_records(options.power, must_exist=True)
        print("\n".join(power_table(experiment, pilot)))
        return 0
    if options.records is None and options.out is None:
        raise BadUsage("--records or --out is needed: where the rows of the runs are.")
    path = options.records or options.out / f"{experiment.path.stem}.csv"
    if options.report is not None:
        records = records_of(experiment, read_records(path, must_exist=True))
        Page(experiment, records, path).write(options.report)
        print(f"{options.report}: {len(records)} runs")
        return 0
    if options.data is None or options.out is None:
        raise BadUsage("--data and --out are needed to train.")
    run_pairs(experiment, options.data, options.out, path)
    return 0


def run() -> None:
    """Run the console script drbert-experiment."""
    finish(main)


if __name__ == "__main__":
    run()
