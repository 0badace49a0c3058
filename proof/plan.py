"""
What a proof claims and how it will be measured, fixed before the first request.

The plan's digest goes into every row of evidence. Everything that looks random in a run is a
function of the plan's seed (proof/schedule.py), so two runs of one plan send the same.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from command import BadInput, Unavailable
from proof.dialects import DIALECTS

Claim = Literal["equivalence", "non-inferiority"]
Role = Literal["reference", "candidate", "delayed", "control"]
Kind = Literal["unloaded", "mixed", "switchback", "capacity"]
By = Literal["server", "client"]

METRICS = ("end_to_end", "inference", "time_per_text")
STATISTICS = ("p50", "mean", "p95", "p99")

# What can be claimed where. Under load, interleaved arms share a queue and a slow one delays them all, so `mixed`
# claims the server's own inference time alone; end to end is for slices of one arm.
CLAIMABLE: Mapping[Kind, Mapping[str, tuple[str, ...]]] = {
    "unloaded": {"end_to_end": STATISTICS, "inference": STATISTICS},
    "mixed": {"inference": ("p50", "mean")},
    "switchback": {"end_to_end": STATISTICS},
    "capacity": {"time_per_text": ("mean",)},
}

# The protocol's smallest number of restarts that may end in "equivalent".
FEWEST_RESTARTS = 8
# How many tightest margins the delayed arm is slower by.
DELAY_IN_MARGINS = 3
# A queue makes more of a slower service, but no gain beyond these may widen a margin.
MOST_GAIN = {50: 1.7, 80: 4.5}
# Under heavy load a slice must be long enough for the queue to forget how it began.
FEWEST_IN_SLICE = {50: 300, 80: 1000}


@dataclass(frozen=True)
class Arm:
    """One loaded copy of a model; the delayed arm is the second reference with a busy-wait."""

    name: str
    role: Role
    artifact: str | None = None
    """The folder to load it from, where the run starts the server itself."""
    url: str | None = None
    """Where requests go, if not to the server that the run starts: a server of one's own, or a proxy before it."""
    model: str | None = None
    dialect: str = "drbert"
    headers_env: str | None = None
    """The environment variable that holds further headers, a `Name: value` a line."""
    by: By = "server"
    """Who delays the delayed arm: the server's model thread, or, at servers that cannot, the client after the answer."""


@dataclass(frozen=True)
class Level:
    """How requests are sent, and which statistics are claimed with which margin."""

    name: str
    kind: Kind
    percent: int = 0
    """`mixed` and `switchback`: the arrival rate in parts of the reference's capacity."""
    tuples: int = 0
    """`unloaded` and `mixed`: texts, each sent once to every arm; a quarter of them control tuples."""
    warm_up_tuples: int = 20
    slice_requests: int = 0
    """`switchback`: requests a slice."""
    sets: int = 1
    """`switchback` and `capacity`: how often each arm has a slice."""
    slice_s: float = 0.0
    """`capacity`: how long a slice takes."""
    in_flight: int = 1
    """`capacity`: requests in flight; twice the server's largest batch."""
    margins: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    gains: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """`switchback`: by how much the queue multiplies a change of service time, measured in the pilot."""

    @property
    def claimed(self) -> list[tuple[str, str, float]]:
        """(metric, statistic, margin) of everything the verdict covers; log(1 + margin) has the gain in it."""
        return [
            (m, s, math.expm1(self.gains.get(m, {}).get(s, 1.0) * math.log1p(self.margins[m][s])))
            for m in METRICS for s in STATISTICS if s in self.margins.get(m, {})
        ]

    @property
    def tightest_margin(self) -> float:
        """The smallest margin before any gain."""
        return min(margin for of_metric in self.margins.values() for margin in of_metric.values())

    def rate_per_s(self, plan: Plan) -> float:
        """Arrivals a second, all arms together; BadInput if the plan does not say what the reference can do."""
        if not plan.capacity_per_s:
            raise BadInput(f"{plan.path}: [level.{self.name}] needs capacity_per_s; `python -m proof capacity {plan.path}` measures it.")
        return plan.capacity_per_s * self.percent / 100


@dataclass(frozen=True)
class Plan:
    path: Path
    digest: str
    name: str
    claim: Claim
    seed: int
    texts: Path
    arms: tuple[Arm, ...]
    restarts: int
    levels: tuple[Level, ...]
    capacity_per_s: float = 0.0
    """Texts a second that the reference alone answers: `python -m proof capacity` measures it."""
    texts_sha256: str | None = None
    """Of the file of texts, where the plan binds it."""
    pilot: str | None = None
    """sha256 of the pilot.json beside the plan, from which sizes and gains were computed."""
    port: int = 8008
    server_cpus: tuple[int, ...] = ()
    generator_cpus: tuple[int, ...] = ()
    restart_command: str | None = None
    """Restarts servers of one's own, in a shell; LOAD_ORDER holds the arms, the first to load first."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """DRBERT_* variables of the servers this run starts."""

    @property
    def claimed_arms(self) -> list[int]:
        """Indices of the references and candidates, in the plan's order."""
        return [i for i, arm in enumerate(self.arms) if arm.role in ("reference", "candidate")]

    def indices(self, role: Role) -> list[int]:
        return [i for i, arm in enumerate(self.arms) if arm.role == role]

    def level(self, name: str) -> Level:
        return next(level for level in self.levels if level.name == name)

    @property
    def delay(self) -> float:
        """The share of its own duration by which the delayed arm is slower."""
        return min(1.0, DELAY_IN_MARGINS * min((level.tightest_margin for level in self.levels if level.margins), default=0.0))

    @property
    def server_timing(self) -> bool:
        """Whether every arm's answers say how long inference took."""
        return all(DIALECTS[arm.dialect].server_timing for arm in self.arms)

    @property
    def starts_servers(self) -> bool:
        return any(arm.artifact for arm in self.arms)

    @property
    def pilot_path(self) -> Path:
        return self.path.with_name(f"{self.path.stem}.pilot.json")

    def read_texts(self) -> list[str]:
        try:
            texts = [line for line in self.texts.read_text(encoding="utf-8").splitlines() if line.strip()]
        except OSError:
            raise Unavailable(f"{self.path}: its texts, {self.texts}, cannot be read; give a file with a text a line.") from None
        except UnicodeDecodeError as error:
            raise BadInput(f"{self.path}: its texts, {self.texts}, are not UTF-8 ({error}).") from None
        if self.texts_sha256 is not None and hashlib.sha256(self.texts.read_bytes()).hexdigest() != self.texts_sha256:
            raise BadInput(f"{self.path}: {self.texts} has changed since the plan was made; its sha256 is not texts_sha256.")
        if not texts:
            raise BadInput(f"{self.path}: its texts, {self.texts}, hold no text.")
        return texts


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
        values, {"name", "claim", "seed", "texts", "texts_sha256", "restarts", "capacity_per_s", "pilot", "arm", "level", "server", "generator"}, "the plan"
    )
    server, generator = reader.table(values, "server"), reader.table(values, "generator")
    reader.known(server, {"port", "cpus", "settings", "restart"}, "[server]")
    reader.known(generator, {"cpus"}, "[generator]")
    plan = Plan(
        path=path, digest=hashlib.sha256(raw).hexdigest(),
        name=reader.get(values, "name", str), claim=reader.get(values, "claim", str, "equivalence"),
        seed=reader.get(values, "seed", int), texts=Path(reader.get(values, "texts", str)),
        arms=tuple(reader.arm(table) for table in reader.get(values, "arm", list)),
        restarts=reader.get(values, "restarts", int),
        levels=tuple(reader.level(name, table) for name, table in reader.get(values, "level", dict).items()),
        capacity_per_s=reader.number(values, "capacity_per_s", 0.0), pilot=reader.optional(values, "pilot"),
        texts_sha256=reader.optional(values, "texts_sha256"),
        port=reader.get(server, "port", int, 8008),
        server_cpus=tuple(reader.get(server, "cpus", list, [])), generator_cpus=tuple(reader.get(generator, "cpus", list, [])),
        restart_command=reader.optional(server, "restart"),
        settings={f"DRBERT_{key.upper()}": str(value) for key, value in reader.table(server, "settings").items()},
    )
    _check(plan)
    return plan


def to_toml(plan: Plan, comment: str) -> str:
    """The plan as a file that read_plan reads."""
    def table(values: Mapping[str, Any]) -> str:
        said = {key: table(value) if isinstance(value, Mapping) else json.dumps(value) for key, value in values.items()}
        return "{ " + ", ".join(f"{key} = {value}" for key, value in said.items()) + " }"

    lines = [*(f"# {line}" for line in comment.splitlines()), ""]
    lines += [f"{key} = {json.dumps(value)}" for key, value in (
        ("name", plan.name), ("claim", plan.claim), ("seed", plan.seed), ("texts", str(plan.texts)), ("restarts", plan.restarts),
    )]
    if plan.texts_sha256:
        lines.append(f'texts_sha256 = "{plan.texts_sha256}"')
    if plan.capacity_per_s:
        lines.append(f"capacity_per_s = {plan.capacity_per_s!r}")
    if plan.pilot:
        lines.append(f'pilot = "{plan.pilot}"')
    for arm in plan.arms:
        lines += ["", "[[arm]]"]
        lines += [f"{key} = {json.dumps(value)}" for key, value in vars(arm).items() if value is not None and value != Arm.__dataclass_fields__[key].default]
    for level in plan.levels:
        keys = {
            "unloaded": ("tuples", "warm_up_tuples"), "mixed": ("tuples", "warm_up_tuples"), "switchback": ("slice_requests", "sets"),
            "capacity": ("slice_s", "sets", "in_flight"),
        }[level.kind]
        lines += ["", f"[level.{level.name}]", *(f"{key} = {getattr(level, key)}" for key in keys), f"margins = {table(level.margins)}"]
        if level.gains:
            lines.append(f"gains = {table(level.gains)}")
    settings = {key.removeprefix("DRBERT_").lower(): value for key, value in plan.settings.items()}
    lines += ["", "[server]", f"port = {plan.port}", f"cpus = {list(plan.server_cpus)}", f"settings = {table(settings)}"]
    if plan.restart_command:
        lines.append(f"restart = {json.dumps(plan.restart_command)}")
    return "\n".join([*lines, "", "[generator]", f"cpus = {list(plan.generator_cpus)}"]) + "\n"


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
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise BadInput(f"{self.path}: {key} = {value!r} is no number of 0 or above.")
        return float(value)

    def optional(self, table: Mapping[str, Any], key: str) -> str | None:
        return None if key not in table else str(self.get(table, key, str))

    def table(self, table: Mapping[str, Any], key: str) -> dict[str, Any]:
        found: dict[str, Any] = self.get(table, key, dict, {})
        return found

    def known(self, table: Any, keys: set[str], where: str) -> None:
        if not isinstance(table, Mapping):
            raise BadInput(f"{self.path}: {where} is {table!r} and no table.")
        unknown = sorted(table.keys() - keys)
        if unknown:
            raise BadInput(f"{self.path}: {where} has no key {unknown[0]!r}; known are {', '.join(sorted(keys))}.")

    def one_of(self, table: Mapping[str, Any], key: str, choices: Mapping[str, Any] | tuple[str, ...], default: str | None = None) -> str:
        value = str(self.get(table, key, str, default))
        if value not in choices:
            raise BadInput(f"{self.path}: {key} {value!r} is unknown; known are {', '.join(choices)}.")
        return value

    def arm(self, table: Any) -> Arm:
        self.known(table, {"name", "role", "artifact", "url", "model", "dialect", "headers_env", "by"}, "an [[arm]]")
        name = self.get(table, "name", str)
        if not re.fullmatch(r"[\w.-]+", name):
            raise BadInput(f"{self.path}: the arm's name {name!r} may hold letters, digits, '-', '_' and '.' only.")
        return Arm(
            name, self.one_of(table, "role", ("reference", "candidate", "delayed", "control")),  # type: ignore[arg-type]
            self.optional(table, "artifact"), self.optional(table, "url"), self.optional(table, "model"),
            self.one_of(table, "dialect", DIALECTS, "drbert"), self.optional(table, "headers_env"),
            self.one_of(table, "by", ("server", "client"), "server"),  # type: ignore[arg-type]
        )

    def level(self, name: str, table: Any) -> Level:
        found = re.fullmatch(r"(unloaded|capacity)|(mixed|switchback)-(50|80)", name)
        if not found or not isinstance(table, dict):
            raise BadInput(f"{self.path}: there is no [level.{name}]; known are unloaded, mixed-50, mixed-80, switchback-50, switchback-80, capacity.")
        kind: Kind = found[1] or found[2]  # type: ignore[assignment]
        percent = int(found[3] or 0)
        keys = {
            "unloaded": {"tuples", "warm_up_tuples"}, "mixed": {"tuples", "warm_up_tuples"},
            "switchback": {"slice_requests", "sets", "gains"}, "capacity": {"slice_s", "sets", "in_flight"},
        }[kind]
        self.known(table, keys | {"margins"}, f"[level.{name}]")
        level = Level(
            name, kind, percent,
            tuples=self.get(table, "tuples", int) if "tuples" in keys else 0, warm_up_tuples=self.get(table, "warm_up_tuples", int, 20),
            slice_requests=self.get(table, "slice_requests", int, FEWEST_IN_SLICE.get(percent, 0)), sets=self.get(table, "sets", int, 1),
            slice_s=self.number(table, "slice_s", 5.0), in_flight=self.get(table, "in_flight", int, 32),
            margins=self.by_statistic(table, "margins", name, kind), gains=self.by_statistic(table, "gains", name, kind),
        )
        self.check_sizes(level)
        return level

    def by_statistic(self, table: Mapping[str, Any], key: str, name: str, kind: Kind) -> dict[str, dict[str, float]]:
        """A table of numbers by metric and statistic, of those that can be claimed at the level."""
        found = self.table(table, key)
        self.known(found, set(CLAIMABLE[kind]), f"{key} of [level.{name}]")
        for metric, of_metric in found.items():
            self.known(of_metric, set(CLAIMABLE[kind][metric]), f"[level.{name}.{key}.{metric}]")
            for statistic, value in of_metric.items():
                fits = isinstance(value, float) and (0 < value < 1 if key == "margins" else value >= 1)
                if not fits:
                    raise BadInput(f"{self.path}: {key}.{metric}.{statistic} = {value!r} is not {'between 0 and 1' if key == 'margins' else '1 or above'}.")
        return found

    def check_sizes(self, level: Level) -> None:
        if not level.claimed:
            raise BadInput(f"{self.path}: [level.{level.name}] claims nothing; give it margins.")
        if level.kind in ("unloaded", "mixed") and level.tuples < 4:
            raise BadInput(f"{self.path}: tuples = {level.tuples} is fewer than 4.")
        if level.kind == "switchback" and level.slice_requests < FEWEST_IN_SLICE[level.percent]:
            raise BadInput(f"{self.path}: slice_requests = {level.slice_requests} of [level.{level.name}] is below {FEWEST_IN_SLICE[level.percent]}, the fewest at that load.")
        if level.sets < 1 or level.in_flight < 1 or level.slice_s < 0 or level.warm_up_tuples < 1:
            raise BadInput(f"{self.path}: sets, in_flight and warm_up_tuples of [level.{level.name}] are at least 1.")
        for metric, of_metric in level.gains.items():
            for statistic, gain in of_metric.items():
                if gain > MOST_GAIN[level.percent]:
                    raise BadInput(f"{self.path}: gains.{metric}.{statistic} = {gain} is above {MOST_GAIN[level.percent]}, the most that may widen a margin at {level.percent} %.")


def _check(plan: Plan) -> None:
    if plan.claim not in ("equivalence", "non-inferiority"):
        raise BadInput(f"{plan.path}: claim {plan.claim!r} is unknown; known are equivalence, non-inferiority.")
    names = [arm.name for arm in plan.arms]
    for name in names:
        if names.count(name) > 1:
            raise BadInput(f"{plan.path}: two arms are called {name!r}.")
    if not plan.levels:
        raise BadInput(f"{plan.path}: there is no level; give it a [level.unloaded].")
    if not 0 < plan.port < 65536:
        raise BadInput(f"{plan.path}: port = {plan.port} is no port; give 1 to 65535.")
    if plan.restarts % 4 or plan.restarts < 4:
        raise BadInput(f"{plan.path}: restarts = {plan.restarts} is no multiple of 4, so load order cannot be balanced.")
    for cpu in (*plan.server_cpus, *plan.generator_cpus):
        if not isinstance(cpu, int) or cpu < 0:
            raise BadInput(f"{plan.path}: cpus holds {cpu!r}, which is no processor's number.")
    _check_arms(plan)
    _check_delay(plan)
    if plan.indices("control") and not any(level.kind == "unloaded" for level in plan.levels):
        raise BadInput(f"{plan.path}: arm {plan.arms[plan.indices('control')[0]].name!r} is a control of the level unloaded, which this plan has not.")
    for level in plan.levels:
        if not plan.server_timing and "inference" in level.margins:
            raise BadInput(f"{plan.path}: [level.{level.name}] claims inference time, which only the dialect drbert tells.")


def _check_arms(plan: Plan) -> None:
    twice: tuple[Role, ...] = ("reference", "candidate")
    for role in twice:
        if len(plan.indices(role)) != 2:
            raise BadInput(f"{plan.path}: {len(plan.indices(role))} arms are {role}; each is loaded twice.")
        if len({(plan.arms[i].artifact, plan.arms[i].model, plan.arms[i].dialect) for i in plan.indices(role)}) > 1:
            raise BadInput(f"{plan.path}: the two arms that are {role} name different artifacts, models or dialects; they are two loads of one.")
    copies = [arm for arm in plan.arms if arm.role != "delayed"]
    for arm in copies:
        if arm.artifact is None and arm.url is None:
            raise BadInput(f"{plan.path}: arm {arm.name!r} needs an artifact to start or a url to call.")
        if arm.artifact and arm.model:
            raise BadInput(f"{plan.path}: arm {arm.name!r} names a model beside its artifact; what a run starts is asked for by the arm's own name.")
        if "{model}" in DIALECTS[arm.dialect].path and not arm.model:
            raise BadInput(f"{plan.path}: arm {arm.name!r} speaks {arm.dialect}, whose path needs a model.")
        if arm.url is None and arm.dialect != "drbert":
            raise BadInput(f"{plan.path}: arm {arm.name!r} speaks {arm.dialect}; the server that a run starts speaks drbert.")
    if len({arm.artifact is None for arm in copies}) > 1:
        raise BadInput(f"{plan.path}: some arms name an artifact and some none; either the run starts all of them or none.")


def _check_delay(plan: Plan) -> None:
    """Without a delayed arm a run could not show that it would have seen a regression."""
    delayed = [plan.arms[i] for i in plan.indices("delayed")]
    if len(delayed) != 1:
        raise BadInput(f"{plan.path}: {len(delayed)} arms are delayed; there is one, the second reference slowed down, or nothing shows that a regression would be seen.")
    [arm] = delayed
    if arm.artifact or arm.url or arm.model:
        raise BadInput(f"{plan.path}: the delayed arm {arm.name!r} is no copy of its own; it takes neither artifact, url nor model.")
    if arm.by == "client" and any(level.kind != "unloaded" for level in plan.levels):
        raise BadInput(f"{plan.path}: a client's delay loads no queue, so it is a control at the level unloaded only.")
    if arm.by == "server" and not plan.server_timing:
        raise BadInput(f'{plan.path}: servers of another dialect cannot delay; say by = "client" for the arm {arm.name!r}.')
    for level in plan.levels:
        if level.tightest_margin >= plan.delay:
            raise BadInput(
                f"{plan.path}: the delay is {plan.delay:.1%}, three times the tightest margin of all levels, and would not be seen at [level.{level.name}], "
                f"whose tightest is {level.tightest_margin:.1%}; claim them in plans of their own."
            )
        if level.tuples and level.tuples < 32:
            raise BadInput(f"{plan.path}: tuples = {level.tuples} of [level.{level.name}] is fewer than 32, and a control block of 8 is a quarter of them.")


def measuring_capacity(plan: Plan, slice_s: float) -> Plan:
    """The plan's arms at the level `capacity` and nothing else: what a plan needs to know before it can name a rate."""
    in_flight = 2 * int(plan.settings.get("DRBERT_MAX_BATCH_SIZE", "16"))
    level = Level("capacity", "capacity", sets=2, slice_s=slice_s, in_flight=in_flight, margins={"time_per_text": {"mean": 0.02}})
    return replace(plan, levels=(level,))


def plan_for_two(host: str, models: list[str], texts: Path) -> Plan:
    """A look at one running server: its first two models, no restarts, nothing that could be claimed."""
    arms = tuple(Arm(name, role, url=host, model=name) for name, role in zip(models, ("reference", "candidate"), strict=False))  # type: ignore[arg-type]
    level = Level("unloaded", "unloaded", tuples=250)
    return Plan(Path("-"), "0" * 64, "look", "equivalence", 0, texts, arms, 1, (level,))
