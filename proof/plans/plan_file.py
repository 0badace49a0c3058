"""
Plans as TOML files: every wrong key is named, and what is written reads back the same.
"""

from __future__ import annotations

import difflib
import hashlib
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from command import BadInput, Unavailable
from proof.plans.dialects import DialectName
from proof.plans.plan import (
    CLAIMABLE,
    FEWEST_IN_SLICES,
    NEWEST_SCHEDULE,
    REPEAT_GROUP,
    Arm,
    By,
    Claim,
    Kind,
    Level,
    Plan,
    Role,
    WorkCount,
)
from proof.plans.plan_checks import check_plan

LEVEL_KEYS: Mapping[Kind, tuple[str, ...]] = {
    "unloaded": ("tuples", "warm_up_tuples"),
    "mixed": ("rate_per_s", "tuples", "warm_up_tuples"),
    "switchback": ("rate_per_s", "slice_requests", "sets"),
    "capacity": ("slice_s", "sets", "in_flight"),
    "repeat": ("texts", "repeats"),
}
"""Keys that state the size of a level, by kind."""

Number = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Cpu = Annotated[int, Field(ge=0)]
Margins = dict[str, dict[str, Annotated[float, Field(gt=0, lt=1)]]]
Gains = dict[str, dict[str, Annotated[float, Field(ge=1)]]]
Betas = dict[str, dict[str, Annotated[float, Field(allow_inf_nan=False)]]]


class _Table(BaseModel):
    """A TOML table with known keys. Keys that may be None may be left out: TOML has no null."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class _ArmTable(_Table):
    name: Annotated[str, Field(pattern=r"^[\w.-]+$")]
    """Name of the arm in rows and reports, and of its model where the run starts the server."""
    role: Role
    """`reference` (two arms), `candidate` (two), `delayed` (one), `control` (a kept decoder)."""
    artifact: str | None = None
    """Folder of its artifact, where the run starts the server. The delayed arm has none."""
    url: str | None = None
    """URL of a server that the run does not start, or of a proxy in front of one."""
    model: str | None = None
    """Name of the model in requests; needed where a server has several."""
    dialect: DialectName = "drbert"
    """API of the server."""
    headers_env: str | None = None
    """Environment variable that holds further headers, a `Name: value` line for each."""
    by: By = "server"
    """What delays the delayed arm: the server, or the client for servers that cannot."""


class _InterleavedTable(_Table):
    tuples: Annotated[int, Field(ge=4)]
    """Blocks: texts that are sent once to every arm. A quarter of them are control blocks."""
    warm_up_tuples: Count = 20
    """Blocks before those that count."""
    margins: Margins = {}
    """What is claimed, and its margin, by metric and statistic: `end_to_end = { p50 = 0.02 }`."""


class _MixedTable(_InterleavedTable):
    rate_per_s: Number = 0.0
    """Arrivals per second of all arms together, as `drbert-prove capacity` prints them."""


class _SwitchbackTable(_Table):
    rate_per_s: Number = 0.0
    """Arrivals per second, as `drbert-prove capacity` prints them."""
    slice_requests: int | None = None
    """Requests in each slice; 20 is a good number."""
    sets: Count = 1
    """Slices of each arm in a restart. A set has one slice of every arm, with the same texts."""
    margins: Margins = {}
    """What is claimed, and its margin, before the gain."""
    gains: Gains = {}
    """Factors by which the queue multiplies a change of service time, from `drbert-prove plan`."""
    betas: Betas = {}
    """β of the adjustment for dilation, from `drbert-prove plan`."""


class _CapacityTable(_Table):
    slice_s: Number = 5.0
    """Seconds of a slice."""
    sets: Count = 1
    """Slices of each arm in a restart."""
    in_flight: Count = 32
    """Requests in flight; twice the server's largest batch."""
    margins: Margins = {}
    """What is claimed, and its margin."""


class _RepeatTable(_Table):
    texts: Annotated[int, Field(ge=REPEAT_GROUP, multiple_of=REPEAT_GROUP)] = 16
    """Texts, each new to the servers."""
    repeats: Count = 4
    """Requests to each arm for a text, after the first one."""


_LevelTable = _InterleavedTable | _MixedTable | _SwitchbackTable | _CapacityTable | _RepeatTable


class _LevelTables(_Table):
    unloaded: _InterleavedTable | None = None
    mixed_50: _MixedTable | None = Field(None, alias="mixed-50")
    mixed_80: _MixedTable | None = Field(None, alias="mixed-80")
    switchback_50: _SwitchbackTable | None = Field(None, alias="switchback-50")
    switchback_80: _SwitchbackTable | None = Field(None, alias="switchback-80")
    capacity: _CapacityTable | None = None
    repeat: _RepeatTable | None = None


class _ServerTable(_Table):
    port: Annotated[int, Field(gt=0, lt=65536)] = 8008
    """Port of the server that the run starts."""
    cpus: list[Cpu] = []
    """Processors that the server is pinned to; by default all."""
    settings: dict[str, Any] = {}
    """DRBERT_* variables of the server, without the prefix and in lower case."""
    variant: str = "auto"
    """Variant of the artifacts; auto is the fastest one here."""
    restart: str | None = None
    """Command that starts servers anew which the run does not start; $LOAD_ORDER holds the arms."""
    instances: bool = False
    """Whether each restart takes further servers behind the arms' URLs, as pods of a cluster."""


class _GeneratorTable(_Table):
    cpus: list[Cpu] = []
    """Processors that the load generator is pinned to; by default all."""


class _WorkTable(_Table):
    variant: str = "cpu-fp32"
    """Variant whose instructions are counted."""
    lengths: list[Count] = []
    """Tokens of the counted texts; by default as many lengths as the method affords."""
    margin: Annotated[float, Field(gt=0, lt=1)] = 0.001
    """Largest relative difference of instructions that counts as the same work."""


class _PlanTable(_Table):
    name: str
    """Name of the run and of its folder."""
    claim: Claim = "equivalence"
    """`equivalence`, or `non-inferiority` for a swap to another architecture."""
    seed: int
    """Seed of everything that looks random in a run."""
    texts: str
    """File of texts, one on each line."""
    texts_sha256: str | None = None
    """SHA-256 of that file, which binds the plan to it; `drbert-prove plan` sets it."""
    restarts: Annotated[int, Field(ge=4, multiple_of=4)]
    """Restarts that must count, a multiple of 4; a verdict needs 8, a pilot 12."""
    wait_for_calm_s: Number = 0.0
    """Longest wait before each restart, in seconds, for other guests of the host to be quiet."""
    schedule_version: Annotated[int, Field(ge=1, le=NEWEST_SCHEDULE)] = 1
    """2 in every new plan; 1 is for plans from before 2026-11-30."""
    capacity_per_s: Number = 0.0
    """Schedule 1 only: texts per second of the reference alone."""
    pilot: str | None = None
    """SHA-256 of the pilot.json that sizes and gains come from; `drbert-prove plan` sets it."""
    arm: list[_ArmTable]
    level: _LevelTables
    server: _ServerTable = _ServerTable()
    generator: _GeneratorTable = _GeneratorTable()
    work: _WorkTable | None = None


def read_plan(path: Path, is_template: bool = False) -> Plan:
    """Return the plan in a TOML file.

    A template has a claim, and not yet the numbers that a pilot gives.

    Raise Unavailable if it cannot be read, BadInput with the name of the key that is wrong.
    """
    try:
        content = path.read_bytes()
        values = tomllib.loads(content.decode())
    except OSError:
        raise Unavailable(f"The plan {path} cannot be read; examples/plans holds some.") from None
    except RecursionError:
        raise BadInput(f"{path} is not a plan: it is nested too deeply.") from None
    except ValueError as error:  # also for integers of thousands of digits
        raise BadInput(f"{path} is not TOML: {error}.") from None
    try:
        table = _PlanTable.model_validate(values)
    except ValidationError as error:
        # A misspelt key is two errors, one unknown key and one missing: the unknown one is named.
        errors = error.errors(include_url=False)
        first = min(errors, key=lambda each: each["type"] != "extra_forbidden")
        raise BadInput(f"{path}: {_complaint(first)}") from None
    plan = _to_plan(path, hashlib.sha256(content).hexdigest(), table, list(values["level"]))
    check_plan(plan, is_template)
    return plan


def _to_plan(path: Path, digest: str, table: _PlanTable, level_names: list[str]) -> Plan:
    """Return the plan of a valid table, with its levels in the order of the file."""
    by_name = {
        field.alias or name: getattr(table.level, name)
        for name, field in _LevelTables.model_fields.items()
    }
    server = table.server
    return Plan(
        path=path,
        digest=digest,
        name=table.name,
        claim=table.claim,
        seed=table.seed,
        texts=Path(table.texts),
        arms=tuple(Arm(**dict(arm)) for arm in table.arm),
        restarts=table.restarts,
        levels=tuple(_to_level(path, name, by_name[name]) for name in level_names),
        schedule_version=table.schedule_version,
        capacity_per_s=table.capacity_per_s,
        texts_sha256=table.texts_sha256,
        pilot=table.pilot,
        wait_for_calm_s=table.wait_for_calm_s,
        port=server.port,
        server_cpus=tuple(server.cpus),
        generator_cpus=tuple(table.generator.cpus),
        variant=server.variant,
        restart_command=server.restart,
        instances=server.instances,
        settings={f"DRBERT_{key.upper()}": str(value) for key, value in server.settings.items()},
        work=None if table.work is None else _to_work(table.work),
    )


def _to_work(table: _WorkTable) -> WorkCount:
    return WorkCount(table.variant, tuple(table.lengths), table.margin)


def _to_level(path: Path, name: str, table: _LevelTable) -> Level:
    kind, _, percent = name.partition("-")
    level = Level(name, kind, int(percent or 0), **dict(table))  # type: ignore[arg-type]
    # Also at `mixed`, which has no slices: pilots of published plans record it there.
    if getattr(table, "slice_requests", None) is None:
        level = replace(level, slice_requests=FEWEST_IN_SLICES.get(level.percent, 0))
    for key in ("margins", "gains", "betas"):
        by_metric: Mapping[str, Mapping[str, float]] = getattr(level, key)
        claimable = CLAIMABLE[level.kind]
        _check_keys(path, ("level", name, key), by_metric, claimable)
        for metric, values in by_metric.items():
            _check_keys(path, ("level", name, key, metric), values, claimable[metric])
    return level


def _check_keys(
    path: Path, loc: tuple[str, ...], keys: Iterable[str], known: Iterable[str]
) -> None:
    for key in keys:
        if key not in known:
            raise BadInput(f"{path}: {_unknown_key(loc, key, known)}")


_CHOICES: Mapping[str, Any] = {"claim": Claim, "role": Role, "dialect": DialectName, "by": By}
_LIMITS: Mapping[str, str] = {
    "restarts": "is no multiple of 4, so load order cannot be balanced",
    "port": "is no port; give 1 to 65535",
    "tuples": "is fewer than 4",
    "warm_up_tuples": "is less than 1",
    "texts": f"is no multiple of {REPEAT_GROUP}, the texts that are sent in turn",
    "repeats": "is less than 1",
    "sets": "is less than 1",
    "in_flight": "is less than 1",
    "margin": "is not between 0 and 1",
    "slice_s": "is no number of 0 or above",
    "capacity_per_s": "is no number of 0 or above",
    "wait_for_calm_s": "is no number of 0 or above",
    "rate_per_s": "is no number of 0 or above",
    "schedule_version": f"is no version of the schedule; give 1 or {NEWEST_SCHEDULE}",
}
"""What is wrong with a value beyond its limit, by key."""
_TYPES: Mapping[str, str] = {
    "bool_type": "is neither true nor false",
    "int_type": "is not of type int",
    "string_type": "is not of type str",
    "list_type": "is not of type list",
}
"""What is wrong with a value of another type, by pydantic's name of the error."""


def _complaint(error: ErrorDetails) -> str:
    """Return what is wrong with one key: its value with its limit, its type or the known ones."""
    loc, value = tuple(map(str, error["loc"])), error["input"]
    key = loc[-1]
    match error["type"]:
        case "extra_forbidden" if loc[:-1] == ("level",):
            known = ", ".join(_known_keys(("level",)))
            return f"there is no [level.{key}]; known are {known}."
        case "extra_forbidden":
            return _unknown_key(loc[:-1], key, _known_keys(loc[:-1]))
        case "missing":
            return f"the key {key!r} is missing."
        case "model_type" | "dict_type":
            return f"{_table_name(loc)} is {value!r} and no table."
        case "literal_error":
            return f"{key} {value!r} is unknown; known are {', '.join(get_args(_CHOICES[key]))}."
        case "string_pattern_mismatch":
            return f"the arm's name {value!r} may hold letters, digits, '-', '_' and '.' only."
    if "cpus" in loc[:-1]:
        return f"cpus holds {value!r}, which is no processor's number."
    if "lengths" in loc[:-1]:
        return f"lengths holds {value!r}, which is no number of tokens."
    if "margins" in loc:
        return f"{'.'.join(loc[2:])} = {value!r} is not between 0 and 1."
    if "gains" in loc:
        return f"{'.'.join(loc[2:])} = {value!r} is not 1 or above."
    if "betas" in loc:
        return f"{'.'.join(loc[2:])} = {value!r} is no number."
    return f"{key} = {value!r} {_TYPES.get(error['type']) or _LIMITS[key]}."


def _unknown_key(loc: tuple[str, ...], key: str, known: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(key, known, 1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else "."
    return f"{_table_name(loc)} has no key {key!r}; known are {', '.join(sorted(known))}{hint}"


def _known_keys(loc: tuple[str, ...]) -> list[str]:
    table: type[_Table] = _PlanTable
    match loc:
        case ("arm", _):
            table = _ArmTable
        case ("server",):
            table = _ServerTable
        case ("generator",):
            table = _GeneratorTable
        case ("work",):
            table = _WorkTable
        case ("level",):
            table = _LevelTables
        case ("level", "capacity"):
            table = _CapacityTable
        case ("level", "repeat"):
            table = _RepeatTable
        case ("level", "switchback-50" | "switchback-80"):
            table = _SwitchbackTable
        case ("level", "mixed-50" | "mixed-80"):
            table = _MixedTable
        case ("level", _):
            table = _InterleavedTable
    return [field.alias or name for name, field in table.model_fields.items()]


def _table_name(loc: tuple[str, ...]) -> str:
    match loc:
        case ():
            return "the plan"
        case ("arm", _):
            return "an [[arm]]"
        case ("level", name, key):
            return f"{key} of [level.{name}]"
        case _:
            return f"[{'.'.join(loc)}]"


def to_toml(plan: Plan, comment: str) -> str:
    """Return the plan as a file that read_plan reads, with a comment at its top."""
    import tomli_w  # only who writes plans needs it; the load generator reads them

    values: dict[str, Any] = {
        "name": plan.name,
        "claim": plan.claim,
        "seed": plan.seed,
        "texts": str(plan.texts),
        "restarts": plan.restarts,
    }
    optional = {
        "texts_sha256": plan.texts_sha256,
        "wait_for_calm_s": plan.wait_for_calm_s,
        "schedule_version": plan.schedule_version if plan.schedule_version > 1 else None,
        "capacity_per_s": plan.capacity_per_s,
        "pilot": plan.pilot,
    }
    values |= {key: value for key, value in optional.items() if value}
    values["arm"] = [_changed_fields(arm) for arm in plan.arms]
    values["level"] = {level.name: _level_values(level) for level in plan.levels}
    values["server"] = _server_values(plan)
    values["generator"] = {"cpus": list(plan.generator_cpus)}
    if plan.work is not None:
        values["work"] = {
            "variant": plan.work.variant,
            "lengths": list(plan.work.lengths),
            "margin": plan.work.margin,
        }
    lines = [f"# {line}".rstrip() for line in comment.splitlines()]
    return "\n".join([*lines, "", tomli_w.dumps(values)])


def _changed_fields(arm: Arm) -> dict[str, str]:
    """Return the fields of an arm that differ from their defaults."""
    return {
        field.name: getattr(arm, field.name)
        for field in fields(arm)
        if getattr(arm, field.name) != field.default
    }


def _level_values(level: Level) -> dict[str, Any]:
    values = {key: getattr(level, key) for key in LEVEL_KEYS[level.kind]}
    if not level.rate_per_s:
        values.pop("rate_per_s", None)
    if level.margins:
        values["margins"] = {metric: dict(margins) for metric, margins in level.margins.items()}
    for key in ("gains", "betas"):
        by_metric: Mapping[str, Mapping[str, float]] = getattr(level, key)
        if by_metric:
            values[key] = {metric: dict(numbers) for metric, numbers in by_metric.items()}
    return values


def _server_values(plan: Plan) -> dict[str, Any]:
    values: dict[str, Any] = {"port": plan.port, "cpus": list(plan.server_cpus)}
    values["settings"] = {
        key.removeprefix("DRBERT_").lower(): value for key, value in plan.settings.items()
    }
    if plan.variant != "auto":
        values["variant"] = plan.variant
    if plan.restart_command:
        values["restart"] = plan.restart_command
    if plan.instances:
        values["instances"] = True
    return values
