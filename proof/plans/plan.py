"""
What a proof claims and how it will be measured, fixed before the first request.

The plan's digest goes into every row of evidence. Everything that looks random in a run is a
function of the plan's seed (proof/plans/schedule.py), so two runs of one plan send the same.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from command import BadInput, Unavailable
from proof.plans.dialects import DIALECTS

Claim = Literal["equivalence", "non-inferiority"]
Role = Literal["reference", "candidate", "delayed", "control"]
Kind = Literal["unloaded", "mixed", "switchback", "capacity"]
By = Literal["server", "client"]

METRICS = ("end_to_end", "inference", "time_per_text")
STATISTICS = ("p50", "mean", "p95", "p99")

# What can be claimed where. Under load, interleaved arms share a queue and a slow one delays them
# all, so `mixed` claims the server's own inference time alone; end to end is for slices of one arm.
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
    """Where requests go, if not to the server that the run starts: a server of one's own, or a
    proxy before it.
    """
    model: str | None = None
    dialect: str = "drbert"
    headers_env: str | None = None
    """The environment variable that holds further headers, a `Name: value` a line."""
    by: By = "server"
    """Who delays the delayed arm: the server's model thread, or, at servers that cannot, the client
    after the answer.
    """


@dataclass(frozen=True)
class Level:
    """How requests are sent, and which statistics are claimed with which margin."""

    name: str
    kind: Kind
    percent: int = 0
    """`mixed` and `switchback`: the arrival rate in parts of the reference's capacity."""
    tuples: int = 0
    """`unloaded` and `mixed`: texts, each sent once to every arm; a quarter of them control tuples.
    """
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
    """`switchback`: by how much the queue multiplies a change of service time, measured in the
    pilot.
    """

    @property
    def claimed(self) -> list[tuple[str, str, float]]:
        """(metric, statistic, margin) of everything the verdict covers; log(1 + margin) has the
        gain in it.
        """
        return [
            (m, s, math.expm1(self.gains.get(m, {}).get(s, 1.0) * math.log1p(self.margins[m][s])))
            for m in METRICS
            for s in STATISTICS
            if s in self.margins.get(m, {})
        ]

    @property
    def tightest_margin(self) -> float:
        """The smallest margin before any gain."""
        return min(margin for of_metric in self.margins.values() for margin in of_metric.values())

    def rate_per_s(self, plan: Plan) -> float:
        """Arrivals a second, all arms together; BadInput if the plan does not say what the
        reference can do.
        """
        if not plan.capacity_per_s:
            raise BadInput(
                f"{plan.path}: [level.{self.name}] needs capacity_per_s; `python -m proof capacity"
                f" {plan.path}` measures it."
            )
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
    wait_for_calm_s: float = 0.0
    """How long each restart waits at most for the machine's neighbours to be quiet
    (proof/measuring/steal.py).
    """
    port: int = 8008
    server_cpus: tuple[int, ...] = ()
    generator_cpus: tuple[int, ...] = ()
    restart_command: str | None = None
    """Restarts servers of one's own, in a shell; LOAD_ORDER holds the arms, the first to load
    first.
    """
    instances: bool = False
    """Whether each restart takes further servers behind the arms' urls, which cannot be restarted
    (proof/measuring/pod_instances.py).
    """
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
        return min(
            1.0,
            DELAY_IN_MARGINS
            * min((level.tightest_margin for level in self.levels if level.margins), default=0.0),
        )

    def control_statistics(self, level: Level) -> list[tuple[str, str, float]]:
        """(metric, statistic, margin) of what shows at that level that the delayed arm is told
        apart: one beyond its margin is enough.
        """
        [delayed] = self.indices("delayed")
        if level.kind == "unloaded":
            metric = (
                "inference"
                if self.server_timing and self.arms[delayed].by == "server"
                else "end_to_end"
            )
            return [(metric, name, level.tightest_margin) for name in ("p50", "mean")]
        if level.kind == "mixed":
            return [("inference", name, level.tightest_margin) for name in ("p50", "mean")]
        return level.claimed

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
            texts = [
                line for line in self.texts.read_text(encoding="utf-8").splitlines() if line.strip()
            ]
        except OSError:
            raise Unavailable(
                f"{self.path}: its texts, {self.texts}, cannot be read; give a file with a text a"
                " line."
            ) from None
        except UnicodeDecodeError as error:
            raise BadInput(
                f"{self.path}: its texts, {self.texts}, are not UTF-8 ({error})."
            ) from None
        if (
            self.texts_sha256 is not None
            and hashlib.sha256(self.texts.read_bytes()).hexdigest() != self.texts_sha256
        ):
            raise BadInput(
                f"{self.path}: {self.texts} has changed since the plan was made; its sha256 is not"
                " texts_sha256."
            )
        if not texts:
            raise BadInput(f"{self.path}: its texts, {self.texts}, hold no text.")
        return texts


def measuring_capacity(plan: Plan, slice_s: float) -> Plan:
    """The plan's arms at the level `capacity` and nothing else: what a plan needs to know before it
    can name a rate.
    """
    in_flight = 2 * int(plan.settings.get("DRBERT_MAX_BATCH_SIZE", "16"))
    level = Level(
        "capacity",
        "capacity",
        sets=2,
        slice_s=slice_s,
        in_flight=in_flight,
        margins={"time_per_text": {"mean": 0.02}},
    )
    return replace(plan, levels=(level,))


def plan_for_two(host: str, models: list[str], texts: Path) -> Plan:
    """A look at one running server: its first two models, no restarts, nothing that could be
    claimed.
    """
    roles: tuple[Role, ...] = ("reference", "candidate")
    arms = tuple(
        Arm(name, role, url=host, model=name) for name, role in zip(models, roles, strict=False)
    )
    level = Level("unloaded", "unloaded", tuples=250)
    return Plan(Path("-"), "0" * 64, "look", "equivalence", 0, texts, arms, 1, (level,))
