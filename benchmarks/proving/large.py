"""
The time and memory that the judge takes for a simulated run of 100 restarts × 6 arms × 20,000 rows.
"""

from __future__ import annotations

import hashlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from proof.evidence.answers import ANSWERS, ExpectedAnswers, ExpectedModel
from proof.evidence.store import (
    ROW_FIELDS,
    RestartRecord,
    append_start,
    parquet_options,
    row_schema,
)
from proof.measuring.expected_answers import expected_answer
from proof.measuring.run import finish_run
from proof.plans.plan import Plan
from proof.plans.plan_file import read_plan
from proof.plans.schedule import build_schedule, load_order, load_positions

# 4 × tuples, and 5 × a quarter of them in the closing block: 120,000 rows per restart.
RESTARTS, TUPLES = 100, 22_857
LABELS, SCORES = ["NEGATIVE", "POSITIVE"], [0.1, 0.9]
"""What every text is answered."""

PLAN = """
name = "large"
seed = 1
texts = "{folder}/texts.txt"
restarts = 100
arm = [
  {{ name = "bert", role = "reference", artifact = "a" }}, {{ name = "bert-again", role = \
"reference", artifact = "a" }},
  {{ name = "drbert", role = "candidate", artifact = "b" }}, {{ name = "drbert-again", role = \
"candidate", artifact = "b" }},
  {{ name = "bert-delayed", role = "delayed" }}, {{ name = "drbert-with-decoder", role = \
"control", artifact = "c" }},
]
[level.unloaded]
tuples = {tuples}
[level.unloaded.margins]
end_to_end = {{ p50 = 0.02, mean = 0.02, p95 = 0.03, p99 = 0.05 }}
inference = {{ p50 = 0.02, mean = 0.02, p95 = 0.03, p99 = 0.05 }}
"""


def table() -> str:
    """Return a table with the seconds, memory and verdict of `proof judge` on one processor."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        rows = write(folder, RESTARTS, TUPLES)
        began = time.monotonic()
        done = subprocess.run(
            ["taskset", "-c", "0", sys.executable, "-m", "proof", "judge", str(folder)],
            capture_output=True,
            text=True,
            check=False,
        )
        seconds = time.monotonic() - began
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    lines = (done.stdout or done.stderr).strip().splitlines()
    verdict = next((line for line in lines if line.startswith("verdict: ")), lines[-1])
    verdict = verdict.split(". ")[0]
    return "\n".join(
        [
            "| rows | restarts | seconds on one core | most memory | verdict |",
            "|--:|--:|--:|--:|---|",
            f"| {rows:,} | {RESTARTS} | {seconds:.1f} | {memory:,.0f} MiB | {verdict} |",
        ]
    )


def write(folder: Path, restarts: int, tuples: int) -> int:
    """Write the sealed run to `folder` and return its number of rows."""
    (folder / "texts.txt").write_text("".join(f"text number {i}\n" for i in range(64)))
    (folder / "plan.toml").write_text(
        PLAN.format(folder=folder, tuples=tuples).replace(
            "restarts = 100", f"restarts = {restarts}"
        )
    )
    plan = read_plan(folder / "plan.toml")
    rng = np.random.default_rng(0)
    count = 0
    with pq.ParquetWriter(folder / "requests.parquet", row_schema(), **parquet_options()) as writer:
        for restart in range(restarts):
            rows = _restart(plan, restart, rng)
            count += rows.num_rows
            writer.write_table(rows, row_group_size=rows.num_rows)
            loaded = " ".join(plan.arms[i].name for i in load_order(plan, restart))
            append_start(
                folder, RestartRecord(restart, restart, loaded, f"i{restart}", 3.0, 0.1, 0, "")
            )
    entry = {
        "run": "large",
        "plan": plan.name,
        "plan_digest": plan.digest,
        "number_for_this_plan": 1,
    }
    (folder / "run.json").write_text(json.dumps(entry))
    for name in ("identity.json", "environment.json"):
        (folder / name).write_text("{}")
    (folder / ANSWERS).write_text(_answers(plan).model_dump_json())
    finish_run(folder)
    return count


def _answers(plan: Plan) -> ExpectedAnswers:
    """Return one answer for every text and every artifact."""
    texts = plan.read_texts()
    models = [
        ExpectedModel(
            artifact=arm.artifact or "",
            arms=[other.name for other in plan.arms if other.artifact == arm.artifact],
            variant="cpu-fp32",
            tolerance=0.01,
            answers=[expected_answer(LABELS, SCORES)] * len(texts),
        )
        for arm in {arm.artifact: arm for arm in plan.arms if arm.artifact is not None}.values()
    ]
    texts_sha256 = hashlib.sha256(plan.texts.read_bytes()).hexdigest()
    return ExpectedAnswers(schema_version=1, texts_sha256=texts_sha256, models=models)


def _restart(plan: Plan, restart: int, rng: np.random.Generator) -> pa.Table:
    [level] = plan.levels
    texts = plan.read_texts()
    slots = build_schedule(plan, level, restart, len(texts))
    positions = load_positions(plan, restart)
    count = len(slots)
    answer = expected_answer(LABELS, SCORES)
    factor = np.array([1.0, 1.0, 1.0, 1.0, 1 + plan.delay, 1.4])[slots.arm]
    inference = np.round(5_000_000 * factor * np.exp(0.05 * rng.standard_normal(count))) / 1000
    scheduled = restart * 10**13 + np.arange(count) * 20_000_000
    words = {"run": f"large-{plan.digest[:16]}", "level": level.name, "instance": f"i{restart}"}
    ids = [
        f"{level.name}.{restart}.{s}.{t}.{p}"
        for s, t, p in zip(
            slots.slice_id.tolist(), slots.block_id.tolist(), slots.position.tolist(), strict=True
        )
    ]
    columns = {name: pa.array([word] * count) for name, word in words.items()} | {
        "restart": np.full(count, restart),
        "slice_id": slots.slice_id,
        "block_id": slots.block_id,
        "position": slots.position,
        "request_id": pa.array(ids),
        "arm": pa.array([plan.arms[a].name for a in slots.arm]),
        "load_position": np.array([positions[copy] for copy in slots.copy.tolist()]),
        "text_id": slots.text,
        "chars": np.array([len(text) for text in texts])[slots.text],
        "tokens": np.full(count, 5),
        "scheduled_ns": scheduled,
        "sent_ns": scheduled + 2000,
        "done_ns": scheduled + 2000 + (inference * 1000).astype(np.int64) + 500_000,
        "status": np.full(count, 200),
        "tokenize_us": np.full(count, 90.0),
        "queue_us": np.full(count, 40.0),
        "inference_us": inference,
        "inference_cpu_us": inference,
        "total_us": inference + 300,
        "batch_size": np.ones(count, np.int64),
        "batch_tokens": np.full(count, 6),
        "bytes": np.full(count, 300),
        "batch_id": np.arange(count),
        "first_of_shape": np.zeros(count, np.int64),
        "label": pa.array([answer.label] * count),
        "score": np.full(count, answer.score),
        "score_count": np.full(count, answer.score_count),
        "score_checksum": np.full(count, answer.score_checksum),
    }
    return pa.table([columns[name] for name in ROW_FIELDS], schema=row_schema())
