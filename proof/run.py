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
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from command import BadInput
from proof import identity, report
from proof.evidence import REQUESTS, Start, append_start, read_columns, read_starts, seal, write_csv, write_manifest
from proof.gates import GENERATOR_FAILED, INTERRUPTED, MOST_DROPPED, NOT_STARTED, restart_breach
from proof.judge import RESTART_COLUMNS, judge, read_samples, read_sealed_plan, restart_table
from proof.plan import Plan, read_plan
from proof.servers import (
    GeneratorFailed,
    ServerNotStarted,
    generate,
    pins,
    server,
    throttled_us,
    throttling_readable,
)


def run(path: Path, evidence: Path) -> tuple[Path, dict[str, Any]]:
    """Carries out the plan and returns the sealed folder and the verdict.

    However it ends, what was measured is sealed and judged before an error goes on.
    """
    plan = read_plan(path)
    if any(arm.url for arm in plan.arms):
        raise BadInput(f"{path}: `proof run` restarts servers, so every arm names an artifact; arms with a url are for locust itself.")
    plan.read_texts()
    compared = _compare_arms(plan)
    folder = evidence / f"{datetime.datetime.now(datetime.UTC):%Y%m%d-%H%M%S}-{plan.name}"
    folder.mkdir(parents=True)
    _remember(evidence, folder, plan)
    shutil.copy(path, folder / "plan.toml")
    shutil.copy(plan.texts, folder / "texts.txt")
    _write_json(folder / "identity.json", compared)
    try:
        _restarts(read_sealed_plan(folder), folder)
    except BaseException:
        if (folder / "starts.csv").exists() and any((folder / "rows").glob("*.csv")):
            finish(folder)
            print(f"what was measured is sealed in {folder}", flush=True)
        raise
    return folder, finish(folder)


def _restarts(plan: Plan, folder: Path) -> None:
    """Restart after restart, each dropped one repeated at once, until the plan is full or too many were dropped."""
    planned, name = plan.level.restarts, f"{folder.name}-{plan.digest[:16]}"
    most = planned + int(planned * MOST_DROPPED / (1 - MOST_DROPPED)) + 1
    kept, loaded = 0, None
    with tqdm(total=planned, desc=plan.name, unit="restart") as bar:
        for attempt in range(most):
            start, info = _restart(plan, attempt, kept, name, folder)
            if info is not None:
                loaded = _same_models(loaded, info)
            if start.dropped:
                tqdm.write(f"restart {start.restart} is dropped and repeated: {start.dropped}")
                continue
            kept += 1
            bar.update()
            if kept == planned:
                return


def _restart(plan: Plan, attempt: int, slot: int, name: str, folder: Path) -> tuple[Start, dict[str, Any] | None]:
    """One start of the server with all its requests; a line in starts.csv tells of it, however it ended."""
    order = plan.load_order(slot)
    rows, facts, log = folder / "rows" / f"{attempt:03d}.csv", folder / "facts.json", folder / "run.log"
    requests = sum(1 for _ in plan.schedule(slot, len(plan.read_texts())))
    began, throttled = time.monotonic(), throttled_us()
    info, ended = None, INTERRUPTED
    try:
        with server(plan, order, log) as info:
            if not (folder / "environment.json").exists():
                _write_json(folder / "environment.json", _environment(plan, info))
            generate(plan, requests, attempt, slot, name, rows, facts, log)
        ended = ""
    except ServerNotStarted:
        ended = NOT_STARTED
        if attempt == 0:
            raise
    except GeneratorFailed:
        ended = GENERATOR_FAILED
    finally:
        throttled = throttled_us() - throttled
        share = round(float(json.loads(facts.read_text())["generator_cpu_share"]), 4) if facts.exists() else 0.0
        facts.unlink(missing_ok=True)
        columns = read_columns(rows)
        if not ended or len(columns["status"]) == requests:
            ended = restart_breach(plan, columns, requests, share, throttled)
        start = Start(
            restart=attempt, slot=slot, load_order=" ".join(plan.arms[i].name for i in order),
            instance=info["instance_id"] if info else "", seconds=round(time.monotonic() - began, 3),
            generator_cpu_share=share, throttled_us=throttled, dropped=ended,
        )
        append_start(folder, start)
    return start, info


def _same_models(before: dict[str, Any] | None, info: dict[str, Any]) -> dict[str, Any]:
    """What every start must load alike; BadInput if an artifact was exported again in the meantime."""
    loaded = {name: (model["digest"], model["variant"], model["runtime"]) for name, model in info["models"].items()}
    if before is not None and loaded != before:
        changed = next(name for name in loaded if loaded[name] != before[name])
        raise BadInput(f"The artifact of arm {changed} changed during the run; leave artifacts alone while they are measured.")
    return loaded


def finish(folder: Path) -> dict[str, Any]:
    """Seals the rows of a run and adds what follows from them: restarts.csv, verdict, report, manifest."""
    if not (folder / REQUESTS).exists():
        seal(folder)
    plan = read_sealed_plan(folder)
    samples = read_samples(folder, plan, read_starts(folder))
    write_csv(folder / "restarts.csv", RESTART_COLUMNS, restart_table(plan, samples))
    verdict = judge(folder, sealed=False)
    _write_json(folder / "verdict.json", verdict)
    report.write(folder, verdict)
    write_manifest(folder)
    return verdict


def _compare_arms(plan: Plan) -> dict[str, Any]:
    """Identity of the reference with the candidate and with each control; also refuses broken artifacts before anything runs."""
    # The two loads of each role name one artifact; the plan's reader sees to that.
    reference = Path(plan.arms[plan.indices("reference")[0]].artifact or "")
    others = [plan.indices("candidate")[0], *plan.indices("control")]
    return {plan.arms[i].name: identity.compare(reference, Path(plan.arms[i].artifact or "")) for i in others}


def _environment(plan: Plan, info: dict[str, Any]) -> dict[str, Any]:
    packages = ("openvino", "onnxruntime", "tokenizers", "fastapi", "uvicorn", "locust", "numpy", "scipy")
    return {
        "processor": _processor(), "processors": os.cpu_count(), "system": platform.platform(), "python": platform.python_version(),
        "server_cpus": sorted(pins(plan)[0]), "generator_cpus": sorted(pins(plan)[1]), "throttling_readable": throttling_readable(),
        "packages": {name: version for name in packages if (version := _version(name))},
        "commit": _commit(), "server": {key: value for key, value in info.items() if key not in ("instance_id", "started")},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


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
        entry = {"run": folder.name, "plan": plan.name, "plan_digest": plan.digest, "number_for_this_plan": number}
        _write_json(path, [*runs, entry])
    _write_json(folder / "run.json", entry)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
