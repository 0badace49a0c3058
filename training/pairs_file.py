"""
Reads a paired experiment's TOML file, and plans which runs its arms need.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from command import BadInput
from training.config import (
    CONFIGS,
    Config,
    Count,
    Encoder,
    Number,
    Table,
    read_config,
    validate,
    with_optimisation,
)


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

    def config_digest(self) -> str:
        """Return a digest of its config without the seed."""
        described = self.config.as_dict()
        del described["optimisation"]["seed"]
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


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
    """The positive control: an arm whose encoder is known to be better; may be empty."""
    arms: tuple[Arm, ...]
    first_pair: int
    question: str
    """What is asked and what is expected, in Markdown, for the report."""
    notes: str
    """What else the report says, in Markdown."""

    @property
    def precision(self) -> str:
        """The precision of all arms' configs."""
        return self.arms[0].config.optimisation.precision

    @property
    def designs(self) -> list[str]:
        """Arms that are compared: all but the reference, the longer one and the control."""
        others = {self.reference, self.longer, self.control}
        return [arm.name for arm in self.arms if arm.name not in others]

    def unit(self, arm: Arm, pair: int) -> Unit:
        """Return the run of an arm in a pair."""
        config = with_optimisation(arm.config, {"seed": pair}, f"{self.path}:")
        return Unit(arm.name, pair, config)


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
    if "seed" in table.optimisation:
        raise BadInput(f"{path}: seed cannot be set: the number of a pair is its runs' seed.")
    arms = tuple(_read_arm(path, name, arm, table) for name, arm in table.arm.items())
    experiment = PairedExperiment(
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
    _check_roles(experiment)
    _check_arms(experiment)
    return experiment


def _read_arm(path: Path, name: str, values: object, table: PairedTable) -> Arm:
    source = f"{path}: [arm.{name}]"
    arm = validate(ArmTable, values, source)
    config = read_config(CONFIGS / arm.config)
    changes = dict(table.optimisation)
    steps = changes.get("steps", config.optimisation.steps)
    changes["steps"] = round(steps * arm.steps_factor)
    source = f"{path}: [optimisation], for arm {name!r}:"
    return Arm(name, with_optimisation(config, changes, source), arm.pairs)


def _check_roles(experiment: PairedExperiment) -> None:
    names = [arm.name for arm in experiment.arms]
    roles: dict[str, str] = {}
    for role in ("reference", "longer", "claim", "control"):
        name = getattr(experiment, role)
        if name not in names and (name or role == "reference"):
            raise BadInput(
                f"{experiment.path}: {role} {name!r} is no arm; the arms are {', '.join(names)}."
            )
        if name in roles:
            raise BadInput(
                f"{experiment.path}: arm {name!r} is both {roles[name]} and {role}; it can be one."
            )
        if name:
            roles[name] = role


def _check_arms(experiment: PairedExperiment) -> None:
    first = experiment.arms[0]
    for arm in experiment.arms:
        if _size(arm.config.encoder) != _size(first.config.encoder):
            raise BadInput(
                f"{experiment.path}: arm {arm.name!r} has an encoder of"
                f" {describe_size(arm.config.encoder)}, and {first.name!r} one of"
                f" {describe_size(first.config.encoder)}; encoders of one size can be compared."
            )
        precision = arm.config.optimisation.precision
        if precision != experiment.precision:
            raise BadInput(
                f"{experiment.path}: arm {arm.name!r} has precision {precision!r}, and"
                f" {first.name!r} {experiment.precision!r}; all arms need the same."
            )


def _size(encoder: Encoder) -> tuple[int, int, int]:
    return encoder.layers, encoder.hidden_size, encoder.intermediate_size


def describe_size(encoder: Encoder) -> str:
    """Return an encoder's size in words."""
    layers, width, inner = _size(encoder)
    return f"{layers} layers of {width} and {inner}"


def planned_units(
    experiment: PairedExperiment,
    done: Mapping[int, Mapping[str, str]],
    begun: Mapping[int, Mapping[str, str]],
    machine: str,
) -> Iterator[Unit]:
    """Yield the units that make the pairs of every arm complete, done ones too, pair by pair.

    `done` and `begun` have the machines of runs that are done or begun, by pair and arm. A pair
    that was begun on another machine gets no further runs here. It counts for the arms that are
    done in it, next to the reference.
    """
    missing = {arm.name: arm.pairs for arm in experiment.arms}
    for pair in itertools.count(experiment.first_pair):
        wanted = [arm for arm in experiment.arms if missing[arm.name]]
        if not wanted:
            return
        ended = done.get(pair, {})
        machines = {*ended.values(), *begun.get(pair, {}).values()}
        if machines - {machine}:
            for arm in wanted:
                if arm.name in ended and experiment.reference in ended:
                    missing[arm.name] -= 1
            continue
        for arm in experiment.arms:
            # No pair without the reference, also if that has enough of them.
            if arm in wanted or arm.name == experiment.reference:
                yield experiment.unit(arm, pair)
        for arm in wanted:
            missing[arm.name] -= 1
