"""
Plans as TOML files: read with every wrong key named, and written so that they read back the same.
"""

from __future__ import annotations

import hashlib
import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from command import BadInput, Unavailable
from proof.plans.dialects import DIALECTS
from proof.plans.plan import CLAIMABLE, FEWEST_IN_SLICE, MOST_GAIN, Arm, Kind, Level, Plan, Role

LEVEL_KEYS: Mapping[Kind, tuple[str, ...]] = {
    "unloaded": ("tuples", "warm_up_tuples"),
    "mixed": ("tuples", "warm_up_tuples"),
    "switchback": ("slice_requests", "sets"),
    "capacity": ("slice_s", "sets", "in_flight"),
}
"""Keys of a level that say its size, by kind."""


def read_plan(path: Path) -> Plan:
    """The plan in a TOML file; BadInput names the key that is wrong."""
    try:
        raw = path.read_bytes()
        values = tomllib.loads(raw.decode())
    except OSError:
        raise Unavailable(f"The plan {path} cannot be read; examples/plans holds some.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} is not TOML: {error}.") from None
    reader = _Reader(path)
    reader.known(
        values,
        {
            "name",
            "claim",
            "seed",
            "texts",
            "texts_sha256",
            "restarts",
            "wait_for_calm_s",
            "capacity_per_s",
            "pilot",
            "arm",
            "level",
            "server",
            "generator",
        },
        "the plan",
    )
    server, generator = reader.table(values, "server"), reader.table(values, "generator")
    reader.known(server, {"port", "cpus", "settings", "restart", "instances"}, "[server]")
    reader.known(generator, {"cpus"}, "[generator]")
    plan = Plan(
        path=path,
        digest=hashlib.sha256(raw).hexdigest(),
        name=reader.get(values, "name", str),
        claim=reader.get(values, "claim", str, "equivalence"),
        seed=reader.get(values, "seed", int),
        texts=Path(reader.get(values, "texts", str)),
        arms=tuple(reader.arm(table) for table in reader.get(values, "arm", list)),
        restarts=reader.get(values, "restarts", int),
        levels=tuple(
            reader.level(name, table) for name, table in reader.get(values, "level", dict).items()
        ),
        capacity_per_s=reader.number(values, "capacity_per_s", 0.0),
        pilot=reader.optional(values, "pilot"),
        texts_sha256=reader.optional(values, "texts_sha256"),
        wait_for_calm_s=reader.number(values, "wait_for_calm_s", 0.0),
        port=reader.get(server, "port", int, 8008),
        server_cpus=tuple(reader.get(server, "cpus", list, [])),
        generator_cpus=tuple(reader.get(generator, "cpus", list, [])),
        restart_command=reader.optional(server, "restart"),
        instances=reader.flag(server, "instances"),
        settings={
            f"DRBERT_{key.upper()}": str(value)
            for key, value in reader.table(server, "settings").items()
        },
    )
    _check(plan)
    return plan


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
        "capacity_per_s": plan.capacity_per_s,
        "pilot": plan.pilot,
    }
    values |= {key: value for key, value in optional.items() if value}
    values["arm"] = [_changed_fields(arm) for arm in plan.arms]
    values["level"] = {level.name: _level_values(level) for level in plan.levels}
    values["server"] = _server_values(plan)
    values["generator"] = {"cpus": list(plan.generator_cpus)}
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
    values["margins"] = {metric: dict(margins) for metric, margins in level.margins.items()}
    if level.gains:
        values["gains"] = {metric: dict(gains) for metric, gains in level.gains.items()}
    return values


def _server_values(plan: Plan) -> dict[str, Any]:
    values: dict[str, Any] = {"port": plan.port, "cpus": list(plan.server_cpus)}
    values["settings"] = {
        key.removeprefix("DRBERT_").lower(): value for key, value in plan.settings.items()
    }
    if plan.restart_command:
        values["restart"] = plan.restart_command
    if plan.instances:
        values["instances"] = True
    return values


class _Reader:
    """Reads TOML tables and blames keys by name."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def get(self, table: Mapping[str, Any], key: str, kind: type, default: Any = None) -> Any:
        value = table.get(key, default)
        if value is None:
            raise BadInput(f"{self.path}: the key {key!r} is missing.")
        if not isinstance(value, kind) or isinstance(value, bool):
            raise BadInput(f"{self.path}: {key} = {value!r} is not of type {kind.__name__}.")
        return value

    def number(self, table: Mapping[str, Any], key: str, default: float) -> float:
        value = table.get(key, default)
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not 0 <= value < math.inf
        ):
            raise BadInput(f"{self.path}: {key} = {value!r} is no number of 0 or above.")
        return float(value)

    def optional(self, table: Mapping[str, Any], key: str) -> str | None:
        return None if key not in table else str(self.get(table, key, str))

    def flag(self, table: Mapping[str, Any], key: str) -> bool:
        value = table.get(key, False)
        if not isinstance(value, bool):
            raise BadInput(f"{self.path}: {key} = {value!r} is neither true nor false.")
        return value

    def table(self, table: Mapping[str, Any], key: str) -> dict[str, Any]:
        found: dict[str, Any] = self.get(table, key, dict, {})
        return found

    def known(self, table: Any, keys: set[str], where: str) -> None:
        if not isinstance(table, Mapping):
            raise BadInput(f"{self.path}: {where} is {table!r} and no table.")
        unknown = sorted(table.keys() - keys)
        if unknown:
            raise BadInput(
                f"{self.path}: {where} has no key {unknown[0]!r}; known are"
                f" {', '.join(sorted(keys))}."
            )

    def one_of(
        self,
        table: Mapping[str, Any],
        key: str,
        choices: Mapping[str, Any] | tuple[str, ...],
        default: str | None = None,
    ) -> str:
        value = str(self.get(table, key, str, default))
        if value not in choices:
            raise BadInput(
                f"{self.path}: {key} {value!r} is unknown; known are {', '.join(choices)}."
            )
        return value

    def arm(self, table: Any) -> Arm:
        self.known(
            table,
            {"name", "role", "artifact", "url", "model", "dialect", "headers_env", "by"},
            "an [[arm]]",
        )
        name = self.get(table, "name", str)
        if not re.fullmatch(r"[\w.-]+", name):
            raise BadInput(
                f"{self.path}: the arm's name {name!r} may hold letters, digits, '-', '_' and '.'"
                " only."
            )
        return Arm(
            name,
            self.one_of(table, "role", ("reference", "candidate", "delayed", "control")),  # type: ignore[arg-type]
            self.optional(table, "artifact"),
            self.optional(table, "url"),
            self.optional(table, "model"),
            self.one_of(table, "dialect", DIALECTS, "drbert"),
            self.optional(table, "headers_env"),
            self.one_of(table, "by", ("server", "client"), "server"),  # type: ignore[arg-type]
        )

    def level(self, name: str, table: Any) -> Level:
        found = re.fullmatch(r"(unloaded|capacity)|(mixed|switchback)-(50|80)", name)
        if not found or not isinstance(table, dict):
            raise BadInput(
                f"{self.path}: there is no [level.{name}]; known are unloaded, mixed-50, mixed-80,"
                " switchback-50, switchback-80, capacity."
            )
        kind: Kind = found[1] or found[2]  # type: ignore[assignment]
        percent = int(found[3] or 0)
        keys = {
            "unloaded": {"tuples", "warm_up_tuples"},
            "mixed": {"tuples", "warm_up_tuples"},
            "switchback": {"slice_requests", "sets", "gains"},
            "capacity": {"slice_s", "sets", "in_flight"},
        }[kind]
        self.known(table, keys | {"margins"}, f"[level.{name}]")
        level = Level(
            name,
            kind,
            percent,
            tuples=self.get(table, "tuples", int) if "tuples" in keys else 0,
            warm_up_tuples=self.get(table, "warm_up_tuples", int, 20),
            slice_requests=self.get(table, "slice_requests", int, FEWEST_IN_SLICE.get(percent, 0)),
            sets=self.get(table, "sets", int, 1),
            slice_s=self.number(table, "slice_s", 5.0),
            in_flight=self.get(table, "in_flight", int, 32),
            margins=self.by_statistic(table, "margins", name, kind),
            gains=self.by_statistic(table, "gains", name, kind),
        )
        self.check_sizes(level)
        return level

    def by_statistic(
        self, table: Mapping[str, Any], key: str, name: str, kind: Kind
    ) -> dict[str, dict[str, float]]:
        """A table of numbers by metric and statistic, of those that can be claimed at the level."""
        found = self.table(table, key)
        self.known(found, set(CLAIMABLE[kind]), f"{key} of [level.{name}]")
        for metric, of_metric in found.items():
            self.known(of_metric, set(CLAIMABLE[kind][metric]), f"[level.{name}.{key}.{metric}]")
            for statistic, value in of_metric.items():
                fits = isinstance(value, float) and (
                    0 < value < 1 if key == "margins" else value >= 1
                )
                if not fits:
                    raise BadInput(
                        f"{self.path}: {key}.{metric}.{statistic} = {value!r} is not"
                        f" {'between 0 and 1' if key == 'margins' else '1 or above'}."
                    )
        return found

    def check_sizes(self, level: Level) -> None:
        if not level.claimed:
            raise BadInput(f"{self.path}: [level.{level.name}] claims nothing; give it margins.")
        if level.kind in ("unloaded", "mixed") and level.tuples < 4:
            raise BadInput(f"{self.path}: tuples = {level.tuples} is fewer than 4.")
        if level.kind == "switchback" and level.slice_requests < FEWEST_IN_SLICE[level.percent]:
            raise BadInput(
                f"{self.path}: slice_requests = {level.slice_requests} of [level.{level.name}] is"
                f" below {FEWEST_IN_SLICE[level.percent]}, the fewest at that load."
            )
        if level.sets < 1 or level.in_flight < 1 or level.slice_s < 0 or level.warm_up_tuples < 1:
            raise BadInput(
                f"{self.path}: sets, in_flight and warm_up_tuples of [level.{level.name}] are at"
                " least 1."
            )
        for metric, of_metric in level.gains.items():
            for statistic, gain in of_metric.items():
                if gain > MOST_GAIN[level.percent]:
                    raise BadInput(
                        f"{self.path}: gains.{metric}.{statistic} = {gain} is above"
                        f" {MOST_GAIN[level.percent]}, the most that may widen a margin at"
                        f" {level.percent} %."
                    )


def _check(plan: Plan) -> None:
    if plan.claim not in ("equivalence", "non-inferiority"):
        raise BadInput(
            f"{plan.path}: claim {plan.claim!r} is unknown; known are equivalence, non-inferiority."
        )
    names = [arm.name for arm in plan.arms]
    for name in names:
        if names.count(name) > 1:
            raise BadInput(f"{plan.path}: two arms are called {name!r}.")
    if not plan.levels:
        raise BadInput(f"{plan.path}: there is no level; give it a [level.unloaded].")
    if not 0 < plan.port < 65536:
        raise BadInput(f"{plan.path}: port = {plan.port} is no port; give 1 to 65535.")
    if plan.restarts % 4 or plan.restarts < 4:
        raise BadInput(
            f"{plan.path}: restarts = {plan.restarts} is no multiple of 4, so load order cannot be"
            " balanced."
        )
    for cpu in (*plan.server_cpus, *plan.generator_cpus):
        if not isinstance(cpu, int) or cpu < 0:
            raise BadInput(f"{plan.path}: cpus holds {cpu!r}, which is no processor's number.")
    _check_arms(plan)
    _check_delay(plan)
    if plan.indices("control") and not any(level.kind == "unloaded" for level in plan.levels):
        raise BadInput(
            f"{plan.path}: arm {plan.arms[plan.indices('control')[0]].name!r} is a control of the"
            " level unloaded, which this plan has not."
        )
    for level in plan.levels:
        if not plan.server_timing and "inference" in level.margins:
            raise BadInput(
                f"{plan.path}: [level.{level.name}] claims inference time, which only the dialect"
                " drbert tells."
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
    """Raise BadInput unless two arms have the role, and both load the same model."""
    arms = [plan.arms[i] for i in plan.indices(role)]
    if len(arms) != 2:
        raise BadInput(f"{plan.path}: {len(arms)} arms are {role}; each is loaded twice.")
    models = {(arm.artifact, arm.model, arm.dialect) for arm in arms}
    if len(models) > 1:
        raise BadInput(
            f"{plan.path}: the two arms that are {role} name different artifacts, models or"
            " dialects; they are two loads of one."
        )


def _check_arm(path: Path, arm: Arm) -> None:
    """Raise BadInput unless the arm says what to start or whom to call, and how it is asked."""
    if arm.artifact is None and arm.url is None:
        raise BadInput(f"{path}: arm {arm.name!r} needs an artifact to start or a url to call.")
    if arm.artifact and arm.model:
        raise BadInput(
            f"{path}: arm {arm.name!r} names a model beside its artifact; what a run"
            " starts is asked for by the arm's own name."
        )
    if "{model}" in DIALECTS[arm.dialect].path and not arm.model:
        raise BadInput(f"{path}: arm {arm.name!r} speaks {arm.dialect}, whose path needs a model.")
    if arm.url is None and arm.dialect != "drbert":
        raise BadInput(
            f"{path}: arm {arm.name!r} speaks {arm.dialect}; the server that a run starts"
            " speaks drbert."
        )


def _check_instances(plan: Plan, copies: list[Arm]) -> None:
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
                f"{plan.path}: arm {arm.name!r} speaks {arm.dialect}; instances are told apart by"
                " X-Instance-Id, which drbert alone sends."
            )
        if urlsplit(arm.url or "").scheme != "http":
            raise BadInput(
                f"{plan.path}: arm {arm.name!r} is at {arm.url}; instances are asked by their"
                " addresses, which takes http."
            )


def _check_delay(plan: Plan) -> None:
    """Without a delayed arm a run could not show that it would have seen a regression."""
    delayed = [plan.arms[i] for i in plan.indices("delayed")]
    if len(delayed) != 1:
        raise BadInput(
            f"{plan.path}: {len(delayed)} arms are delayed; there is one, the second reference"
            " slowed down, or nothing shows that a regression would be seen."
        )
    [arm] = delayed
    if arm.artifact or arm.url or arm.model:
        raise BadInput(
            f"{plan.path}: the delayed arm {arm.name!r} is no copy of its own; it takes neither"
            " artifact, url nor model."
        )
    if arm.by == "client" and any(level.kind != "unloaded" for level in plan.levels):
        raise BadInput(
            f"{plan.path}: a client's delay loads no queue, so it is a control at the level"
            " unloaded only."
        )
    if arm.by == "server" and not plan.server_timing:
        raise BadInput(
            f'{plan.path}: servers of another dialect cannot delay; say by = "client" for the arm'
            f" {arm.name!r}."
        )
    for level in plan.levels:
        if level.tightest_margin >= plan.delay:
            raise BadInput(
                f"{plan.path}: the delay is {plan.delay:.1%}, three times the tightest margin of"
                f" all levels, and would not be seen at [level.{level.name}], whose tightest is"
                f" {level.tightest_margin:.1%}; claim them in plans of their own."
            )
        if level.tuples and level.tuples < 32:
            raise BadInput(
                f"{plan.path}: tuples = {level.tuples} of [level.{level.name}] is fewer than 32,"
                " and a control block of 8 is a quarter of them."
            )
