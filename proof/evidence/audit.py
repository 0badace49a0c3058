"""
Audit: compares evidence with its plan, and rejects what cannot have come from it.

Every row must be the one that the schedule names, every restart must have been counted or dropped
by the gates alone, and restarts.csv must follow from the rows. The lines of restarts.csv that
follow from audited rows are returned.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from command import CommandError
from proof.evidence.categorical import Categorical
from proof.evidence.gates import ENDED_EARLY, restart_breach
from proof.evidence.readings import read_restart
from proof.evidence.store import UNKNOWN, EvidenceRejected, Requests, RestartRecord, at_level
from proof.plans.new_texts import PREFIX_CHARS
from proof.plans.plan import ONE_IN_FLIGHT, Level, Plan
from proof.plans.plan_file import read_plan
from proof.plans.schedule import (
    CLOSED_LOOP_TEXTS,
    Schedule,
    build_schedule,
    load_order,
    load_positions,
    slice_texts,
)

SAME_NS = 1000
"""Tolerance for scheduled times.

The schedule's arrivals are sums of logarithms, whose last bits depend on the processor.
"""

FEWEST_TO_COMPARE = 8
"""Fewest requests of an arm whose times, taken together, do not occur twice by chance."""


def read_sealed_plan(folder: Path) -> Plan:
    """Return the plan of a run, with the texts in its folder.

    Raise EvidenceRejected if it cannot be read, or if its pilot is not the one that it names.
    """
    try:
        plan = dataclasses.replace(read_plan(folder / "plan.toml"), texts=folder / "texts.txt")
    except CommandError as error:
        raise EvidenceRejected(f"{folder}: {error}") from None
    check_pilot(plan, folder, folder / "pilot.json")
    if (
        plan.texts_sha256 is not None
        and plan.texts.is_file()
        and hashlib.sha256(plan.texts.read_bytes()).hexdigest() != plan.texts_sha256
    ):
        raise EvidenceRejected(f"{plan.texts} does not hold the texts that the plan was made for.")
    return plan


def check_pilot(plan: Plan, of: Path, path: Path) -> None:
    """Reject a plan whose gains and betas are not those of its pilot, the file at `path`.

    `of` is the file or folder that errors name. Raise EvidenceRejected.
    """
    _check_gains(of, plan, _read_pilot(plan, of, path))


def _read_pilot(plan: Plan, of: Path, path: Path) -> Any:
    """Return the pilot of the plan, nothing if it has none.

    Raise EvidenceRejected if it is missing or is not the one that the plan names.
    """
    if plan.pilot is None:
        return {}
    if not path.is_file():
        raise EvidenceRejected(f"{of} has no {path.name}, from which its plan was computed.")
    if hashlib.sha256(path.read_bytes()).hexdigest() != plan.pilot:
        raise EvidenceRejected(f"{path} is not the pilot that the plan was computed from.")
    return read_json(path)


def _check_gains(of: Path, plan: Plan, pilot: Any) -> None:
    """Reject a gain beyond what the pilot measured, and a β that is not the pilot's."""
    for level in plan.levels:
        statistics = _dig(pilot, "levels", level.name, "statistics")
        for metric, gains in level.gains.items():
            for name, gain in gains.items():
                measured = _dig(statistics, f"{metric}.{name}", "gain")
                if gain > 1 and not (isinstance(measured, float) and gain <= measured + 1e-9):
                    raise EvidenceRejected(
                        f"{of}: the gain {gain} of {level.name} {metric} {name} is more than"
                        f" its pilot found ({measured})."
                    )

        for metric, betas in level.betas.items():
            for name, beta in betas.items():
                measured = _dig(statistics, f"{metric}.{name}", "beta")
                if not (isinstance(measured, float) and math.isclose(beta, measured)):
                    raise EvidenceRejected(
                        f"{of}: the β {beta} of {level.name} {metric} {name} is not its pilot's"
                        f" ({measured})."
                    )


def _dig(values: Any, *keys: str) -> Any:
    """Return the value under these nested keys, or None."""
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
    """Return a JSON file of the evidence; EvidenceRejected if it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise EvidenceRejected(f"{path} cannot be read: it is nested too deeply.") from None
    except (OSError, ValueError) as error:
        raise EvidenceRejected(f"{path} cannot be read: {error}.") from None


def check_documents(folder: Path) -> None:
    """Raise EvidenceRejected unless the JSON files of a run hold objects."""
    for name in ("run.json", "environment.json", "identity.json"):
        value = read_json(folder / name)
        if not isinstance(value, dict):
            raise EvidenceRejected(f"{folder / name} holds {type(value).__name__}, not an object.")
    loaded_models(folder)


def check_identity(folder: Path, plan: Plan) -> None:
    """Reject an identity.json that compared other graphs than the arms had loaded."""
    compared, models = read_json(folder / "identity.json"), loaded_models(folder)
    reference = plan.arms[plan.indices("reference")[0]].name
    for name in compared:
        for side, arm in enumerate((reference, name)):
            variant = _dig(models, arm, "variant")
            for part in ("encoder", "head"):
                digests = _dig(compared, name, "variants", variant, part, "digests")
                loaded = _dig(models, arm, f"{part}_digest")
                # Evidence of servers that tell nothing, or of a variant that was not compared.
                if not isinstance(digests, list) or not isinstance(loaded, str):
                    continue
                if len(digests) != 2 or digests[side] != loaded:
                    raise EvidenceRejected(
                        f"{folder / 'identity.json'} compared another {part} of {arm} than"
                        f" environment.json says was loaded ({loaded[:12]})."
                    )


def audit_rows(
    folder: Path,
    plan: Plan,
    starts: Sequence[RestartRecord],
    observe: Callable[[RestartRecord, Mapping[str, Any]], None] = lambda start, rows: None,
) -> list[dict[str, Any]]:
    """Return the lines of restarts.csv that follow from the rows.

    `observe` is called with each restart that counts and its rows, once they are audited. Raise
    EvidenceRejected, naming the contradiction, if rows or starts cannot be what they claim.
    """
    requests = Requests(folder)
    try:
        texts = plan.read_texts()
    except CommandError as error:
        raise EvidenceRejected(f"{folder}: {error}") from None
    unknown = set(requests.restarts) - {start.restart for start in starts}
    if unknown:
        raise EvidenceRejected(
            f"{folder}: restart {min(unknown)} has rows and no line in starts.csv."
        )
    lines: list[dict[str, Any]] = []
    runs: dict[str, None] = {}
    instances: dict[str, int] = {}
    measured_arms: set[str] = set()
    durations: dict[bytes, int] = {}
    counted = 0
    for number, start in enumerate(starts):
        restart = _Restart(folder, plan, start, texts)
        restart.check_order_of_starts(number, counted)
        rows = requests.of(start.restart)
        restart.check_values(rows, runs)
        measured_arms |= set(rows["arm"].unique())
        restart.check_status(rows)
        if start.dropped:
            continue
        counted += 1
        restart.check_instances(instances)
        restart.check_order_of_levels(rows)
        restart.check_durations(rows, durations)
        for level in plan.levels:
            restart.check_schedule(level, at_level(rows, level.name))
            lines += read_restart(plan, level, start.restart, restart.positions, rows)
        observe(start, rows)
    _check_run_name(folder, plan, runs)
    for arm in plan.arms:
        if counted and arm.name not in measured_arms:
            raise EvidenceRejected(f"{folder}: arm {arm.name} has no rows.")
    if counted > plan.restarts:
        raise EvidenceRejected(f"{folder}: {counted} restarts count, the plan has {plan.restarts}.")
    return lines


def _check_run_name(folder: Path, plan: Plan, runs: Mapping[str, None]) -> None:
    """Reject rows of another run than run.json names."""
    name = f"{_dig(read_json(folder / 'run.json'), 'run')}-{plan.digest[:16]}"
    for run in runs:
        if run != name:
            raise EvidenceRejected(f"{folder}: its rows are of run {run}, run.json says {name}.")


def expected_requests(plan: Plan, schedules: Mapping[str, Schedule]) -> dict[str, int | None]:
    """Return the number of requests of each level in a restart; None where time decides it."""
    return {
        level.name: None if level.kind == "capacity" else len(schedules[level.name])
        for level in plan.levels
    }


class _Restart:
    """One restart as its plan has it; each check raises EvidenceRejected."""

    def __init__(
        self, folder: Path, plan: Plan, start: RestartRecord, texts: Sequence[str]
    ) -> None:
        self._name = f"{folder}: restart {start.restart}"
        self._plan = plan
        self._start = start
        self._chars = np.array([len(text) for text in texts])
        self._schedules = {
            level.name: build_schedule(plan, level, start.slot, len(texts)) for level in plan.levels
        }
        self.positions = load_positions(plan, start.slot)
        """Load position of each copy, by its arm."""

    def check_order_of_starts(self, number: int, counted: int) -> None:
        """Reject a restart that is out of order in starts.csv, or was loaded in another order."""
        start = self._start
        if start.restart != number:
            raise EvidenceRejected(
                f"{self._name} is line {number} of starts.csv; restarts are numbered as they were"
                " begun."
            )
        if start.slot != counted:
            raise EvidenceRejected(
                f"{self._name} took slot {start.slot} of the load orders, {counted} was next."
            )
        order = load_order(self._plan, start.slot)
        if start.load_order.split() != [self._plan.arms[i].name for i in order]:
            raise EvidenceRejected(
                f"{self._name} was loaded as {start.load_order}, which is not the plan's order."
            )

    def check_instances(self, instances: dict[str, int]) -> None:
        """Reject a restart that a server of an earlier one answered; add its own servers."""
        restart = self._start.restart
        for instance in self._start.instance.split():
            if instances.setdefault(instance, restart) != restart:
                raise EvidenceRejected(
                    f"{self._name} was answered by the same start of a server as restart"
                    f" {instances[instance]}."
                )

    def check_durations(self, rows: Mapping[str, Any], durations: dict[bytes, int]) -> None:
        """Reject an arm that took exactly the times of an earlier restart; add its own times.

        Hundreds of times in nanoseconds do not repeat by chance, in whatever order they stand.
        """
        columns = [rows["done_ns"] - rows["sent_ns"]]
        if self._plan.server_timing:
            columns.append(rows["inference_us"])
        for arm in self._plan.arms:
            is_arm = rows["arm"] == arm.name
            if int(is_arm.sum()) < FEWEST_TO_COMPARE:
                continue
            for column in columns:
                digest = hashlib.sha256(np.sort(column[is_arm]).tobytes()).digest()
                earlier = durations.setdefault(digest, self._start.restart)
                if earlier != self._start.restart:
                    raise EvidenceRejected(
                        f"{self._name}: {arm.name} took exactly the times of restart {earlier}."
                    )

    def check_order_of_levels(self, rows: Mapping[str, Any]) -> None:
        """Reject levels that overlap, or ran in another order than the plan's."""
        before_ns = 0
        for level in self._plan.levels:
            is_level = rows["level"] == level.name
            if not is_level.any():
                continue
            if rows["scheduled_ns"][is_level].min() < before_ns:
                raise EvidenceRejected(
                    f"{self._name}: level {level.name} began before the one before it was answered."
                )
            before_ns = int(rows["done_ns"][is_level].max())

    def check_values(self, rows: Mapping[str, Any], runs: dict[str, None]) -> None:
        """Reject rows that cannot have come from this plan, or from any clock; add their runs."""
        digest = self._plan.digest[:16]
        for run in rows["run"].unique():
            if not run.endswith(digest):
                raise EvidenceRejected(
                    f"{self._name}: rows of run {run} were made under another plan than plan.toml"
                    f" ({digest})."
                )
            runs[run] = None
        if len(runs) > 1:
            raise EvidenceRejected(
                f"{self._name}: its rows come from {len(runs)} runs, {' and '.join(list(runs)[:2])}"
                " among them."
            )
        levels = {level.name for level in self._plan.levels}
        for name in sorted(set(rows["level"].unique()) - levels):
            raise EvidenceRejected(f"{self._name}: rows of another level than the plan's, {name}.")
        arms = {arm.name for arm in self._plan.arms}
        for name in sorted(set(rows["arm"].unique()) - arms):
            raise EvidenceRejected(f"{self._name}: rows name an arm {name} that the plan has not.")
        for name in ("tokenize_us", "queue_us", "inference_us", "total_us"):
            if not np.isfinite(rows[name]).all():
                raise EvidenceRejected(f"{self._name}: column {name} holds NaN or infinity.")
            if (rows[name] < 0).any():
                raise EvidenceRejected(f"{self._name}: column {name} holds a negative time.")
        cpu_us = rows["inference_cpu_us"]
        if not (np.isfinite(cpu_us) & ((cpu_us >= 0) | (cpu_us == UNKNOWN))).all():
            raise EvidenceRejected(f"{self._name}: column inference_cpu_us holds no time.")
        self._check_work(rows)
        too_early = rows["sent_ns"] < rows["scheduled_ns"]
        if too_early.any() or (rows["done_ns"] <= rows["sent_ns"]).any():
            raise EvidenceRejected(
                f"{self._name}: a row's times run backward (scheduled ≤ sent < done is due)."
            )
        ids = rows["request_id"].tolist()
        if len(set(ids)) != len(ids):
            repeated = Counter(ids).most_common(1)[0][0]
            raise EvidenceRejected(f"{self._name}: the request_id {repeated} occurs twice.")

    def _check_work(self, rows: Mapping[str, Any]) -> None:
        """Reject answers for another amount of work than the same text's under another arm."""
        is_answered = (rows["status"] >= 200) & (rows["status"] <= 299)
        # Servers of two dialects may count tokens in two ways.
        for dialect in sorted({arm.dialect for arm in self._plan.arms}):
            chosen = np.zeros(len(is_answered), bool)
            for arm in self._plan.arms:
                if arm.dialect == dialect:
                    chosen |= rows["arm"] == arm.name
            self._check_tokens(rows, chosen & is_answered)
        if not self._plan.server_timing:
            return
        batch_tokens = rows["batch_tokens"][is_answered]
        if (batch_tokens < rows["tokens"][is_answered]).any():
            raise EvidenceRejected(f"{self._name}: a batch has fewer tokens than its text.")
        if (rows["batch_size"][is_answered] < 1).any() or (rows["bytes"][is_answered] < 1).any():
            raise EvidenceRejected(f"{self._name}: an answer has no batch, or no bytes.")
        unloaded = [level.name for level in self._plan.levels if level.kind in ONE_IN_FLIGHT]
        for name in unloaded:
            if (rows["batch_size"][is_answered & (rows["level"] == name)] != 1).any():
                raise EvidenceRejected(
                    f"{self._name}: a batch of several texts at level {name}, which has one request"
                    " in flight."
                )

    def _check_tokens(self, rows: Mapping[str, Any], chosen: npt.NDArray[np.bool_]) -> None:
        text_ids, tokens = rows["text_id"].copy(), rows["tokens"][chosen]
        for level in self._plan.levels:
            if level.kind == "repeat":  # Each block has a text of its own for each arm.
                is_level = rows["level"] == level.name
                arms = rows["arm"].codes_in([arm.name for arm in self._plan.arms])
                own_texts = rows["block_id"] * len(self._plan.arms) + arms
                text_ids[is_level] = len(self._chars) + own_texts[is_level]
        text_ids = text_ids[chosen]
        order = np.lexsort((tokens, text_ids))
        text_ids, tokens = text_ids[order], tokens[order]
        differs = (text_ids[1:] == text_ids[:-1]) & (tokens[1:] != tokens[:-1])
        if differs.any():
            at = int(np.flatnonzero(differs)[0])
            raise EvidenceRejected(
                f"{self._name}: text {text_ids[at]} has {tokens[at]} and {tokens[at + 1]} tokens;"
                " every arm must read all of a text."
            )

    def check_status(self, rows: Mapping[str, Any]) -> None:
        """Reject a restart that was counted or dropped for another reason than its rows give."""
        start = self._start
        expected = expected_requests(self._plan, self._schedules)
        breach = restart_breach(
            self._plan,
            rows,
            expected,
            start.generator_cpu_share,
            start.throttled_us,
            start.gpu_slowed,
        )
        complete = all(
            (rows["level"] == name).sum() == count
            for name, count in expected.items()
            if count is not None
        )
        broke_off = not complete or start.generator_cpu_share == UNKNOWN
        ended_early = start.dropped in ENDED_EARLY and broke_off
        if _without_numbers(breach) != _without_numbers(start.dropped) and not ended_early:
            raise EvidenceRejected(
                f"{self._name} is {_status(start.dropped)}, its rows say: {_status(breach)}."
            )

    def check_schedule(self, level: Level, rows: Mapping[str, Any]) -> None:
        """Reject rows that differ from their schedule in anything but what was measured."""
        if level.kind == "capacity":
            # In a closed loop a request may overtake another between its number and its sending.
            order = np.lexsort((rows["block_id"], rows["slice_id"]))
            rows = {name: values[order] for name, values in rows.items()}
            expected = self._expected_closed_loop(level, rows)
        else:
            expected = self._expected(level)
        self._check_columns(level, rows, expected)
        if level.kind in ONE_IN_FLIGHT and (rows["sent_ns"][1:] < rows["done_ns"][:-1]).any():
            raise EvidenceRejected(
                f"{self._name}: a request was sent before the one before it was answered."
            )
        if level.kind in ("mixed", "switchback"):
            self._check_scheduled_times(level, rows)
        if level.kind in ("switchback", "capacity"):
            self._check_slices(level, rows)

    def _expected(self, level: Level) -> dict[str, Any]:
        """Return the columns that the schedule of a level determines."""
        schedule = self._schedules[level.name]
        return {
            "slice_id": schedule.slice_id,
            "block_id": schedule.block_id,
            "position": schedule.position,
            "arm": self._arm_names(schedule.arm),
            "text_id": schedule.text,
            "load_position": self._positions_of(schedule.copy),
        }

    def _expected_closed_loop(self, level: Level, rows: Mapping[str, Any]) -> dict[str, Any]:
        """Return the columns that a closed loop determines, given its number of rows."""
        schedule = self._schedules[level.name]
        slice_ids, counts = np.unique(rows["slice_id"], return_counts=True)
        if not np.array_equal(slice_ids, schedule.slice_id):
            raise EvidenceRejected(f"{self._name}: its slices of {level.name} are not the plan's.")
        arms = len(self._plan.claimed_arms) + len(self._plan.indices("delayed"))
        block_ids, text_ids = [], []
        for i, count in enumerate(counts):
            texts = slice_texts(
                self._plan,
                level,
                self._start.slot,
                i // arms,
                len(self._chars),
                CLOSED_LOOP_TEXTS,
            )
            block_ids.append(np.arange(count))
            text_ids.append(texts[np.arange(count) % CLOSED_LOOP_TEXTS])
        return {
            "slice_id": np.repeat(schedule.slice_id, counts),
            "block_id": np.concatenate(block_ids),
            "position": np.repeat(schedule.position, counts),
            "arm": self._arm_names(np.repeat(schedule.arm, counts)),
            "text_id": np.concatenate(text_ids),
            "load_position": np.repeat(self._positions_of(schedule.copy), counts),
        }

    def _arm_names(self, arms: npt.NDArray[np.int64]) -> Categorical:
        return Categorical([arm.name for arm in self._plan.arms], arms)

    def _positions_of(self, copies: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        positions = np.full(len(self._plan.arms), -1)
        positions[list(self.positions)] = list(self.positions.values())
        return positions[copies]

    def _check_columns(
        self, level: Level, rows: Mapping[str, Any], expected: dict[str, Any]
    ) -> None:
        prefix = PREFIX_CHARS if level.kind == "repeat" else 0
        expected["chars"] = self._chars[expected["text_id"]] + prefix
        expected["request_id"] = _request_ids(level, self._start.restart, expected)
        for name, values in expected.items():
            if not (rows[name] == values).all():
                row = int(np.flatnonzero(rows[name] != values)[0])
                raise EvidenceRejected(
                    f"{self._name}: request {rows['request_id'][row]} has {name} {rows[name][row]},"
                    f" the plan {values[row]}."
                )
        is_unknown = ~rows["instance"].isin(self._start.instance.split())
        if is_unknown.any():
            row = int(np.flatnonzero(is_unknown)[0])
            raise EvidenceRejected(
                f"{self._name}: request {rows['request_id'][row]} was answered by"
                f" {rows['instance'][row]}, which starts.csv does not know."
            )

    def _check_scheduled_times(self, level: Level, rows: Mapping[str, Any]) -> None:
        """Reject rows whose offset to the first one of their slice or level is not the plan's."""
        offset_ns = self._schedules[level.name].offset_ns
        scheduled_ns = rows["scheduled_ns"]
        slice_ids = rows["slice_id"]
        groups = slice_ids if level.kind == "switchback" else np.zeros_like(slice_ids)
        begins = np.flatnonzero(np.diff(groups, prepend=groups[0] - 1))
        sizes = np.diff([*begins, len(groups)])
        begin_ns = np.repeat(scheduled_ns[begins] - offset_ns[begins], sizes)
        differs = np.abs(scheduled_ns - begin_ns - offset_ns) > SAME_NS
        if differs.any():
            row = int(np.flatnonzero(differs)[0])
            raise EvidenceRejected(
                f"{self._name}: request {rows['request_id'][row]} was due at another time than the"
                " plan's."
            )

    def _check_slices(self, level: Level, rows: Mapping[str, Any]) -> None:
        """Reject slices that overlap."""
        begins = np.flatnonzero(np.diff(rows["slice_id"], prepend=-1))
        answered_ns = np.maximum.reduceat(rows["done_ns"], begins)
        sent_ns = np.minimum.reduceat(rows["sent_ns"], begins)
        if (sent_ns[1:] < answered_ns[:-1]).any():
            raise EvidenceRejected(
                f"{self._name}: a slice of {level.name} began before the one before it was"
                " answered."
            )


def _request_ids(level: Level, restart: int, columns: Mapping[str, Any]) -> npt.NDArray[np.object_]:
    """Return <level>.<restart>.<slice_id>.<block_id>.<position>, as the load generator does."""

    def format_each(form: str, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.object_]:
        # Few numbers occur often: each is formatted once.
        least = int(numbers.min())
        texts = [form.format(number) for number in range(least, int(numbers.max()) + 1)]
        return np.array(texts, object)[numbers - least]

    ids: npt.NDArray[np.object_] = (
        format_each(f"{level.name}.{restart}.{{}}.", columns["slice_id"])
        + format_each("{}.", columns["block_id"])
        + format_each("{}", columns["position"])
    )
    return ids


def _without_numbers(reason: str) -> str:
    """Return a reason without its numbers, whose last digits depend on the order of summation."""
    return re.sub(r"\d[\d.,%]*", "#", reason)


def _status(dropped: str) -> str:
    return f"dropped ({dropped})" if dropped else "counted"


def check_restarts(folder: Path, expected: Sequence[Mapping[str, Any]]) -> None:
    """Raise EvidenceRejected if restarts.csv is not what follows from the rows."""
    path = folder / "restarts.csv"
    try:
        with path.open(newline="", encoding="utf-8") as file:
            lines = list(csv.DictReader(file))
    except FileNotFoundError:
        raise EvidenceRejected(f"{folder} has no restarts.csv.") from None
    except (OSError, ValueError, csv.Error) as error:
        raise EvidenceRejected(f"{path} cannot be read: {error}.") from None
    if len(lines) != len(expected):
        raise EvidenceRejected(f"{path} has {len(lines)} lines, the rows give {len(expected)}.")
    for line, values in zip(lines, expected, strict=True):
        if not _is_same_line(line, values):
            raise EvidenceRejected(
                f"{path} does not follow from the rows: {values['level']}, restart"
                f" {values['restart']}, {values['arm']}, {values['metric']} {values['statistic']}."
            )


def _is_same_line(line: Mapping[str, str | None], values: Mapping[str, Any]) -> bool:
    for name, value in values.items():
        if name in ("microseconds", "log"):
            if not _is_close(line.get(name), value):
                return False
        elif line.get(name) != str(value):
            return False
    return True


def _is_close(text: str | None, expected: str) -> bool:
    try:
        return math.isclose(float(text or "nan"), float(expected), rel_tol=1e-9, abs_tol=1e-9)
    except ValueError:
        return False
