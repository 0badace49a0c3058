"""
Runs a plan: restart after restart, seal, judge, report.

    plan → [start servers → Locust → rows → gates] × restarts → seal → judge → report
"""

from __future__ import annotations

import datetime
import fcntl
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

from tqdm import tqdm

from command import BadInput
from proof import identity, report
from proof.evidence import Start, append_start, read_rows, read_starts, seal, write_csv, write_manifest
from proof.gates import MOST_DROPPED, restart_breach
from proof.judge import RESTART_COLUMNS, judge, read_samples, restart_table
from proof.plan import Plan, read_plan
from proof.servers import generate, server, throttled_us


def run(path: Path, evidence: Path) -> tuple[Path, dict[str, Any]]:
    """Carries out the plan and returns the sealed folder and the verdict."""
    plan = read_plan(path)
    if any(arm.url for arm in plan.arms):
        raise BadInput(f"{path}: `proof run` restarts servers, so every arm names an artifact; arms with a url are for locust itself.")
    plan.read_texts()
    now = datetime.datetime.now(datetime.UTC)
    folder = evidence / f"{now:%Y%m%d-%H%M%S}-{plan.name}"
    name = f"{folder.name}-{plan.digest[:16]}"
    result = _compare_arms(plan)
    folder.mkdir(parents=True)
    _remember(evidence, folder, plan)
    shutil.copy(path, folder / "plan.toml")
    shutil.copy(plan.texts, folder / "texts.txt")
    _write_json(folder / "identity.json", result)

    planned = plan.level.restarts
    most = planned + int(planned * MOST_DROPPED / (1 - MOST_DROPPED)) + 1
    attempt, environment = 0, None
    with tqdm(total=planned, desc=plan.name, unit="restart") as bar:
        for slot in range(planned):
            while attempt < most:
                start, info = _restart(plan, attempt, slot, name, folder)
                environment = environment or _environment(plan, info)
                append_start(folder, start)
                attempt += 1
                if not start.dropped:
                    bar.update()
                    break
                tqdm.write(f"restart {start.restart} is dropped and repeated: {start.dropped}")
    _write_json(folder / "environment.json", environment or {})
    return folder, finish(folder)


def finish(folder: Path) -> dict[str, Any]:
    """Seals the rows of a run and adds what follows from them: restarts.csv, verdict, report, manifest."""
    seal(folder)
    plan = read_plan(folder / "plan.toml")
    samples = read_samples(folder, plan, read_starts(folder))
    write_csv(folder / "restarts.csv", RESTART_COLUMNS, restart_table(plan, samples))
    verdict = judge(folder, sealed=False)
    _write_json(folder / "verdict.json", verdict)
    report.write(folder, verdict)
    write_manifest(folder)
    return verdict


def _restart(plan: Plan, attempt: int, slot: int, name: str, folder: Path) -> tuple[Start, dict[str, Any]]:
    order = plan.load_order(slot)
    rows, facts, log = folder / "rows" / f"{attempt:03d}.csv", folder / "facts.json", folder / "run.log"
    began, throttled = datetime.datetime.now(), throttled_us()
    with server(plan, order, log) as info:
        generate(plan, attempt, slot, name, rows, facts, log)
    throttled = throttled_us() - throttled
    share = float(json.loads(facts.read_text())["generator_cpu_share"]) if facts.exists() else 0.0
    facts.unlink(missing_ok=True)
    start = Start(
        restart=attempt, slot=slot, load_order=" ".join(plan.arms[i].name for i in order), instance=info["instance_id"],
        seconds=round((datetime.datetime.now() - began).total_seconds(), 3), generator_cpu_share=round(share, 4),
        throttled_us=throttled, dropped=restart_breach(plan, read_rows(rows), share, throttled),
    )
    return start, info


def _compare_arms(plan: Plan) -> dict[str, Any]:
    """Identity of the reference with the candidate and with each control; also refuses broken artifacts before anything runs."""
    reference = Path(plan.arms[plan.indices("reference")[0]].artifact or "")
    others = [plan.indices("candidate")[0], *plan.indices("control")]
    return {plan.arms[i].name: identity.compare(reference, Path(plan.arms[i].artifact or "")) for i in others}


def _environment(plan: Plan, info: dict[str, Any]) -> dict[str, Any]:
    packages = ("openvino", "onnxruntime", "tokenizers", "fastapi", "uvicorn", "locust", "numpy", "scipy")
    return {
        "processor": _processor(), "processors": os.cpu_count(), "system": platform.platform(), "python": platform.python_version(),
        "server_cpus": list(plan.server_cpus), "generator_cpus": list(plan.generator_cpus),
        "packages": {name: importlib.metadata.version(name) for name in packages},
        "commit": _commit(), "server": {key: value for key, value in info.items() if key not in ("instance_id", "started")},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def _commit() -> str | None:
    try:
        found = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def _remember(evidence: Path, folder: Path, plan: Plan) -> None:
    """Adds the run to evidence/index.json before it begins: a run that ended badly is not forgotten."""
    path = evidence / "index.json"
    with (evidence / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        runs = json.loads(path.read_text()) if path.exists() else []
        number = 1 + sum(entry["plan_digest"] == plan.digest for entry in runs)
        runs.append({"run": folder.name, "plan": plan.name, "plan_digest": plan.digest, "number_for_this_plan": number})
        _write_json(path, runs)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
