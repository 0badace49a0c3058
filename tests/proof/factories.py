"""Evidence of simulated runs: latencies of a known distribution, in the format of real runs."""

from __future__ import annotations

import atexit
import dataclasses
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from proof.evidence.answers import ExpectedAnswers, ExpectedModel
from proof.evidence.audit import expected_requests
from proof.evidence.gates import restart_breach
from proof.evidence.store import RestartRecord, Row, RowFile, append_start, read_columns
from proof.measuring.expected_answers import expected_answer
from proof.measuring.run import finish_run
from proof.plans.answers import summarize
from proof.plans.new_texts import PREFIX_CHARS
from proof.plans.plan import ONE_IN_FLIGHT, Level, Plan
from proof.plans.plan_file import read_plan
from proof.plans.schedule import Schedule, build_schedule, load_order, load_positions, slice_texts

PLAN = """
name = "small"
claim = "{claim}"
seed = 7
texts = "{texts}"
restarts = {restarts}
{pilot}
schedule_version = {schedule_version}
capacity_per_s = 1000.0
arm = [
  {{ name = "bert", role = "reference", artifact = "a" }},
  {{ name = "bert-again", role = "reference", artifact = "a" }},
  {{ name = "drbert", role = "candidate", artifact = "b" }},
  {{ name = "drbert-again", role = "candidate", artifact = "b" }},
  {{ name = "bert-delayed", role = "delayed" }},
{control}
]
"""
CONTROL = '  { name = "drbert-with-decoder", role = "control", artifact = "c" },'
LEVELS = {
    "unloaded": (
        """
[level.unloaded]
tuples = 64
warm_up_tuples = 2
[level.unloaded.margins.end_to_end]
p50 = 0.02
mean = 0.02
[level.unloaded.margins.inference]
p50 = 0.02
mean = 0.02
p99 = 0.10
"""
    ),
    "unloaded-cpu": (
        """
[level.unloaded]
tuples = 64
warm_up_tuples = 2
margins = { inference = { p50 = 0.05 }, inference_cpu = { p50 = 0.01, mean = 0.01 } }
"""
    ),
    "mixed-50": (
        """
[level.mixed-50]
tuples = 64
warm_up_tuples = 2
margins = { inference = { p50 = 0.02, mean = 0.02 } }
"""
    ),
    "switchback-50": (
        """
[level.switchback-50]
slice_requests = 300
margins = { end_to_end = { p50 = 0.02, mean = 0.02 } }
gains = { end_to_end = { p50 = 1.5 } }
"""
    ),
    "mixed-50-busy": (
        """
[level.mixed-50]
rate_per_s = 400.0
tuples = 64
warm_up_tuples = 2
margins = { inference = { p50 = 0.02, mean = 0.02 } }
"""
    ),
    "short-slices": (
        """
[level.switchback-50]
rate_per_s = 400.0
slice_requests = 20
sets = 16

[level.switchback-50.margins]
end_to_end = { mean = 0.10 }
end_to_end_adjusted = { p50 = 0.02, mean = 0.02 }
dilation = { mean = 0.02 }

[level.switchback-50.gains]
end_to_end_adjusted = { p50 = 1.0, mean = 1.0 }

[level.switchback-50.betas]
end_to_end_adjusted = { p50 = 0.8, mean = 0.8 }
"""
    ),
    "repeat": (
        """
[level.repeat]
texts = 8
repeats = 2
"""
    ),
    "capacity": (
        """
[level.capacity]
slice_s = 0.1
in_flight = 1
margins = { time_per_text = { mean = 0.02 } }
"""
    ),
}
# A gain widens a margin only as far as a pilot found it.
ADJUSTED = {"gain": 1.6, "beta": 0.8}
PILOT = json.dumps(
    {
        "levels": {
            "switchback-50": {
                "statistics": {
                    "end_to_end.p50": {"gain": 1.6},
                    "end_to_end_adjusted.p50": ADJUSTED,
                    "end_to_end_adjusted.mean": ADJUSTED,
                }
            }
        }
    }
)
# Loaded first is slower, as it is in life.
POSITION = (1.01, 1.0, 0.995, 0.995, 1.0)


def write_plan(
    folder: Path,
    restarts: int = 8,
    claim: str = "equivalence",
    control: bool = True,
    levels: tuple[str, ...] = ("unloaded",),
    schedule_version: int = 1,
) -> Plan:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "texts.txt").write_text("a good film\na bad film\n")
    pilot = ""
    if "switchback-50" in levels or "short-slices" in levels:
        (folder / "pilot.json").write_text(PILOT)
        (folder / "plan.pilot.json").write_text(PILOT)
        pilot = f'pilot = "{hashlib.sha256(PILOT.encode()).hexdigest()}"'
    text = PLAN.format(
        pilot=pilot,
        schedule_version=schedule_version,
        texts=folder / "texts.txt",
        restarts=restarts,
        claim=claim,
        control=CONTROL if control and "unloaded" in levels else "",
    )
    (folder / "plan.toml").write_text(text + "".join(LEVELS[name] for name in levels))
    return read_plan(folder / "plan.toml")


def write_evidence(folder: Path, **options: Any) -> Path:
    """Write simulated evidence with the options of `_write_evidence`.

    Evidence that several tests begin with is simulated once and copied.
    """
    if "change" in options or not options.get("sealed", True):
        return _write_evidence(folder, **options)
    key = repr(sorted(options.items()))
    if key not in _CACHE:
        cached = Path(tempfile.mkdtemp()) / "run"
        atexit.register(shutil.rmtree, cached.parent, ignore_errors=True)
        _CACHE[key] = _write_evidence(cached, **options)
    shutil.copytree(_CACHE[key], folder)
    return folder


_CACHE: dict[str, Path] = {}


def _write_evidence(
    folder: Path,
    *,
    factors: Mapping[str, float] | None = None,
    seed: int = 0,
    restarts: int = 8,
    planned: int | None = None,
    noise: float = 0.05,
    dropped: tuple[int, ...] = (),
    claim: str = "equivalence",
    control: bool = True,
    levels: tuple[str, ...] = ("unloaded",),
    schedule_version: int = 1,
    waits: Mapping[str, float] | None = None,
    change: Callable[[dict[str, Any]], None] = lambda row: None,
    sealed: bool = True,
    answers: bool = False,
) -> Path:
    """Write a run whose arms take `factors` times 1 ms of inference.

    In the restarts `dropped` one answer is missing. In schedule 2 each slice is dilated by noise,
    and the arms in `waits` wait for that share of their computing time. `change` may change each
    row. With `answers`, rows hold what their text was answered, as they do since schema 4.
    """
    plan = write_plan(folder, planned or restarts, claim, control, levels, schedule_version)
    texts = plan.read_texts()
    rng = np.random.default_rng(seed)
    factors = dict(factors or {})
    # The delayed arm is a multiple of its copy.
    delayed = factors.pop("bert-delayed", None)
    factors = {"drbert-with-decoder": 1.4} | factors
    waits = waits or {}
    # What a slice's dilation does not change would hide how much of it is adjusted for.
    overhead_us = 300.0 if schedule_version == 1 else 3.0
    now = counted = batch = 0
    for restart in range(restarts + len(dropped)):
        instance = 1 + 0.003 * rng.standard_normal(len(plan.arms))
        common = 1 + 0.2 * rng.random()
        dilations: dict[object, float] = {}
        positions = load_positions(plan, counted)
        rows = RowFile(folder / "rows" / f"{restart:03d}.csv")
        for level in plan.levels:
            for row in _level_rows(plan, level, counted, len(texts), now):
                if level.kind == "capacity":
                    # A closed loop: the next request is sent when the last one is answered.
                    row["scheduled_ns"] = now
                copy = row.pop("copy")
                name = plan.arms[copy].name
                factor = factors.get(name, 1.0)
                if row["arm"] == "bert-delayed":
                    factor = delayed or factor * (1 + plan.delay)
                speed = factor * instance[copy] * POSITION[positions[copy]]
                computed = 1000 * speed * common * np.exp(noise * rng.standard_normal())
                inference = computed * (1 + waits.get(name, 0.0))
                batch += 1
                if schedule_version > 1:
                    key = level.name, row["slice_id"]
                    if key not in dilations:
                        dilations[key] = float(np.exp(abs(0.1 * rng.standard_normal())))
                    inference *= dilations[key]
                    row |= {"inference_cpu_us": float(computed), "batch_id": batch}
                total = inference + overhead_us
                latency_us = total + overhead_us * 2 / 3
                row |= {
                    "run": f"{folder.name}-{plan.digest[:16]}",
                    "restart": restart,
                    "instance": f"i{restart}",
                    "request_id": (
                        f"{level.name}.{restart}.{row['slice_id']}.{row['block_id']}.{row['position']}"
                    ),
                    "load_position": positions[copy],
                    "chars": len(texts[row["text_id"]]) + PREFIX_CHARS * (level.kind == "repeat"),
                    "tokens": 5,
                    "sent_ns": row["scheduled_ns"] + 1000,
                    "done_ns": row["scheduled_ns"] + 1000 + int(latency_us * 1000),
                    "status": 200,
                    "tokenize_us": overhead_us / 3,
                    "queue_us": overhead_us / 6,
                    "inference_us": float(inference),
                    "total_us": float(total),
                    "batch_size": 1,
                    "batch_tokens": 6,
                    "bytes": 300,
                }
                row |= answer_columns(row["text_id"]) if answers else {}
                if restart in dropped and level is plan.levels[0] and row["block_id"] == 9:
                    row["status"] = 503
                change(row)
                rows.append(Row(**row))
                now = max(now, row["done_ns"])
            now += 50_000_000
        rows.close()
        schedules = {
            level.name: build_schedule(plan, level, counted, len(texts)) for level in plan.levels
        }
        expected = expected_requests(plan, schedules)
        breach = restart_breach(plan, read_columns(rows.path), expected, 0.2, 0)
        order = " ".join(plan.arms[i].name for i in load_order(plan, counted))
        start = RestartRecord(restart, counted, order, f"i{restart}", 3.0, 0.2, 0, breach)
        append_start(folder, start)
        counted += not breach
    _write_documents(folder, plan)
    if answers:
        write_answers(folder, plan)
    if sealed:
        finish_run(folder)
    return folder


def _write_documents(folder: Path, plan: Plan) -> None:
    (folder / "plan.pilot.json").unlink(missing_ok=True)
    entry = {
        "run": folder.name,
        "plan": plan.name,
        "plan_digest": plan.digest,
        "number_for_this_plan": 1,
    }
    (folder / "run.json").write_text(json.dumps(entry))
    for name in ("identity.json", "environment.json"):
        (folder / name).write_text("{}")


SCORES = (
    [("NEGATIVE", 0.2), ("POSITIVE", 0.8)],
    [("NEGATIVE", 0.505), ("POSITIVE", 0.495)],
)
"""The scores of "a good film", and of "a bad film", whose labels are close to each other."""


def answer_columns(text_id: int) -> dict[str, Any]:
    """Return the columns of a row that hold its answer."""
    answer = dataclasses.asdict(summarize(SCORES[text_id]))
    del answer["tokens"]
    return answer


def write_answers(folder: Path, plan: Plan) -> None:
    """Write answers.json, as if every artifact gave the SCORES within 0.01."""
    arms: dict[str, list[str]] = {}
    for arm in plan.arms:
        if arm.artifact is not None:
            arms.setdefault(arm.artifact, []).append(arm.name)
    expected = [expected_answer(*map(list, zip(*scores, strict=True))) for scores in SCORES]
    models = [
        ExpectedModel(
            artifact=name, arms=names, variant="cpu-fp32", tolerance=0.01, answers=expected
        )
        for name, names in arms.items()
    ]
    texts_sha256 = hashlib.sha256((folder / "texts.txt").read_bytes()).hexdigest()
    answers = ExpectedAnswers(schema_version=1, texts_sha256=texts_sha256, models=models)
    (folder / "answers.json").write_text(answers.model_dump_json())


def _level_rows(
    plan: Plan, level: Level, slot: int, texts: int, now: int
) -> Iterator[dict[str, Any]]:
    """Yield what the schedule determines of each row, from the time `now` on."""
    schedule = build_schedule(plan, level, slot, texts)
    if level.kind == "capacity":
        arms = len(plan.claimed_arms) + 1
        for i in range(len(schedule)):
            text_ids = slice_texts(plan, level, slot, i // arms, texts, 40)
            for number, text_id in enumerate(text_ids):
                at_ns = now + (i * 40 + number) * 2_000_000
                row = _scheduled_row(plan, level, schedule, i, at_ns)
                yield row | {"block_id": number, "text_id": int(text_id)}
        return
    begin = now
    for i in range(len(schedule)):
        if level.kind in ONE_IN_FLIGHT:
            yield _scheduled_row(plan, level, schedule, i, now + i * 5_000_000)
        elif level.kind == "mixed":
            yield _scheduled_row(plan, level, schedule, i, now + int(schedule.offset_ns[i]))
        else:
            if i and schedule.slice_id[i] != schedule.slice_id[i - 1]:
                begin += int(schedule.offset_ns[i - 1]) + 100_000_000
            yield _scheduled_row(plan, level, schedule, i, begin + int(schedule.offset_ns[i]))


def _scheduled_row(
    plan: Plan, level: Level, schedule: Schedule, i: int, scheduled_ns: int
) -> dict[str, Any]:
    return {
        "level": level.name,
        "slice_id": int(schedule.slice_id[i]),
        "block_id": int(schedule.block_id[i]),
        "position": int(schedule.position[i]),
        "arm": plan.arms[int(schedule.arm[i])].name,
        "copy": int(schedule.copy[i]),
        "text_id": int(schedule.text[i]),
        "scheduled_ns": scheduled_ns,
    }
