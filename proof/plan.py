"""
What a proof claims and how it will be measured, fixed before the first request.

The plan's digest goes into every row of evidence. Everything that looks random in a run
(orders, texts, pauses) is a function of the plan's seed, so two runs of one plan send the same.
Nothing heavy is imported here: the load generator reads plans too.
"""

from __future__ import annotations

import hashlib
import random
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from command import BadInput, Unavailable
from proof.squares import balanced_orders

Claim = Literal["equivalence", "non-inferiority"]
Role = Literal["reference", "candidate", "control"]
METRICS = ("end_to_end", "inference")
STATISTICS = ("p50", "mean", "p95", "p99")
UNLOADED = "unloaded"

# The protocol's smallest number of restarts that may end in "equivalent".
FEWEST_RESTARTS = 8


@dataclass(frozen=True)
class Arm:
    """One loaded copy of a model."""

    name: str
    role: Role
    artifact: str | None = None
    """The folder to load it from, where the run starts the server itself."""
    url: str | None = None
    """Where it answers, where it is a server of one's own."""
    model: str | None = None


@dataclass(frozen=True)
class Level:
    """How requests are sent, and which statistics are claimed with which margin."""

    name: str
    restarts: int
    tuples: int
    warm_up_tuples: int
    margins: Mapping[str, Mapping[str, float]]

    @property
    def claimed(self) -> list[tuple[str, str, float]]:
        """(metric, statistic, margin) of everything the verdict covers."""
        return [(m, s, self.margins[m][s]) for m in METRICS for s in STATISTICS if s in self.margins.get(m, {})]

    @property
    def tightest_margin(self) -> float:
        return min(margin for _, _, margin in self.claimed)


@dataclass(frozen=True)
class Send:
    """One request of a schedule."""

    slice: int
    """-1 warm-up, 0 the claim, 1 the control's closing block."""
    tuple: int
    place: int
    arm: int
    text: int
    pause: float
    """Wait after the answer, in service times."""


@dataclass(frozen=True)
class Plan:
    path: Path
    digest: str
    name: str
    claim: Claim
    seed: int
    texts: Path
    arms: tuple[Arm, ...]
    level: Level
    port: int = 8008
    server_cpus: tuple[int, ...] = ()
    generator_cpus: tuple[int, ...] = ()
    settings: Mapping[str, str] = field(default_factory=dict)
    """DRBERT_* variables of the servers this run starts."""

    @property
    def claimed_arms(self) -> list[int]:
        """Indices of the references and candidates, in the plan's order."""
        return [i for i, arm in enumerate(self.arms) if arm.role != "control"]

    def indices(self, role: Role) -> list[int]:
        return [i for i, arm in enumerate(self.arms) if arm.role == role]

    def load_order(self, slot: int) -> list[int]:
        """Arms in the order they are loaded in that restart: over every four each arm has each position once; controls come last."""
        arms = self.claimed_arms
        orders = balanced_orders(len(arms), self._random("load", slot // len(arms)))
        return [arms[i] for i in orders[slot % len(arms)]] + self.indices("control")

    def schedule(self, slot: int, texts: int) -> Iterator[Send]:
        """The requests of one restart, in order."""
        rng = self._random("requests", slot)
        everyone = list(range(len(self.arms)))
        blocks = [(-1, everyone, self.level.warm_up_tuples), (0, self.claimed_arms, self.level.tuples)]
        if self.indices("control"):
            blocks.append((1, everyone, max(1, self.level.tuples // 4)))
        number = 0
        for block, arms, tuples in blocks:
            orders: list[list[int]] = []
            for _ in range(tuples):
                if not orders:
                    orders = balanced_orders(len(arms), rng)
                # Warming up goes through all texts, so that no shape is met first while it is measured.
                text = number % texts if block < 0 else rng.randrange(texts)
                for place, i in enumerate(orders.pop()):
                    yield Send(block, number, place, arms[i], text, rng.uniform(0.5, 1.5))
                number += 1

    def read_texts(self) -> list[str]:
        try:
            texts = [line for line in self.texts.read_text(encoding="utf-8").splitlines() if line.strip()]
        except OSError:
            raise Unavailable(f"{self.path}: its texts, {self.texts}, cannot be read; give a file with a text a line.") from None
        if not texts:
            raise BadInput(f"{self.path}: its texts, {self.texts}, hold no text.")
        return texts

    def _random(self, *what: object) -> random.Random:
        return random.Random(f"{self.seed} {what}")


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
    reader.known(values, {"name", "claim", "seed", "texts", "arm", "level", "server", "generator"}, "the plan")
    server = reader.table(values, "server")
    generator = reader.table(values, "generator")
    reader.known(server, {"port", "cpus", "settings"}, "[server]")
    reader.known(generator, {"cpus"}, "[generator]")
    plan = Plan(
        path=path, digest=hashlib.sha256(raw).hexdigest(),
        name=reader.get(values, "name", str), claim=reader.get(values, "claim", str, "equivalence"),
        seed=reader.get(values, "seed", int), texts=Path(reader.get(values, "texts", str)),
        arms=tuple(reader.arm(table) for table in reader.get(values, "arm", list)),
        level=reader.level(reader.table(values, "level")),
        port=reader.get(server, "port", int, 8008),
        server_cpus=tuple(reader.get(server, "cpus", list, [])), generator_cpus=tuple(reader.get(generator, "cpus", list, [])),
        settings={f"DRBERT_{key.upper()}": str(value) for key, value in reader.table(server, "settings").items()},
    )
    _check(plan)
    return plan


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

    def table(self, table: Mapping[str, Any], key: str) -> dict[str, Any]:
        found: dict[str, Any] = self.get(table, key, dict, {})
        return found

    def known(self, table: Mapping[str, Any], keys: set[str], where: str) -> None:
        unknown = sorted(table.keys() - keys)
        if unknown:
            raise BadInput(f"{self.path}: {where} has no key {unknown[0]!r}; known are {', '.join(sorted(keys))}.")

    def arm(self, table: Any) -> Arm:
        self.known(table, {"name", "role", "artifact", "url", "model"}, "an [[arm]]")
        role = self.get(table, "role", str)
        if role not in ("reference", "candidate", "control"):
            raise BadInput(f"{self.path}: role {role!r} is unknown; known are reference, candidate, control.")
        return Arm(self.get(table, "name", str), role, table.get("artifact"), table.get("url"), table.get("model"))

    def level(self, levels: dict[str, Any]) -> Level:
        self.known(levels, {UNLOADED}, "[level]")
        table = self.table(levels, UNLOADED)
        self.known(table, {"restarts", "tuples", "warm_up_tuples", "margins"}, f"[level.{UNLOADED}]")
        margins = self.table(table, "margins")
        self.known(margins, set(METRICS), "margins")
        for metric, of_metric in margins.items():
            self.known(of_metric, set(STATISTICS), f"margins.{metric}")
            for statistic, margin in of_metric.items():
                if not isinstance(margin, float) or not 0 < margin < 1:
                    raise BadInput(f"{self.path}: margins.{metric}.{statistic} = {margin!r} is not between 0 and 1.")
        level = Level(
            UNLOADED, self.get(table, "restarts", int), self.get(table, "tuples", int),
            self.get(table, "warm_up_tuples", int, 20), margins,
        )
        if not level.claimed:
            raise BadInput(f"{self.path}: the level claims nothing; give it margins.")
        return level


def _check(plan: Plan) -> None:
    if plan.claim not in ("equivalence", "non-inferiority"):
        raise BadInput(f"{plan.path}: claim {plan.claim!r} is unknown; known are equivalence, non-inferiority.")
    names = [arm.name for arm in plan.arms]
    for name in names:
        if names.count(name) > 1:
            raise BadInput(f"{plan.path}: two arms are called {name!r}.")
    twice: tuple[Role, ...] = ("reference", "candidate")
    for role in twice:
        if len(plan.indices(role)) != 2:
            raise BadInput(f"{plan.path}: {len(plan.indices(role))} arms are {role}; each is loaded twice.")
        if len({(plan.arms[i].artifact, plan.arms[i].url, plan.arms[i].model) for i in plan.indices(role) if plan.arms[i].artifact}) > 1:
            raise BadInput(f"{plan.path}: the two arms that are {role} name different artifacts; they are two loads of one.")
    for arm in plan.arms:
        if (arm.artifact is None) == (arm.url is None):
            raise BadInput(f"{plan.path}: arm {arm.name!r} needs either an artifact to start or a url to call.")
    if plan.level.restarts % 4 or plan.level.restarts < 4:
        raise BadInput(f"{plan.path}: restarts = {plan.level.restarts} is no multiple of 4, so load order cannot be balanced.")
    for cpu in (*plan.server_cpus, *plan.generator_cpus):
        if not isinstance(cpu, int) or cpu < 0:
            raise BadInput(f"{plan.path}: cpus holds {cpu!r}, which is no processor's number.")
    if plan.level.tuples < 4:
        raise BadInput(f"{plan.path}: tuples = {plan.level.tuples} is fewer than 4.")


def plan_for_two(host: str, models: list[str], texts: Path) -> Plan:
    """A look at one running server: its first two models, no restarts, nothing that could be claimed."""
    arms = tuple(Arm(name, role, url=host, model=name) for name, role in zip(models, ("reference", "candidate"), strict=False))  # type: ignore[arg-type]
    level = Level(UNLOADED, 1, 250, 20, {})
    return Plan(Path("-"), "0" * 64, "look", "equivalence", 0, texts, arms, level)
