"""
Runs a plan: restart after restart, seal, judge, report.

    plan → [start servers → Locust → rows → gates] × restarts → seal → judge → report

However a run ends, what was measured is sealed and judged, and `resume` goes on from there.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from atomic import write_text_atomic
from command import BadInput, CommandError, Unavailable
from proof.evidence.audit import (
    audit_rows,
    expected_requests,
    loaded_models,
    read_json,
    read_sealed_plan,
)
from proof.evidence.gates import (
    GENERATOR_FAILED,
    INTERRUPTED,
    MOST_DROPPED,
    NOT_STARTED,
    restart_breach,
)
from proof.evidence.readings import COLUMNS
from proof.evidence.store import (
    MANIFEST,
    REQUESTS,
    UNKNOWN,
    RestartRecord,
    append_start,
    check_manifest,
    read_columns,
    read_starts,
    seal,
    write_csv,
    write_manifest,
)
from proof.measuring import pod_instances
from proof.measuring.gpu_throttling import watch_throttling
from proof.measuring.launch import ServerNotStarted
from proof.measuring.servers import (
    GeneratorFailed,
    generate,
    pinned_cpus,
    serve_arms,
    throttled_us,
    throttling_readable,
)
from proof.measuring.steal import PROBE_S, stolen_share, wait_for_calm
from proof.plans.plan import Plan
from proof.plans.plan_file import read_plan
from proof.plans.restart import RestartSpec
from proof.plans.schedule import build_schedule, load_order
from proof.reports import report
from proof.verdict import identity
from proof.verdict.judge import judge_lines
from proof.verdict.schema import Verdict

# What follows from the rows, and is made again when a run goes on.
DERIVED = (MANIFEST, "restarts.csv", "verdict.json", "report.html")
# What must be the same when a run goes on: else its restarts were measured in two places.
SAME_PLACE = (
    "processor",
    "processors",
    "system",
    "python",
    "packages",
    "server_cpus",
    "generator_cpus",
)


def run_plan(path: Path, evidence: Path) -> tuple[Path, Verdict]:
    """Carries out the plan and returns the sealed folder and the verdict.

    BadInput if the plan or an artifact is wrong, Unavailable if a server or the load generator
    cannot be had, both before or after some restarts: what was measured is kept.
    """
    plan = read_plan(path)
    plan.read_texts()
    for level in plan.levels:
        if level.percent:
            level.rate_per_s(plan)
    if not plan.starts_servers and plan.restart_command is None and not plan.instances:
        raise BadInput(
            f"{path}: its arms are servers of your own and [server] has no restart command; without"
            " restarts there is nothing to infer from."
        )
    if plan.pilot is not None and not plan.pilot_path.is_file():
        raise Unavailable(f"{path} was computed from a pilot, and {plan.pilot_path} is not there.")
    compared = _compare_arms(plan)
    if plan.instances:
        pod_instances.check_enough(plan)
    folder = evidence / f"{datetime.datetime.now(datetime.UTC):%Y%m%d-%H%M%S}-{plan.name}"
    folder.mkdir(parents=True)
    _append_to_index(evidence, folder, plan)
    shutil.copy(path, folder / "plan.toml")
    shutil.copy(plan.texts, folder / "texts.txt")
    if plan.pilot is not None:
        shutil.copy(plan.pilot_path, folder / "pilot.json")
    _write_json(folder / "identity.json", compared)
    return folder, _execute(folder)


def resume_run(folder: Path) -> tuple[Path, Verdict]:
    """Resume an interrupted run, sealed or not.

    Raise EvidenceRejected if a sealed file has changed, BadInput if no restart is missing.
    """
    if not (folder / "run.json").is_file():
        raise Unavailable(
            f"{folder} is no run; give the folder under evidence/ that `proof run` named."
        )
    sealed = (folder / MANIFEST).exists()
    if sealed:
        check_manifest(folder)
    plan = read_sealed_plan(folder)
    if sealed and _kept(folder) >= plan.restarts:
        raise BadInput(
            f"{folder} holds all {plan.restarts} restarts; there is nothing to go on with."
        )
    for name in DERIVED:
        (folder / name).unlink(missing_ok=True)
    _record_killed_restarts(plan, folder)
    return folder, _execute(folder)


def _kept(folder: Path) -> int:
    return (
        sum(not start.dropped for start in read_starts(folder))
        if (folder / "starts.csv").exists()
        else 0
    )


def _record_killed_restarts(plan: Plan, folder: Path) -> None:
    """A restart that was killed together with the run left rows and no line in starts.csv."""
    told = (
        {start.restart for start in read_starts(folder)}
        if (folder / "starts.csv").exists()
        else set()
    )
    for part in sorted((folder / "rows").glob("*.csv")):
        if int(part.stem) not in told:
            slot = _kept(folder)
            order = " ".join(plan.arms[i].name for i in load_order(plan, slot))
            append_start(
                folder, RestartRecord(int(part.stem), slot, order, "", 0.0, UNKNOWN, 0, INTERRUPTED)
            )


def _execute(folder: Path) -> Verdict:
    """The restarts that are missing, then the verdict; also when it is interrupted, as far as it
    came.
    """
    try:
        with _termination_interrupts():
            _restarts(read_sealed_plan(folder), folder)
    except BaseException:
        if (folder / "starts.csv").exists() and (
            any((folder / "rows").glob("*.csv")) or (folder / REQUESTS).exists()
        ):
            goes_on = f"`python -m proof run --resume {folder}` goes on"
            try:
                finish_run(folder)
                print(f"what was measured is sealed in {folder}; {goes_on}", flush=True)
            except (OSError, CommandError) as error:
                print(
                    f"what was measured is kept in {folder}, but could not be sealed ({error});"
                    f" {goes_on}",
                    flush=True,
                )
        raise
    return finish_run(folder)


@contextlib.contextmanager
def _termination_interrupts() -> Iterator[None]:
    """SIGTERM, which schedulers and CI send, ends a run as Ctrl-C does: servers are stopped, what
    was measured is sealed.
    """

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    if (
        threading.current_thread() is not threading.main_thread()
    ):  # Python hears signals in its main thread only.
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _restarts(plan: Plan, folder: Path) -> None:
    """Restart after restart, each dropped one repeated at once, until the plan is full or too many
    were dropped.
    """
    name = f"{folder.name}-{plan.digest[:16]}"
    most = plan.restarts + int(plan.restarts * MOST_DROPPED / (1 - MOST_DROPPED)) + 1
    begun = len(read_starts(folder)) if (folder / "starts.csv").exists() else 0
    kept, cpus = _kept(folder), set().union(*pinned_cpus(plan))
    with tqdm(total=plan.restarts, initial=kept, desc=plan.name, unit="restart") as bar:
        for attempt in range(begun, max(most, begun + 1)):
            if kept == plan.restarts:
                return
            waited = wait_for_calm(plan.wait_for_calm_s, lambda: stolen_share(cpus))
            if waited > 2 * PROBE_S:
                tqdm.write(
                    f"restart {attempt} waited {waited:.0f} s for the neighbours of this machine to"
                    " be quiet"
                )
            start = _restart(plan, attempt, kept, name, folder)
            if start.dropped:
                tqdm.write(f"restart {start.restart} is dropped and repeated: {start.dropped}")
                continue
            kept += 1
            bar.update()


def _restart(plan: Plan, attempt: int, slot: int, name: str, folder: Path) -> RestartRecord:
    """One start of the server with all its requests; a line in starts.csv tells of it, however it
    ended.
    """
    order = load_order(plan, slot)
    rows, facts = folder / "rows" / f"{attempt:03d}.csv", folder / "facts.json"
    # Beside the evidence, not in it: what servers say names places of the machine, and nothing
    # follows from it.
    log = folder.with_name(f"{folder.name}.log")
    texts = len(plan.read_texts())
    due = expected_requests(
        plan, {level.name: build_schedule(plan, level, slot, texts) for level in plan.levels}
    )
    began, throttled = time.monotonic(), throttled_us()
    slowed: set[str] = set()
    ended, interrupted = INTERRUPTED, False
    try:
        with serve_arms(plan, order, log, *_measured(folder)) as served:
            _note_environment(plan, served.info, folder)
            with watch_throttling(served.with_gpus, slowed):
                spec = RestartSpec(
                    plan=plan.path,
                    texts=plan.texts,
                    restart=attempt,
                    slot=slot,
                    run=name,
                    facts=facts,
                    addresses=served.addresses,
                )
                generate(plan, due, spec, rows, log)
    except KeyboardInterrupt:
        interrupted = True
        raise
    except ServerNotStarted:
        ended = NOT_STARTED
        if attempt == 0:
            raise
    except GeneratorFailed as error:
        ended = GENERATOR_FAILED
        if error.lasting:
            raise
    finally:
        throttled = throttled_us() - throttled
        share = _generator_share(facts)
        columns = read_columns(rows)
        # The generator came to its end, so the rows say all, however the restart ended after that;
        # but what they lack or what a server that was being stopped refused is the interruption's
        # doing.
        if share != UNKNOWN:
            cut = any(
                (columns["level"] == level).sum() != count
                for level, count in due.items()
                if count is not None
            )
            ended = drop_reason(
                restart_breach(plan, columns, due, share, throttled, " ".join(sorted(slowed))),
                interrupted and cut,
            )
        start = RestartRecord(
            restart=attempt,
            slot=slot,
            load_order=" ".join(plan.arms[i].name for i in order),
            instance=" ".join(sorted(set(columns["instance"].unique()) - {""})),
            seconds=round(time.monotonic() - began, 3),
            generator_cpu_share=share,
            throttled_us=throttled,
            dropped=ended,
            gpu_slowed=" ".join(sorted(slowed)),
        )
        append_start(folder, start)
    return start


def _measured(folder: Path) -> tuple[set[str], set[str]]:
    """The instances that answered in restarts that count, and in others."""
    starts = read_starts(folder) if (folder / "starts.csv").exists() else []
    counted, tried = (
        {
            name
            for start in starts
            if bool(start.dropped) is dropped
            for name in start.instance.split()
        }
        for dropped in (False, True)
    )
    return counted, tried


def drop_reason(breach: str, cut_short: bool) -> str:
    """What a restart's line says of a breach in its rows: that it was interrupted, if that cut them
    short; nothing where there is none.
    """
    return INTERRUPTED if breach and cut_short else breach


def _generator_share(facts: Path) -> float:
    """What the generator told at its end, or UNKNOWN."""
    try:
        return float(json.loads(facts.read_text(encoding="utf-8"))["generator_cpu_share"])
    except (OSError, ValueError, KeyError):
        return UNKNOWN
    finally:
        facts.unlink(missing_ok=True)


def finish_run(folder: Path) -> Verdict:
    """Seals the rows of a run and adds what follows from them: restarts.csv, verdict, report,
    manifest.
    """
    plan = read_sealed_plan(folder)
    _record_killed_restarts(plan, folder)
    starts = read_starts(folder)
    seal(folder)
    lines = audit_rows(folder, plan, starts)
    write_csv(folder / "restarts.csv", COLUMNS, lines)
    verdict = judge_lines(folder, plan, starts, lines)
    (folder / "verdict.json").write_text(verdict.model_dump_json(indent=2) + "\n", encoding="utf-8")
    report.write(folder, verdict)
    write_manifest(folder)
    return verdict


def _compare_arms(plan: Plan) -> dict[str, Any]:
    """Identity of the reference with the candidate and with each control; also refuses broken
    artifacts before anything runs.
    """
    if not plan.starts_servers:
        return {}
    # The two loads of each role name one artifact; the plan's reader sees to that.
    reference = Path(plan.arms[plan.indices("reference")[0]].artifact or "")
    others = [plan.indices("candidate")[0], *plan.indices("control")]
    return {
        plan.arms[i].name: identity.compare(reference, Path(plan.arms[i].artifact or ""))
        for i in others
    }


def _note_environment(plan: Plan, info: dict[str, Any], folder: Path) -> None:
    """Writes environment.json at the first start; BadInput if a run goes on in another place."""
    path, here = folder / "environment.json", _environment(plan, info)
    if not path.exists():
        _write_json(path, here)
        return
    before, models = read_json(path), loaded_models(folder)
    # Through JSON, as what was written was.
    here = json.loads(json.dumps(here))
    for key in SAME_PLACE:
        if before.get(key) != here[key]:
            raise BadInput(
                f"{folder} was begun elsewhere ({key}: {before.get(key)}, here {here[key]}); begin"
                " a new run."
            )
    for name, model in here["server"].get("models", {}).items():
        if any(
            models.get(name, {}).get(key) != model[key] for key in ("digest", "variant", "runtime")
        ):
            raise BadInput(
                f"The artifact of arm {name} is not the one this run began with; leave artifacts"
                " alone while they are measured."
            )


def _environment(plan: Plan, info: dict[str, Any]) -> dict[str, Any]:
    packages = (
        "openvino",
        "onnxruntime",
        "tokenizers",
        "fastapi",
        "uvicorn",
        "locust",
        "numpy",
        "scipy",
    )
    return {
        "processor": processor_name(),
        "processors": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "server_cpus": sorted(pinned_cpus(plan)[0]),
        "generator_cpus": sorted(pinned_cpus(plan)[1]),
        "throttling_readable": throttling_readable(),
        "packages": {name: version for name in packages if (version := _version(name))},
        "commit": _commit(),
        "server": {
            key: value for key, value in info.items() if key not in ("instance_id", "started")
        },
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def processor_name() -> str:
    """The processor's name, as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(
            line.partition(":")[2].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor()


def _commit() -> str | None:
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def _append_to_index(evidence: Path, folder: Path, plan: Plan) -> None:
    """Adds the run to evidence/index.json before it begins: a run that ended badly is not
    forgotten.
    """
    path = evidence / "index.json"
    with (evidence / ".lock").open("w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        runs = read_json(path) if path.exists() else []
        number = 1 + sum(entry["plan_digest"] == plan.digest for entry in runs)
        entry = {
            "run": folder.name,
            "plan": plan.name,
            "plan_digest": plan.digest,
            "number_for_this_plan": number,
        }
        _write_json(path, [*runs, entry])
    _write_json(folder / "run.json", entry)


def _write_json(path: Path, value: Any) -> None:
    """At once: a full disk leaves the file as it was."""
    write_text_atomic(path, json.dumps(value, indent=2) + "\n")
