"""
Holds evidence against its plan: refuses what cannot have come from it.

Every row must be the one the schedule names, every restart must have been counted or dropped by
the gates alone, and restarts.csv must follow from the rows. What passes is returned as those lines.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from command import CommandError
from proof.evidence.categorical import Categorical
from proof.evidence.gates import ENDED_EARLY, restart_breach
from proof.evidence.readings import read_restart
from proof.evidence.store import UNKNOWN, EvidenceRejected, Requests, RestartRecord, at_level
from proof.plans.plan import Level, Plan
from proof.plans.plan_file import read_plan
from proof.plans.schedule import Schedule, build_schedule, load_order, load_positions, slice_texts

# The schedule's arrivals are sums of logarithms, whose last bits are the processor's business.
SAME_NS = 1000


def read_sealed_plan(folder: Path) -> Plan:
    """Return the plan of a run, with the texts in its folder.

    Raise EvidenceRejected if it cannot be read, or if its pilot is not the one that it names.
    """
    try:
        plan = dataclasses.replace(read_plan(folder / "plan.toml"), texts=folder / "texts.txt")
    except CommandError as error:
        raise EvidenceRejected(f"{folder}: {error}") from None
    _check_pilot(folder, plan)
    if (
        plan.texts_sha256 is not None
        and plan.texts.is_file()
        and hashlib.sha256(plan.texts.read_bytes()).hexdigest() != plan.texts_sha256
    ):
        raise EvidenceRejected(f"{plan.texts} does not hold the texts that the plan was made for.")
    return plan


def _check_pilot(folder: Path, plan: Plan) -> None:
    """EvidenceRejected if the pilot is missing or another, or a gain widens a margin beyond what it
    found.
    """
    found: dict[str, Any] = {}
    if plan.pilot is not None:
        pilot = folder / "pilot.json"
        if not pilot.is_file():
            raise EvidenceRejected(f"{folder} has no pilot.json, from which its plan was computed.")
        if hashlib.sha256(pilot.read_bytes()).hexdigest() != plan.pilot:
            raise EvidenceRejected(f"{pilot} is not the pilot that the plan was computed from.")
        found = read_json(pilot)
    for level in plan.levels:
        for metric, of_metric in level.gains.items():
            for name, gain in of_metric.items():
                measured = _dig(
                    found, "levels", level.name, "statistics", f"{metric}.{name}", "gain"
                )
                if gain > 1 and not (isinstance(measured, float) and gain <= measured + 1e-9):
                    raise EvidenceRejected(
                        f"{folder}: the gain {gain} of {level.name} {metric} {name} is more than"
                        f" its pilot found ({measured})."
                    )


def _dig(values: Any, *keys: str) -> Any:
    for key in keys:
        values = values.get(key) if isinstance(values, dict) else None
    return values


def loaded_models(folder: Path) -> dict[str, dict[str, Any]]:
    """Return what each arm had loaded, as /info reported it at the first start.

    Raise EvidenceRejected if environment.json does not hold it.
    """
    models = _dig(read_json(folder / "environment.json"), "server", "models") or {}
    if not isinstance(models, dict) or not all(
        isinstance(model, dict) for model in models.values()
    ):
        raise EvidenceRejected(
            f"{folder / 'environment.json'} does not say in server.models what was loaded."
        )
    return models


def read_json(path: Path) -> Any:
    """A JSON file of the evidence; EvidenceRejected if it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EvidenceRejected(f"{path} cannot be read: {error}.") from None


def audit_rows(folder: Path, plan: Plan, starts: list[RestartRecord]) -> list[dict[str, Any]]:
    """Return the lines of restarts.csv that follow from the rows.

    Raise EvidenceRejected, naming the contradiction, if rows or starts cannot be what they claim.
    """
    requests = Requests(folder)
    try:
        texts = plan.read_texts()
    except CommandError as error:
        raise EvidenceRejected(f"{folder}: {error}") from None
    chars = np.array([len(text) for text in texts])
    unknown = set(requests.restarts) - {start.restart for start in starts}
    if unknown:
        raise EvidenceRejected(
            f"{folder}: restart {min(unknown)} has rows and no line in starts.csv."
        )
    lines: list[dict[str, Any]] = []
    runs: dict[str, None] = {}
    instances: dict[str, int] = {}
    seen: set[str] = set()
    kept = 0
    for place, start in enumerate(starts):
        where = f"{folder}: restart {start.restart}"
        _check_place(where, plan, start, place, kept)
        rows = requests.of(start.restart)
        _check_rows(where, plan, rows, runs)
        seen |= set(rows["arm"].unique())
        schedules = {
            level.name: build_schedule(plan, level, start.slot, len(texts)) for level in plan.levels
        }
        _check_status(where, plan, start, rows, schedules)
        if start.dropped:
            continue
        kept += 1
        _check_instances(where, start, instances)
        _check_order(where, plan, rows)
        positions = load_positions(plan, start.slot)
        for level in plan.levels:
            here = at_level(rows, level.name)
            _check_schedule(
                where, plan, level, start, here, schedules[level.name], chars, positions
            )
            lines += read_restart(plan, level, start.restart, positions, rows)
    for arm in plan.arms:
        if kept and arm.name not in seen:
            raise EvidenceRejected(f"{folder}: arm {arm.name} has no rows.")
    if kept > plan.restarts:
        raise EvidenceRejected(f"{folder}: {kept} restarts count, the plan has {plan.restarts}.")
    return lines


def _check_place(where: str, plan: Plan, start: RestartRecord, place: int, kept: int) -> None:
    """Refuses a restart that is out of order in starts.csv, or was loaded in another order."""
    if start.restart != place:
        raise EvidenceRejected(
            f"{where} is line {place} of starts.csv; restarts are numbered as they were begun."
        )
    if start.slot != kept:
        raise EvidenceRejected(
            f"{where} took slot {start.slot} of the load orders, {kept} was next."
        )
    if start.load_order.split() != [plan.arms[i].name for i in load_order(plan, start.slot)]:
        raise EvidenceRejected(
            f"{where} was loaded as {start.load_order}, which is not the plan's order."
        )


def _check_instances(where: str, start: RestartRecord, instances: dict[str, int]) -> None:
    """Refuses a restart that a server of an earlier one answered; notes its own in `instances`."""
    for instance in start.instance.split():
        if instances.setdefault(instance, start.restart) != start.restart:
            raise EvidenceRejected(
                f"{where} was answered by the same start of a server as restart"
                f" {instances[instance]}."
            )


def expected_requests(plan: Plan, schedules: Mapping[str, Schedule]) -> dict[str, int | None]:
    """How many requests each level has in a restart; None where time decides."""
    return {
        level.name: None if level.kind == "capacity" else len(schedules[level.name])
        for level in plan.levels
    }


def _check_order(where: str, plan: Plan, rows: Mapping[str, Any]) -> None:
    """Refuses levels that ran side by side or in another order than the plan's."""
    before = 0
    for level in plan.levels:
        here = rows["level"] == level.name
        if here.any():
            if rows["scheduled_ns"][here].min() < before:
                raise EvidenceRejected(
                    f"{where}: level {level.name} began before the one before it was answered."
                )
            before = int(rows["done_ns"][here].max())


def _check_rows(where: str, plan: Plan, rows: Mapping[str, Any], runs: dict[str, None]) -> None:
    """Refuses rows that cannot have come from this plan, or from any clock."""
    for run in rows["run"].unique():
        if not run.endswith(plan.digest[:16]):
            raise EvidenceRejected(
                f"{where}: rows of run {run} were made under another plan than plan.toml"
                f" ({plan.digest[:16]})."
            )
        runs[run] = None
    if len(runs) > 1:
        raise EvidenceRejected(
            f"{where}: its rows come from {len(runs)} runs, {' and '.join(list(runs)[:2])} among"
            " them."
        )
    for name in sorted(set(rows["level"].unique()) - {level.name for level in plan.levels}):
        raise EvidenceRejected(f"{where}: rows of another level than the plan's, {name}.")
    for name in sorted(set(rows["arm"].unique()) - {arm.name for arm in plan.arms}):
        raise EvidenceRejected(f"{where}: rows name an arm {name} that the plan has not.")
    for name in ("tokenize_us", "queue_us", "inference_us", "total_us"):
        if not np.isfinite(rows[name]).all():
            raise EvidenceRejected(f"{where}: column {name} holds NaN or infinity.")
        if (rows[name] < 0).any():
            raise EvidenceRejected(f"{where}: column {name} holds a negative time.")
    if (rows["done_ns"] <= rows["sent_ns"]).any() or (rows["sent_ns"] < rows["scheduled_ns"]).any():
        raise EvidenceRejected(
            f"{where}: a row's times run backward (scheduled ≤ sent < done is due)."
        )
    ids = rows["request_id"].tolist()
    if len(set(ids)) != len(ids):
        raise EvidenceRejected(
            f"{where}: the request_id {Counter(ids).most_common(1)[0][0]} occurs twice."
        )


def _check_status(
    where: str,
    plan: Plan,
    start: RestartRecord,
    rows: Mapping[str, Any],
    schedules: Mapping[str, Schedule],
) -> None:
    """Refuses a restart that was counted or dropped against what its rows say."""
    due = expected_requests(plan, schedules)
    breach = restart_breach(
        plan, rows, due, start.generator_cpu_share, start.throttled_us, start.gpu_slowed
    )
    whole = all(
        (rows["level"] == name).sum() == count for name, count in due.items() if count is not None
    )
    early = start.dropped in ENDED_EARLY and (not whole or start.generator_cpu_share == UNKNOWN)
    if _without_numbers(breach) != _without_numbers(start.dropped) and not early:
        raise EvidenceRejected(
            f"{where} is {_status(start.dropped)}, its rows say: {_status(breach)}."
        )


def _check_schedule(
    where: str,
    plan: Plan,
    level: Level,
    start: RestartRecord,
    rows: Mapping[str, Any],
    due: Schedule,
    chars: Any,
    positions: Mapping[int, int],
) -> None:
    """Refuses rows of a counted restart that differ from its schedule in anything but what was
    measured.
    """
    names, places = (
        [arm.name for arm in plan.arms],
        np.array([positions[a] for a in range(len(plan.arms))]),
    )
    if level.kind == "capacity":
        # In a closed loop one request may overtake another between its turn and its start.
        order = np.lexsort((rows["block_id"], rows["slice_id"]))
        rows = {name: values[order] for name, values in rows.items()}
        wanted = _capacity_rows(where, plan, level, start, rows, due, len(chars))
    else:
        wanted = {
            "slice_id": due.slice_id,
            "block_id": due.block_id,
            "position": due.position,
            "arm": Categorical(names, due.arm),
            "text_id": due.text,
            "load_position": places[due.arm],
        }
    wanted |= {"chars": chars[wanted["text_id"]]}
    wanted["request_id"] = _request_ids(level, start.restart, wanted)
    for name, values in wanted.items():
        if not (rows[name] == values).all():
            row = int(np.flatnonzero(rows[name] != values)[0])
            raise EvidenceRejected(
                f"{where}: request {rows['request_id'][row]} has {name} {rows[name][row]}, the plan"
                f" {values[row]}."
            )
    stranger = np.flatnonzero(~rows["instance"].isin(start.instance.split()))
    if len(stranger):
        raise EvidenceRejected(
            f"{where}: request {rows['request_id'][stranger[0]]} was answered by"
            f" {rows['instance'][stranger[0]]}, which starts.csv does not know."
        )
    if level.kind == "unloaded" and (rows["sent_ns"][1:] < rows["done_ns"][:-1]).any():
        raise EvidenceRejected(
            f"{where}: a request was sent before the one before it was answered."
        )
    if level.kind in ("mixed", "switchback"):
        first = rows["slice_id"] if level.kind == "switchback" else np.zeros_like(rows["slice_id"])
        begins = np.flatnonzero(np.diff(first, prepend=first[0] - 1))
        size = np.diff([*begins, len(first)])
        offset = rows["scheduled_ns"] - np.repeat(
            rows["scheduled_ns"][begins] - due.offset_ns[begins], size
        )
        wrong = np.flatnonzero(np.abs(offset - due.offset_ns) > SAME_NS)
        if len(wrong):
            raise EvidenceRejected(
                f"{where}: request {rows['request_id'][wrong[0]]} was due at another time than the"
                " plan's."
            )
    if level.kind in ("switchback", "capacity"):
        begins = np.flatnonzero(np.diff(rows["slice_id"], prepend=-1))
        answered, sent = (
            np.maximum.reduceat(rows["done_ns"], begins),
            np.minimum.reduceat(rows["sent_ns"], begins),
        )
        if (sent[1:] < answered[:-1]).any():
            raise EvidenceRejected(
                f"{where}: a slice of {level.name} began before the one before it was answered."
            )


def _capacity_rows(
    where: str,
    plan: Plan,
    level: Level,
    start: RestartRecord,
    rows: Mapping[str, Any],
    due: Schedule,
    texts: int,
) -> dict[str, Any]:
    """What the rows of a closed loop must say, given how many there are."""
    numbers = np.unique(rows["slice_id"])
    if not np.array_equal(numbers, due.slice_id):
        raise EvidenceRejected(f"{where}: its slices of {level.name} are not the plan's.")
    arms = len(plan.claimed_arms) + len(plan.indices("delayed"))
    positions = load_positions(plan, start.slot)
    counts = [int((rows["slice_id"] == number).sum()) for number in numbers]
    tuples = [np.arange(count) for count in counts]
    return {
        "slice_id": np.repeat(due.slice_id, counts),
        "block_id": np.concatenate(tuples),
        "position": np.repeat(due.position, counts),
        "arm": Categorical([arm.name for arm in plan.arms], np.repeat(due.arm, counts)),
        "text_id": np.concatenate(
            [
                slice_texts(plan, level, start.slot, i // arms, texts, 4096)[t % 4096]
                for i, t in enumerate(tuples)
            ]
        ),
        "load_position": np.repeat([positions[int(a)] for a in due.arm], counts),
    }


def _request_ids(level: Level, restart: int, wanted: Mapping[str, Any]) -> npt.NDArray[np.object_]:
    """<level>.<restart>.<slice>.<tuple>.<place>, as the load generator names its requests."""

    def each(form: str, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.object_]:
        least = int(numbers.min())
        return np.array([form.format(n) for n in range(least, int(numbers.max()) + 1)], object)[
            numbers - least
        ]

    ids: npt.NDArray[np.object_] = (
        each(f"{level.name}.{restart}.{{}}.", wanted["slice_id"])
        + each("{}.", wanted["block_id"])
        + each("{}", wanted["position"])
    )
    return ids


def _without_numbers(reason: str) -> str:
    """A reason without its numbers, whose last digits are the business of whoever adds them up."""
    return re.sub(r"\d[\d.,%]*", "#", reason)


def _status(dropped: str) -> str:
    return f"dropped ({dropped})" if dropped else "counted"


def check_restarts(folder: Path, due: list[dict[str, Any]]) -> None:
    """EvidenceRejected if restarts.csv is not what follows from the rows."""
    path = folder / "restarts.csv"
    try:
        with path.open(newline="", encoding="utf-8") as file:
            found = list(csv.DictReader(file))
    except FileNotFoundError:
        raise EvidenceRejected(f"{folder} has no restarts.csv.") from None
    except (OSError, ValueError) as error:
        raise EvidenceRejected(f"{path} cannot be read: {error}.") from None
    if len(found) != len(due):
        raise EvidenceRejected(f"{path} has {len(found)} lines, the rows give {len(due)}.")
    for has, wants in zip(found, due, strict=True):
        same = all(
            has.get(k) == str(v) for k, v in wants.items() if k not in ("microseconds", "log")
        )
        if not same or not (
            _close(has.get("log"), wants["log"])
            and _close(has.get("microseconds"), wants["microseconds"])
        ):
            raise EvidenceRejected(
                f"{path} does not follow from the rows: {wants['level']}, restart"
                f" {wants['restart']}, {wants['arm']}, {wants['metric']} {wants['statistic']}."
            )


def _close(found: str | None, due: str) -> bool:
    try:
        return math.isclose(float(found or "nan"), float(due), rel_tol=1e-9, abs_tol=1e-9)
    except ValueError:
        return False
