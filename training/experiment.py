"""
Compares pretraining designs: pretrains each at one budget, fine-tunes each on several tasks with
several seeds, and tells of all of it.

    python -m training.experiment training/experiments/mini.toml --data DIR --out build/experiment
        --threads 1
    python -m training.experiment training/experiments/mini.toml --data DIR --out build/experiment
        --report training/RESULTS.md

A unit is one pretraining or one fine-tuning. What is done is skipped, what was interrupted goes on,
and several processes may work on one folder at once: each unit is taken by one of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from command import BadInput, Parser, Unavailable, finish
from training import results
from training.config import Config, read_config, with_optimisation
from training.finetune import Recipe, finetune
from training.pretrain import pretrain
from training.tasks import Task, task_named

CONFIGS = Path(__file__).parent / "configs"


@dataclass(frozen=True)
class Pretraining:
    """One encoder: a design and a seed."""

    design: str
    seed: int
    config: Config

    @property
    def name(self) -> str:
        return f"{self.design}-{self.seed}"

    def folder(self, out: Path) -> Path:
        return out / "pretraining" / self.name

    def is_done(self, out: Path) -> bool:
        """BadInput if what lies there was trained otherwise."""
        told = self.folder(out) / "checkpoint/training.json"
        if told.is_file() and results.read_json(told)["config"] != self.config.as_dict():
            raise BadInput(
                f"{self.folder(out)} was trained with another config; give another --out, or remove"
                " it to train it again."
            )
        return told.is_file()


@dataclass(frozen=True)
class Finetuning:
    """One classifier: an encoder, a task and a seed."""

    encoder: Pretraining
    task: Task
    recipe: Recipe

    @property
    def name(self) -> str:
        return f"{self.encoder.name}-{self.task.name}-{self.recipe.seed}"

    def folder(self, out: Path) -> Path:
        return out / "finetuning" / self.name

    def is_done(self, out: Path) -> bool:
        """BadInput if what lies there was trained otherwise, or on top of another encoder."""
        told = self.folder(out) / "training.json"
        if not told.is_file():
            return False
        before = results.read_json(told)
        recipe = {key: before["finetuning"][key] for key in dataclasses.asdict(self.recipe)}
        encoder = results.read_json(self.encoder.folder(out) / "checkpoint/training.json")
        if recipe != dataclasses.asdict(self.recipe) or before["pretraining"] != encoder:
            raise BadInput(
                f"{self.folder(out)} was trained by another recipe or on another encoder; give"
                " another --out, or remove it to train it again."
            )
        return True


@dataclass(frozen=True)
class Experiment:
    path: Path
    history: str
    """What was tried before this experiment was as it is, for the report."""
    reference: str
    tasks: tuple[Task, ...]
    pretrainings: tuple[Pretraining, ...]
    finetunings: tuple[Finetuning, ...]


def read_experiment(path: Path) -> Experiment:
    """The experiment in a TOML file; BadInput names what is wrong in it."""
    try:
        told = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise Unavailable(f"{path} cannot be read; training/experiments holds one.") from None
    except tomllib.TOMLDecodeError as error:
        raise BadInput(f"{path} is not TOML: {error}.") from None
    keys = {"tasks", "finetuning_seeds", "reference", "steps", "epochs", "history", "pretraining"}
    for key in sorted(told.keys() - keys):
        raise BadInput(f"{path} has no key {key!r}; known are {', '.join(sorted(keys))}.")
    for key in sorted(keys - told.keys() - {"steps", "epochs", "history"}):
        raise BadInput(f"{path} lacks the key {key!r}.")
    tasks = tuple(task_named(name) for name in told["tasks"])
    for design, of in told["pretraining"].items():
        if not isinstance(of, dict) or of.keys() != {"config", "seeds"}:
            raise BadInput(
                f"{path}: [pretraining] {design} is {of!r}; it takes a config and seeds, and"
                " nothing else."
            )
    budget = {"steps": told["steps"]} if "steps" in told else {}
    pretrainings = tuple(
        Pretraining(
            design,
            seed,
            with_optimisation(read_config(CONFIGS / of["config"]), {**budget, "seed": seed}, path),
        )
        for design, of in told["pretraining"].items()
        for seed in of["seeds"]
    )
    if told["reference"] not in told["pretraining"]:
        raise BadInput(
            f"{path}: reference {told['reference']!r} is none of {', '.join(told['pretraining'])}."
        )
    epochs = told.get("epochs", {})
    for name in sorted(epochs.keys() - set(told["tasks"])):
        raise BadInput(f"{path}: [epochs] {name} is none of the tasks, {', '.join(told['tasks'])}.")
    finetunings = tuple(
        Finetuning(encoder, task, Recipe(epochs=epochs.get(task.name, task.epochs), seed=seed))
        for seed in told["finetuning_seeds"]
        for encoder in pretrainings
        for task in tasks
    )
    return Experiment(
        path, told.get("history", ""), told["reference"], tasks, pretrainings, finetunings
    )


def carry_out(experiment: Experiment, data: Path, out: Path) -> None:
    """Every unit that is not done and not in another process's hands; pretraining before
    fine-tuning.
    """
    # What was trained otherwise is refused before anything is trained.
    units: list[Pretraining | Finetuning] = [*experiment.pretrainings, *experiment.finetunings]
    for unit in units:
        unit.is_done(out)
    for pretraining in experiment.pretrainings:
        with _taken(out, pretraining.name) as free:
            if free and not pretraining.is_done(out):
                pretrain(pretraining.config, data, pretraining.folder(out), resume=True)
    # Again as long as there was something to do: another process may have finished an encoder
    # meanwhile.
    while sum(_finetune(finetuning, data, out) for finetuning in experiment.finetunings):
        pass


def _finetune(unit: Finetuning, data: Path, out: Path) -> bool:
    """Whether it was there to be done; now it is."""
    with _taken(out, unit.name) as free:
        if not free or not unit.encoder.is_done(out) or unit.is_done(out):
            return False
        finetune(
            unit.encoder.folder(out) / "checkpoint", unit.task, data, unit.folder(out), unit.recipe
        )
        # What it answered is kept; hundreds of classifiers' weights are not.
        (unit.folder(out) / "model.safetensors").unlink()
        return True


@contextlib.contextmanager
def _taken(out: Path, name: str) -> Iterator[bool]:
    """Whether this process may work on the unit; a lock that dies with its process."""
    path = out / "locks" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def records(experiment: Experiment, out: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What is known so far: a record for every pretraining and for every fine-tuning that is
    done.
    """
    pretrained = [
        results.of_pretraining(p.design, p.seed, p.folder(out))
        for p in experiment.pretrainings
        if p.is_done(out)
    ]
    finetuned = [
        results.of_finetuning(f.encoder.design, f.encoder.seed, f.folder(out))
        for f in experiment.finetunings
        if f.is_done(out)
    ]
    return pretrained, finetuned


def main(arguments: Sequence[str]) -> int:
    parser = Parser(
        prog="python -m training.experiment",
        description="Compare pretraining designs at one budget, on several tasks and seeds.",
    )
    parser.add_argument("experiment", type=Path, help="a TOML file, see training/experiments")
    parser.add_argument(
        "--data", type=Path, required=True, help="the folder that holds the text and the tasks"
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="where the units go; what is done there is not done again",
    )
    parser.add_argument(
        "--threads", type=int, help="processor threads to use (default: torch's choice)"
    )
    parser.add_argument(
        "--report",
        type=Path,
        help=(
            "train nothing; write what is known so far to this Markdown file, with its tables and"
            " plot beside it"
        ),
    )
    given = parser.parse_args(arguments)
    experiment = read_experiment(given.experiment)
    if given.report is not None:
        pretrained, finetuned = records(experiment, given.out)
        results.write(
            given.report,
            experiment.path,
            experiment.history,
            experiment.reference,
            experiment.tasks,
            len(experiment.finetunings),
            pretrained,
            finetuned,
        )
        print(
            f"{given.report}: {len(pretrained)} of {len(experiment.pretrainings)} encoders,"
            f" {len(finetuned)} of {len(experiment.finetunings)} classifiers"
        )
        return 0
    if given.threads:
        torch.set_num_threads(given.threads)
    carry_out(experiment, given.data, given.out)
    return 0


if __name__ == "__main__":
    finish(main)
