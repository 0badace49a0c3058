"""Evidence of runs that never took place: latencies drawn from a known law, in the format of real ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from proof import run as runs
from proof.evidence import Row, RowFile, Start, append_start, read_columns
from proof.gates import restart_breach
from proof.plan import Plan, read_plan

PLAN = """
name = "small"
claim = "{claim}"
seed = 7
texts = "{texts}"
arm = [
  {{ name = "bert", role = "reference", artifact = "a" }},
  {{ name = "bert-again", role = "reference", artifact = "a" }},
  {{ name = "drbert", role = "candidate", artifact = "b" }},
  {{ name = "drbert-again", role = "candidate", artifact = "b" }},
{control}
]
[level.unloaded]
restarts = {restarts}
tuples = 60
warm_up_tuples = 2
[level.unloaded.margins.end_to_end]
p50 = 0.02
mean = 0.02
[level.unloaded.margins.inference]
p50 = 0.02
mean = 0.02
p99 = 0.10
"""
CONTROL = '  { name = "drbert-with-decoder", role = "control", artifact = "c" },'


def write_plan(folder: Path, restarts: int = 8, claim: str = "equivalence", control: bool = True) -> Plan:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "texts.txt").write_text("a good film\na bad film\n")
    (folder / "plan.toml").write_text(
        PLAN.format(texts=folder / "texts.txt", restarts=restarts, claim=claim, control=CONTROL if control else "")
    )
    return read_plan(folder / "plan.toml")


def write_evidence(
    folder: Path, *, factors: dict[str, float] | None = None, seed: int = 0, restarts: int = 8, planned: int | None = None,
    noise: float = 0.05, dropped: tuple[int, ...] = (), claim: str = "equivalence", control: bool = True,
    change: Callable[[dict[str, Any]], None] = lambda row: None, sealed: bool = True,
) -> Path:
    """A run in which every arm takes `factors` times 1 ms of inference; in the starts `dropped` one answer is missing."""
    plan = write_plan(folder, planned or restarts, claim, control)
    texts = plan.read_texts()
    rng = np.random.default_rng(seed)
    factors = {"drbert-with-decoder": 1.4} | (factors or {})
    now = kept = 0
    for restart in range(restarts + len(dropped)):
        order = plan.load_order(kept)
        instance = {arm: 1 + 0.003 * rng.standard_normal() for arm in range(len(plan.arms))}
        effect = [1.01, 1.0, 0.995, 0.995, 1.0]
        common = 1 + 0.2 * rng.random()
        rows = RowFile(folder / "rows" / f"{restart:03d}.csv")
        schedule = list(plan.schedule(kept, len(texts)))
        for number, send in enumerate(schedule):
            name = plan.arms[send.arm].name
            position = order.index(send.arm)
            inference = 1000 * factors.get(name, 1.0) * common * instance[send.arm] * effect[position] * np.exp(noise * rng.standard_normal())
            total = inference + 300
            row: dict[str, Any] = {
                "run": f"r-{plan.digest[:16]}", "level": "unloaded", "restart": restart, "instance": f"i{restart}",
                "slice": send.slice, "tuple": send.tuple, "place": send.place,
                "request_id": f"{restart}-{send.tuple}-{send.place}", "arm": name, "load_position": position,
                "text_id": send.text, "chars": len(texts[send.text]), "tokens": 5, "scheduled_ns": now, "sent_ns": now + 1000,
                "done_ns": now + 1000 + int((total + 200) * 1000), "status": 503 if restart in dropped and number == 9 else 200,
                "tokenize_us": 100.0, "queue_us": 50.0, "inference_us": float(inference), "total_us": float(total),
                "batch_size": 1, "batch_tokens": 6, "bytes": 300,
            }
            change(row)
            rows.append(Row(**row))
            now += 50_000_000
        rows.close()
        breach = restart_breach(plan, read_columns(folder / "rows" / f"{restart:03d}.csv"), len(schedule), 0.2, 0)
        loaded = " ".join(plan.arms[i].name for i in order)
        append_start(folder, Start(restart, kept, loaded, f"i{restart}", 3.0, 0.2, 0, breach))
        kept += not breach
    entry = {"run": folder.name, "plan": plan.name, "plan_digest": plan.digest, "number_for_this_plan": 1}
    (folder / "run.json").write_text(json.dumps(entry))
    for name in ("identity.json", "environment.json"):
        (folder / name).write_text("{}")
    if sealed:
        runs.finish(folder)
    return folder
