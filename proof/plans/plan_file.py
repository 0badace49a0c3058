"""
Plans as TOML files: every wrong key is named, and what is written reads back the same.
"""

from __future__ import annotations

import difflib
import hashlib
import math
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any, get_args
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from command import BadInput, Unavailable
from proof.plans.dialects import DIALECTS, DialectName
from proof.plans.plan import (
    ADJUSTED,
    CLAIMABLE,
    DILATION,
    FEWEST_IN_SLICE,
    FEWEST_IN_SLICES,
    FROM_SERVER,
    MOST_GAIN,
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

NAME = re.compile(r"(?!\.)[^/\x00-\x1f\x7f]{1,80}")
"""A plan's name, which becomes part of a folder's."""
MOST_CALM_S = 3600.0
MOST_REQUESTS = 2_000_000
"""Most requests of one level in a restart: its schedule and its rows fit into memory."""

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
    role: Role
    artifact: str | None = None
    url: str | None = None
    model: str | None = None
    dialect: DialectName = "drbert"
    headers_env: str | None = None
    by: By = "server"


class _InterleavedTable(_Table):
    tuples: Annotated[int, Field(ge=4)]
    warm_up_tuples: Count = 20
    margins: Margins = {}


class _MixedTable(_InterleavedTable):
    rate_per_s: Number = 0.0


class _SwitchbackTable(_Table):
    rate_per_s: Number = 0.0
    slice_requests: int | None = None
    sets: Count = 1
    margins: Margins = {}
    gains: Gains = {}
    betas: Betas = {}


class _CapacityTable(_Table):
    slice_s: Number = 5.0
    sets: Count = 1
    in_flight: Count = 32
    margins: Margins = {}


class _RepeatTable(_Table):
    texts: Annotated[int, Field(ge=REPEAT_GROUP, multiple_of=REPEAT_GROUP)] = 16
    repeats: Count = 4


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
    cpus: list[Cpu] = []
    settings: dict[str, Any] = {}
    variant: str = "auto"
    restart: str | None = None
    instances: bool = False


class _GeneratorTable(_Table):
    cpus: list[Cpu] = []


class _WorkTable(_Table):
    variant: str = "cpu-fp32"
    lengths: list[Count] = []
    margin: Annotated[float, Field(gt=0, lt=1)] = 0.001


class _PlanTable(_Table):
    name: str
    claim: Claim = "equivalence"
    seed: int
    texts: str
    texts_sha256: str | None = None
    restarts: Annotated[int, Field(ge=4, multiple_of=4)]
    wait_for_calm_s: Number = 0.0
    schedule_version: Annotated[int, Field(ge=1, le=NEWEST_SCHEDULE)] = 1
    capacity_per_s: Number = 0.0
    pilot: str | None = None
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
    _check(plan)
    for level in plan.levels:
        _check_adjusted(plan, level, is_template)
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
    _check_size(path, level)
    return level


def _check_keys(
    path: Path, loc: tuple[str, ...], keys: Iterable[str], known: Iterable[str]
) -> None:
    for key in keys:
        if key not in known:
            raise BadInput(f"{path}: {_unknown_key(loc, key, known)}")


def _check_size(path: Path, level: Level) -> None:
    if level.kind == "repeat":
        return
    if not any(level.margins.values()):
        raise BadInput(f"{path}: [level.{level.name}] claims nothing; give it margins.")
    if level.kind != "switchback":
        return
    fewest = FEWEST_IN_SLICES[level.percent]
    if level.slice_requests < FEWEST_IN_SLICE:
        raise BadInput(
            f"{path}: slice_requests = {level.slice_requests} of [level.{level.name}] is below"
            f" {FEWEST_IN_SLICE}, the fewest in a slice."
        )
    if level.slice_requests * level.sets < fewest:
        raise BadInput(
            f"{path}: slice_requests × sets = {level.slice_requests * level.sets} of"
            f" [level.{level.name}] is below {fewest}, the fewest of an arm at that load."
        )


def _check_gains(plan: Plan, level: Level) -> None:
    """Raise BadInput if a gain widens a margin by more than is allowed."""
    for metric, gains in level.gains.items():
        for statistic, gain in gains.items():
            most = MOST_GAIN[plan.schedule_version][level.percent]
            if gain > most:
                raise BadInput(
                    f"{plan.path}: gains.{metric}.{statistic} = {gain} is above {most}, the most"
                    f" that may widen a margin at {level.percent} %."
                )


def _check_schedule_version(plan: Plan, level: Level) -> None:
    """Raise BadInput if a level uses what the plan's schedule does not have."""
    newer = [key for key in ("rate_per_s", "betas") if getattr(level, key)]
    newer += [metric for metric in (ADJUSTED, DILATION) if metric in level.margins]
    if newer and plan.schedule_version == 1:
        raise BadInput(
            f"{plan.path}: {newer[0]} of [level.{level.name}] needs schedule_version = 2 at the top"
            " of the plan."
        )


def _check_adjusted(plan: Plan, level: Level, is_template: bool) -> None:
    """Raise BadInput if an adjusted time is claimed without β, or without what sees waiting."""
    for statistic, margin in level.margins.get(ADJUSTED, {}).items():
        if not is_template and statistic not in level.betas.get(ADJUSTED, {}):
            raise BadInput(
                f"{plan.path}: [level.{level.name}] claims {ADJUSTED} {statistic} without"
                f" betas.{ADJUSTED}.{statistic}; `drbert-prove plan` takes it from a pilot."
            )
        companions = [level.margins.get(DILATION, {}).get("mean", math.inf)]
        companions += [
            other.margins.get("inference", {}).get("mean", math.inf)
            for other in plan.levels
            if other.kind == "mixed"
        ]
        if min(companions) > margin:
            raise BadInput(
                f"{plan.path}: [level.{level.name}] claims {ADJUSTED} {statistic}, which hides a"
                f" candidate that waits; with a margin of at most {margin:g}, claim {DILATION} mean"
                " there or inference mean at a level mixed too."
            )


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


def _check(plan: Plan) -> None:
    """Raise BadInput if values contradict each other, or ask for more than can be."""
    if not NAME.fullmatch(plan.name):
        raise BadInput(
            f"{plan.path}: name = {plan.name[:80]!r} cannot name a folder; give 1 to 80 characters"
            " without slashes and control characters, and no dot in front."
        )
    if plan.wait_for_calm_s > MOST_CALM_S:
        raise BadInput(
            f"{plan.path}: wait_for_calm_s = {plan.wait_for_calm_s:g} is above {MOST_CALM_S:g}, an"
            " hour for each restart."
        )
    for level in plan.levels:
        requests = level.requests(len(plan.arms))
        if requests > MOST_REQUESTS:
            raise BadInput(
                f"{plan.path}: [level.{level.name}] sends {requests:,} requests in a restart, above"
                f" {MOST_REQUESTS:,}; give it fewer tuples, or fewer and shorter slices."
            )
    names = [arm.name for arm in plan.arms]
    for name in names:
        if names.count(name) > 1:
            raise BadInput(f"{plan.path}: two arms are called {name!r}.")
    if not plan.judged_levels:
        raise BadInput(
            f"{plan.path}: there is no level that claims anything; give it a [level.unloaded]."
        )
    _check_arms(plan)
    _check_delay(plan)
    if plan.indices("control") and not any(level.kind == "unloaded" for level in plan.levels):
        raise BadInput(
            f"{plan.path}: arm {plan.arms[plan.indices('control')[0]].name!r} is a control of the"
            " level unloaded, which this plan has not."
        )
    for level in plan.levels:
        _check_claims(plan, level)
        _check_schedule_version(plan, level)
        _check_gains(plan, level)


def _check_claims(plan: Plan, level: Level) -> None:
    """Raise BadInput if a claim cannot be measured, or says too little by itself."""
    claimed = [metric for metric in FROM_SERVER if metric in level.margins]
    if claimed and not plan.server_timing:
        raise BadInput(
            f"{plan.path}: [level.{level.name}] claims {claimed[0].replace('_', ' ')} time,"
            " which only the dialect drbert reports."
        )
    if list(level.margins) == ["inference_cpu"]:
        raise BadInput(
            f"{plan.path}: [level.{level.name}] claims inference_cpu alone, which does not see"
            " a candidate that waits; claim a time of the wall clock too."
        )
    if set(level.margins) == {DILATION}:
        raise BadInput(
            f"{plan.path}: [level.{level.name}] claims {DILATION} alone, which is no time;"
            f" claim {ADJUSTED} or another time too."
        )


def _check_arms(plan: Plan) -> None:
    copied_roles: tuple[Role, ...] = ("reference", "candidate")
    for role in copied_roles:
        _check_pair(plan, role)
    copies = [arm for arm in plan.arms if arm.role != "delayed"]
    for arm in copies:
        _check_arm(plan.path, arm)
    if len({arm.artifact is None for arm in copies}) > 1:
        raise BadInput(
            f"{plan.path}: some arms name an artifact and some none; either the run starts all of"
            " them or none."
        )
    if plan.instances:
        _check_instances(plan, copies)


def _check_pair(plan: Plan, role: Role) -> None:
    """Raise BadInput unless two arms have the role, and both load the same model.

    Their artifacts may be copies of one folder; the run compares them.
    """
    arms = [plan.arms[i] for i in plan.indices(role)]
    if len(arms) != 2:
        raise BadInput(f"{plan.path}: {len(arms)} arms are {role}; each is loaded twice.")
    if len({(arm.model, arm.dialect) for arm in arms}) > 1:
        raise BadInput(
            f"{plan.path}: the two arms that are {role} name different models or dialects; they are"
            " two loads of one."
        )


def _check_arm(path: Path, arm: Arm) -> None:
    """Raise BadInput unless the arm names what to start or to call, and how it is called."""
    if arm.artifact is None and arm.url is None:
        raise BadInput(f"{path}: arm {arm.name!r} needs an artifact to start or a url to call.")
    if arm.artifact and arm.model:
        raise BadInput(
            f"{path}: arm {arm.name!r} names both a model and an artifact; what a run"
            " starts is requested by the arm's name, so leave the model out."
        )
    if "{model}" in DIALECTS[arm.dialect].path and not arm.model:
        raise BadInput(f"{path}: arm {arm.name!r} speaks {arm.dialect}, whose path needs a model.")
    if arm.url is None and arm.dialect != "drbert":
        raise BadInput(
            f"{path}: arm {arm.name!r} speaks {arm.dialect}; the server that a run starts"
            " speaks drbert."
        )


def _check_instances(plan: Plan, copies: list[Arm]) -> None:
    """Raise BadInput unless every arm is a running server of ours that is called by http."""
    if plan.starts_servers:
        raise BadInput(
            f"{plan.path}: [server] takes instances that run already, and arm {copies[0].name!r}"
            " has an artifact to start; give the arms urls."
        )
    if plan.restart_command is not None:
        raise BadInput(
            f"{plan.path}: [server] names a restart command and takes instances in place of"
            " restarts; leave one of them out."
        )
    for arm in copies:
        if arm.dialect != "drbert":
            raise BadInput(
                f"{plan.path}: arm {arm.name!r} speaks {arm.dialect}; instances are identified by"
                " X-Instance-Id, which only drbert sends."
            )
        if urlsplit(arm.url or "").scheme != "http":
            raise BadInput(
                f"{plan.path}: arm {arm.name!r} is at {arm.url}; instances are called by their"
                " addresses, which needs http."
            )


def _check_delay(plan: Plan) -> None:
    """Raise BadInput unless one delayed arm can show that a regression would be detected."""
    delayed = [plan.arms[i] for i in plan.indices("delayed")]
    if len(delayed) != 1:
        raise BadInput(
            f"{plan.path}: {len(delayed)} arms are delayed; a plan has one, the second"
            " reference slowed down, to show that a regression would be detected."
        )
    [arm] = delayed
    if arm.artifact or arm.url or arm.model:
        raise BadInput(
            f"{plan.path}: the delayed arm {arm.name!r} is no copy of its own; it takes neither"
            " artifact, url nor model."
        )
    if arm.by == "client" and any(level.kind != "unloaded" for level in plan.judged_levels):
        raise BadInput(
            f"{plan.path}: a client's delay loads no queue, so it is a control at the level"
            " unloaded only."
        )
    if arm.by == "server" and not plan.server_timing:
        raise BadInput(
            f'{plan.path}: servers of another dialect cannot delay; set by = "client" for the arm'
            f" {arm.name!r}."
        )
    for level in plan.judged_levels:
        if level.tightest_margin >= plan.delay:
            raise BadInput(
                f"{plan.path}: the delay is {plan.delay:.1%}, three times the tightest margin of"
                f" all levels, and would not be detected at [level.{level.name}], whose tightest is"
                f" {level.tightest_margin:.1%}; claim them in plans of their own."
            )
        if level.tuples and level.tuples < 32:
            raise BadInput(
                f"{plan.path}: tuples = {level.tuples} of [level.{level.name}] is fewer than 32,"
                " and a control block of 8 is a quarter of them."
            )
