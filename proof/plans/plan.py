"""
A plan: what a proof claims and how it is measured, fixed before the first request.

The plan's digest goes into every row of evidence. Everything that looks random in a run is a
function of the plan's seed (proof/plans/schedule.py), so two runs of one plan send the same.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from command import BadInput, Unavailable
from proof.plans.dialects import DIALECTS, DialectName

Claim = Literal["equivalence", "non-inferiority"]
Role = Literal["reference", "candidate", "delayed", "control"]
Kind = Literal["unloaded", "mixed", "switchback", "capacity", "repeat"]
By = Literal["server", "client"]

METRICS = (
    "end_to_end",
    "end_to_end_adjusted",
    "inference",
    "inference_cpu",
    "dilation",
    "time_per_text",
)
ADJUSTED = "end_to_end_adjusted"
DILATION = "dilation"
FROM_SERVER = ("inference", "inference_cpu", ADJUSTED, DILATION)
"""Metrics that need what only our own service reports."""
STATISTICS = ("p50", "mean", "p95", "p99")
MEAN_OF_SLICES = ("p50", "mean")
"""Statistics that a slice has enough requests for (proof/evidence/slices.py)."""

ONE_IN_FLIGHT: tuple[Kind, ...] = ("unloaded", "repeat")
"""Kinds of levels that send a request when the one before it is answered."""
CLAIMABLE: Mapping[Kind, Mapping[str, tuple[str, ...]]] = {
    "unloaded": {
        "end_to_end": STATISTICS,
        "inference": STATISTICS,
        "inference_cpu": STATISTICS,
    },
    "mixed": {"inference": ("p50", "mean"), "inference_cpu": ("p50", "mean")},
    "switchback": {
        "end_to_end": STATISTICS,
        ADJUSTED: ("p50", "mean"),
        "inference_cpu": ("p50", "mean"),
        DILATION: ("mean",),
    },
    "capacity": {"time_per_text": ("mean",)},
    "repeat": {},
}
"""Statistics that can be claimed, by kind of level and metric.

Interleaved arms share a queue, where a slow one delays them all. So `mixed` claims only the
server's own inference time; end to end is for slices of one arm. The CPU time of inference does not
grow when other processes keep the processor busy, so its intervals are narrower. But it does not
see a candidate that waits, so it is claimed next to wall time.

*Dilation* is wall time over CPU time of inference, of all batches of a slice: how much other
processes slowed the engine down. `end_to_end_adjusted` is end to end without what the dilation of
its slice explains. A candidate that waits has a larger dilation, and the adjustment would hide it.
So the adjusted time is claimed only next to a claim that sees waiting: the dilation itself, or the
mean inference time at `mixed`.
"""
NEWEST_SCHEDULE = 2
"""Newest version of the schedule (proof/plans/schedule.py). Plans that name none have version 1."""
FEWEST_RESTARTS = 8
"""Smallest number of restarts that may end in "equivalent"."""
DELAY_IN_MARGINS = 3
"""Slowdown of the delayed arm, in multiples of the plan's tightest margin."""
MOST_GAIN = {1: {50: 1.7, 80: 4.5}, 2: {50: 3.0, 80: 4.5}}
"""Largest gain that may widen a margin, by schedule version and percent of load.

A queue multiplies a slower service time, and the more so the higher the load.
"""
MOST_DILATION = 3.0
"""Largest dilation of a restart whose level adjusts for it; the adjustment is linear."""
FEWEST_IN_SLICES = {50: 300, 80: 1000}
"""Fewest requests in all slices of an arm in a restart, by percent of capacity."""
CONTROL_RUN = 8
"""Consecutive control blocks; one run in four is of control blocks.

In runs they seldom share the queue with plain blocks under load.
"""
PROBE_REQUESTS = 20
"""Requests in each slice of a measurement of busy shares."""
REPEAT_GROUP = 4
"""Texts at the level `repeat` that are sent in turn, and then in turn again.

An answer takes a quarter longer when the one before it had a text of another length (minis: 2.7
and 2.0 ms of CPU). So first answers and repeats must both follow other texts.
"""
FEWEST_IN_SLICE = 10
"""Fewest requests in one slice.

A machine's speed changes within a second, so many short slices compare the arms under the same
conditions better than one long slice. Every slice begins with an empty queue, for every arm.
"""


@dataclass(frozen=True)
class Arm:
    """One loaded copy of a model; the delayed arm is the second reference, slowed down."""

    name: str
    role: Role
    artifact: str | None = None
    """Folder of its artifact, where the run starts the server itself."""
    url: str | None = None
    """URL of a server that the run does not start, or of a proxy in front of one."""
    model: str | None = None
    """Name of the model in requests; needed where a server has several."""
    dialect: DialectName = "drbert"
    """API of the server."""
    headers_env: str | None = None
    """Environment variable that holds further headers, a `Name: value` line for each."""
    by: By = "server"
    """What delays the delayed arm: the server's model thread, or the client after the answer, for
    servers that cannot delay.
    """


@dataclass(frozen=True)
class Level:
    """How requests are sent, and which statistics are claimed with which margin."""

    name: str
    kind: Kind
    percent: int = 0
    """`mixed` and `switchback`: load in percent: the share of time in which the engine is busy. In
    schedule 1, the arrival rate in percent of the reference's capacity.
    """
    rate_per_s: float = 0.0
    """`mixed` and `switchback`, schedule 2: arrivals per second that keep the engine busy for
    `percent`, as `drbert-prove capacity` measures them.
    """
    tuples: int = 0
    """`unloaded` and `mixed`: number of blocks, a quarter of them control blocks."""
    warm_up_tuples: int = 20
    """`unloaded` and `mixed`: number of blocks before those that count."""
    slice_requests: int = 0
    """`switchback`: requests in each slice."""
    sets: int = 1
    """`switchback` and `capacity`: slices of each arm."""
    slice_s: float = 0.0
    """`capacity`: duration of a slice in seconds."""
    in_flight: int = 1
    """`capacity`: requests in flight; twice the server's largest batch."""
    texts: int = 0
    """`repeat`: number of texts, each new to the servers; a multiple of REPEAT_GROUP."""
    repeats: int = 0
    """`repeat`: requests to each arm for a text, after the first one."""
    margins: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Claimed margins by metric and statistic, before any gain."""
    gains: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """`switchback`: factors by which the queue multiplies a change of service time, as the pilot
    measured them.
    """
    betas: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """`switchback`: β of the adjusted metric's statistics, as the pilot measured them: the change
    of a slice's log latency for each unit of its log dilation.
    """

    @property
    def claimed(self) -> list[tuple[str, str, float]]:
        """List (metric, statistic, margin) of everything that the verdict covers.

        A gain widens its margin: log(1 + margin) = gain × log(1 + the plan's margin).
        """
        claims = []
        for metric in METRICS:
            margins, gains = self.margins.get(metric, {}), self.gains.get(metric, {})
            for statistic in STATISTICS:
                if statistic in margins:
                    bound = gains.get(statistic, 1.0) * math.log1p(margins[statistic])
                    claims.append((metric, statistic, math.expm1(bound)))
        return claims

    @property
    def tightest_margin(self) -> float:
        """Smallest margin before any gain."""
        return min(min(margins.values()) for margins in self.margins.values() if margins)

    def requests(self, arms: int) -> int:
        """Return an upper bound of the requests that the level sends in a restart to `arms` arms.

        It is 0 for `capacity`, where time decides.
        """
        closing = self.tuples // 4
        blocks = self.warm_up_tuples + self.tuples + closing if self.tuples else 0
        if self.kind == "repeat":
            blocks = (REPEAT_GROUP + self.texts) * (1 + self.repeats)
        return (blocks + self.slice_requests * self.sets) * arms

    def arrivals_per_s(self, plan: Plan) -> float:
        """Return arrivals per second, of all arms together.

        Raise BadInput if the plan does not state what they are computed from.
        """
        if plan.schedule_version > 1 or self.rate_per_s:
            if not self.rate_per_s:
                raise BadInput(
                    f"{plan.path}: [level.{self.name}] needs rate_per_s; `drbert-prove capacity"
                    f" {plan.path}` measures it."
                )
            return self.rate_per_s
        if not plan.capacity_per_s:
            raise BadInput(
                f"{plan.path}: [level.{self.name}] needs capacity_per_s; `drbert-prove capacity"
                f" {plan.path}` measures it."
            )
        return plan.capacity_per_s * self.percent / 100


@dataclass(frozen=True)
class WorkCount:
    """What a run counts of both artifacts' work, in addition to their time (proof/work)."""

    variant: str = "cpu-fp32"
    lengths: tuple[int, ...] = ()
    """Tokens of the counted texts; empty: as many as the method affords."""
    margin: float = 0.001
    """Largest relative difference of instructions that counts as the same work."""


@dataclass(frozen=True)
class Plan:
    """A claim and its measurement, as read from a TOML file."""

    path: Path
    """File that it was read from."""
    digest: str
    """SHA-256 of that file."""
    name: str
    claim: Claim
    seed: int
    """Seed of everything that looks random in a run."""
    texts: Path
    """File of texts, one on each line."""
    arms: tuple[Arm, ...]
    restarts: int
    """Number of restarts that must count; "invocations" in the benchmarking literature."""
    levels: tuple[Level, ...]
    """Levels in the order of measurement."""
    schedule_version: int = 1
    """Version of the schedule: 1 or NEWEST_SCHEDULE. A published plan keeps its own."""
    capacity_per_s: float = 0.0
    """Texts per second of the reference alone, as `drbert-prove capacity` measures it."""
    texts_sha256: str | None = None
    """SHA-256 of the file of texts; None if the plan does not bind it."""
    pilot: str | None = None
    """SHA-256 of the pilot.json that sizes and gains were computed from."""
    wait_for_calm_s: float = 0.0
    """Longest wait before each restart, in seconds, for other guests of the host to be quiet
    (proof/measuring/steal.py).
    """
    port: int = 8008
    """Port of the server that the run starts."""
    server_cpus: tuple[int, ...] = ()
    generator_cpus: tuple[int, ...] = ()
    variant: str = "auto"
    """Variant of the artifacts that the servers of a run load; auto is the fastest one here."""
    restart_command: str | None = None
    """Shell command that restarts servers which the run does not start.

    The variable LOAD_ORDER holds the arms in the order of loading.
    """
    instances: bool = False
    """Whether each restart takes further servers behind the arms' URLs, because they cannot be
    restarted (proof/measuring/pod_instances.py).
    """
    settings: Mapping[str, str] = field(default_factory=dict)
    """DRBERT_* variables of the servers that the run starts."""
    work: WorkCount | None = None
    """What the run counts of the artifacts' work; None: nothing."""

    @property
    def claimed_arms(self) -> list[int]:
        """Indices of references and candidates, in the plan's order."""
        return [i for i, arm in enumerate(self.arms) if arm.role in ("reference", "candidate")]

    @property
    def judged_levels(self) -> tuple[Level, ...]:
        """Levels that get a verdict: all but `repeat`, which is a check of the others."""
        return tuple(level for level in self.levels if level.kind != "repeat")

    def indices(self, role: Role) -> list[int]:
        """Return the indices of the arms with a role, in the plan's order."""
        return [i for i, arm in enumerate(self.arms) if arm.role == role]

    def level(self, name: str) -> Level:
        """Return the level of that name; StopIteration if there is none."""
        return next(level for level in self.levels if level.name == name)

    @property
    def delay(self) -> float:
        """Share of its own duration by which the delayed arm is slower."""
        margins = [level.tightest_margin for level in self.levels if level.margins]
        return min(1.0, DELAY_IN_MARGINS * min(margins, default=0.0))

    def control_statistics(self, level: Level) -> list[tuple[str, str, float]]:
        """List (metric, statistic, margin) by which a level detects the delayed arm.

        One of them beyond its margin is enough.
        """
        [delayed] = self.indices("delayed")
        if level.kind in ("unloaded", "mixed"):
            by_server = self.server_timing and self.arms[delayed].by == "server"
            metrics = ["inference" if by_server else "end_to_end"]
            if self.schedule_version > 1 and "inference_cpu" in level.margins:
                metrics.append("inference_cpu")
            return [
                (metric, name, level.tightest_margin)
                for metric in metrics
                for name in MEAN_OF_SLICES
            ]
        if self.schedule_version == 1:
            return level.claimed
        # Slices are compared one by one, and have too few requests for tails. A delay is computed,
        # so it does not change the dilation.
        return [
            (metric, name, margin)
            for metric, name, margin in level.claimed
            if metric != DILATION and name in MEAN_OF_SLICES
        ]

    @property
    def server_timing(self) -> bool:
        """Whether every arm's answers report their inference time."""
        return all(DIALECTS[arm.dialect].server_timing for arm in self.arms)

    @property
    def starts_servers(self) -> bool:
        """Whether the run starts the servers itself."""
        return any(arm.artifact for arm in self.arms)

    @property
    def pilot_path(self) -> Path:
        """Path of the pilot next to the plan's file; in the folder of a run it is pilot.json."""
        path = self.path.with_name(f"{self.path.stem}.pilot.json")
        sealed = self.path.with_name("pilot.json")
        return sealed if sealed.is_file() and not path.is_file() else path

    def read_texts(self) -> list[str]:
        """Return the lines of the file of texts that are not blank.

        Raise Unavailable if it cannot be read, BadInput if it has changed or holds no text.
        """
        try:
            lines = self.texts.read_text(encoding="utf-8").splitlines()
        except OSError:
            raise Unavailable(
                f"{self.path}: its texts, {self.texts}, cannot be read; give a file with one text"
                " on each line."
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
        texts = [line for line in lines if line.strip()]
        if not texts:
            raise BadInput(f"{self.path}: its texts, {self.texts}, hold no text.")
        return texts


def measuring_capacity(plan: Plan, slice_s: float) -> Plan:
    """Return the plan with the level `capacity` alone, which measures the base of its rates."""
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


def measuring_busy_share(plan: Plan, kind: Kind, rates: Sequence[float], seconds: float) -> Plan:
    """Return the plan with one level of `kind` for each arrival rate, which measures busy shares.

    `seconds` is the duration of each level.
    """
    levels = []
    for number, rate in enumerate(rates, 1):
        requests = math.ceil(rate * seconds)
        if kind == "mixed":
            blocks = max(4 * CONTROL_RUN, math.ceil(requests / 4))
            level = Level(f"{kind}-{number}", kind, tuples=blocks, rate_per_s=rate)
        else:
            arms = len(plan.claimed_arms) + len(plan.indices("delayed"))
            sets = math.ceil(requests / (PROBE_REQUESTS * arms))
            level = Level(
                f"{kind}-{number}",
                kind,
                slice_requests=PROBE_REQUESTS,
                sets=sets,
                rate_per_s=rate,
            )
        levels.append(level)
    return replace(plan, levels=tuple(levels))
