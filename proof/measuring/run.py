"""
Run a plan: restart after restart, then seal, judge and report.

    plan → [start servers → Locust → rows → gates] × restarts → seal → judge → report

However a run ends, what was measured is sealed and judged, and `resume_run` continues from there.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tqdm import tqdm

from atomic import write_text_atomic
from command import BadInput, CommandError, Unavailable, how_to_install
from proof.evidence.answers import ANSWERS
from proof.evidence.audit import (
    audit_rows,
    check_pilot,
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
from proof.evidence.observed import Observed
from proof.evidence.readings import COLUMNS
from proof.evidence.store import (
    MANIFEST,
    REQUESTS,
    UNKNOWN,
    EvidenceRejected,
    RestartRecord,
    append_start,
    check_manifest,
    read_columns,
    read_starts,
    seal,
    write_csv,
    write_manifest,
)
from proof.measuring import index, pod_instances
from proof.measuring.expected_answers import expect_answers
from proof.measuring.gpu_throttling import watch_throttling
from proof.measuring.launch import ServerNotStarted, reach_this_host_directly
from proof.measuring.servers import (
    GeneratorFailed,
    Served,
    generate,
    pinned_cpus,
    serve_arms,
    throttled_us,
    throttling_readable,
)
from proof.measuring.steal import PROBE_S, stolen_share, wait_for_calm
from proof.plans.claim_digest import digest_claim
from proof.plans.plan import Plan
from proof.plans.plan_file import read_plan
from proof.plans.restart import RestartSpec
from proof.plans.schedule import build_schedule, load_order
from proof.reports import report
from proof.verdict import identity
from proof.verdict.judge import judge_lines
from proof.verdict.schema import Verdict
from proof.work.sealed import check_countable, count_for_run, lacks_work
from service.artifact import read_artifact

DERIVED = (MANIFEST, "restarts.csv", "verdict.json", "report.html")
"""Files that follow from the rows, and are written again when a run is resumed."""
SAME_PLACE = (
    "processor",
    "processors",
    "system",
    "python",
    "packages",
    "server_cpus",
    "generator_cpus",
)
"""Entries of environment.json that must not change when a run is resumed."""


def run_plan(path: Path, evidence: Path) -> tuple[Path, Verdict]:
    """Execute the plan at `path`; return the sealed folder in `evidence`, and the verdict.

    Raise BadInput if the plan or an artifact is wrong, Unavailable if a server or the load
    generator cannot be had. What was measured until then is sealed.
    """
    plan = read_plan(path)
    _check_runnable(plan)
    reach_this_host_directly()
    artifacts = _check_copies(plan)
    compared = _compare_arms(plan)
    if plan.instances:
        pod_instances.check_enough(plan)
    expected = expect_answers(plan) if plan.starts_servers else None
    folder = evidence / f"{datetime.datetime.now(datetime.UTC):%Y%m%d-%H%M%S}-{plan.name}"
    folder.mkdir(parents=True)
    claim = digest_claim(plan, artifacts, plan.texts.read_bytes())
    _write_json(folder / "run.json", index.append_run(evidence, folder, plan, claim))
    shutil.copy(path, folder / "plan.toml")
    shutil.copy(plan.texts, folder / "texts.txt")
    if plan.pilot is not None:
        shutil.copy(plan.pilot_path, folder / "pilot.json")
    _write_json(folder / "identity.json", compared)
    if expected is not None:
        write_text_atomic(folder / ANSWERS, expected.model_dump_json() + "\n")
    return folder, _execute(folder)


def _check_runnable(plan: Plan) -> None:
    """Raise BadInput or Unavailable if something that the run needs is missing."""
    if find_spec("locust") is None:
        raise Unavailable(f"The load generator is not installed; {how_to_install('loadtests')}.")
    plan.read_texts()
    check_countable(plan)
    for level in plan.levels:
        if level.percent:
            level.arrivals_per_s(plan)
    if not plan.starts_servers and plan.restart_command is None and not plan.instances:
        raise BadInput(
            f"{plan.path}: its arms are servers of your own and [server] has no restart command;"
            " without restarts there is nothing to infer from."
        )
    if plan.pilot is not None and not plan.pilot_path.is_file():
        raise Unavailable(
            f"{plan.path} was computed from a pilot, and {plan.pilot_path} is not there."
        )
    try:
        check_pilot(plan, plan.path, plan.pilot_path)
    except EvidenceRejected as error:
        raise BadInput(f"{error} `drbert-prove plan` takes them from a pilot.") from None


def resume_run(folder: Path) -> tuple[Path, Verdict]:
    """Resume an interrupted run, sealed or not.

    Raise EvidenceRejected if a sealed file has changed, BadInput if no restart is missing.
    """
    if not (folder / "run.json").is_file():
        raise Unavailable(
            f"{folder} is no run; give the folder under evidence/ that `proof run` named."
        )
    reach_this_host_directly()
    sealed = (folder / MANIFEST).exists()
    if sealed:
        check_manifest(folder)
    plan = read_sealed_plan(folder)
    is_whole = _count_restarts(folder) >= plan.restarts
    if plan.starts_servers and not is_whole and not (folder / ANSWERS).exists():
        raise BadInput(
            f"{folder} was begun by a version that recorded no answers; begin a new run."
        )
    if sealed and is_whole and not lacks_work(plan, folder):
        raise BadInput(
            f"{folder} holds all {plan.restarts} restarts; there is nothing to go on with."
        )
    for name in DERIVED:
        (folder / name).unlink(missing_ok=True)
    _record_killed_restarts(plan, folder)
    dropped = len(_recorded_restarts(folder)) - _count_restarts(folder)
    if dropped > MOST_DROPPED * (dropped + plan.restarts):
        print(
            f"{dropped} restarts of this run were dropped. Of {dropped + plan.restarts} in all that"
            f" is more than {MOST_DROPPED:.0%}, so it will end invalid; start a new run instead.",
            flush=True,
        )
    return folder, _execute(folder)


def _recorded_restarts(folder: Path) -> list[RestartRecord]:
    """Return the lines of starts.csv; none before the first restart."""
    return read_starts(folder) if (folder / "starts.csv").exists() else []


def _count_restarts(folder: Path) -> int:
    """Return the number of restarts that count."""
    return sum(not start.dropped for start in _recorded_restarts(folder))


def _record_killed_restarts(plan: Plan, folder: Path) -> None:
    """Add a line for a restart that was killed with its run: it left rows, but no line."""
    recorded = {start.restart for start in _recorded_restarts(folder)}
    for rows in sorted((folder / "rows").glob("*.csv")):
        restart = int(rows.stem)
        if restart in recorded:
            continue
        slot = _count_restarts(folder)
        order = " ".join(plan.arms[i].name for i in load_order(plan, slot))
        start = RestartRecord(restart, slot, order, "", 0.0, UNKNOWN, 0, INTERRUPTED)
        append_start(folder, start)


def _execute(folder: Path) -> Verdict:
    """Measure the missing restarts and return the verdict; seal what there is, whatever happens."""
    try:
        with _sigterm_as_interrupt():
            plan = read_sealed_plan(folder)
            _measure_restarts(plan, folder)
            count_for_run(plan, folder)
    except BaseException:
        if _has_rows(folder):
            resume = f"`drbert-prove run --resume {folder}` continues it"
            try:
                finish_run(folder)
                print(f"what was measured is sealed in {folder}; {resume}", flush=True)
            except (OSError, CommandError) as error:
                print(
                    f"what was measured is kept in {folder}, but could not be sealed ({error});"
                    f" {resume}",
                    flush=True,
                )
        # Whatever is wrong with the index must not hide why the run ended.
        with contextlib.suppress(OSError, CommandError):
            index.record_outcome(folder, index.STOPPED)
        raise
    verdict = finish_run(folder)
    index.record_outcome(folder, verdict.verdict)
    return verdict


def _has_rows(folder: Path) -> bool:
    has_rows = any((folder / "rows").glob("*.csv")) or (folder / REQUESTS).exists()
    return has_rows and (folder / "starts.csv").exists()


@contextlib.contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Let SIGTERM, which schedulers and CI send, end a run as Ctrl-C does.

    Servers are stopped and what was measured is sealed.
    """

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    # Python handles signals in its main thread only.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _measure_restarts(plan: Plan, folder: Path) -> None:
    """Measure restarts until the plan is complete, or too many were dropped.

    A dropped restart is repeated at once.
    """
    run = f"{folder.name}-{plan.digest[:16]}"
    most = plan.restarts + int(plan.restarts * MOST_DROPPED / (1 - MOST_DROPPED)) + 1
    begun = len(_recorded_restarts(folder))
    counted, cpus = _count_restarts(folder), set().union(*pinned_cpus(plan))
    with tqdm(total=plan.restarts, initial=counted, desc=plan.name, unit="restart") as bar:
        for attempt in range(begun, max(most, begun + 1)):
            if counted == plan.restarts:
                return
            waited_s = wait_for_calm(plan.wait_for_calm_s, lambda: stolen_share(cpus))
            if waited_s > 2 * PROBE_S:
                tqdm.write(
                    f"restart {attempt} waited {waited_s:.0f} s for other guests of this host to"
                    " be quiet"
                )
            start = _measure_restart(plan, attempt, counted, run, folder)
            if start.dropped:
                tqdm.write(f"restart {start.restart} is dropped and repeated: {start.dropped}")
                continue
            counted += 1
            bar.update()


def _measure_restart(plan: Plan, attempt: int, slot: int, run: str, folder: Path) -> RestartRecord:
    """Start the servers once and send all requests; append a line to starts.csv, however it ends.

    Returns that line.
    """
    order = load_order(plan, slot)
    rows, facts = folder / "rows" / f"{attempt:03d}.csv", folder / f"facts-{attempt:03d}.json"
    # Next to the evidence, not in it: servers log paths of this machine, and no result needs them.
    log = folder.with_name(f"{folder.name}.log")
    texts = len(plan.read_texts())
    expected = expected_requests(
        plan, {level.name: build_schedule(plan, level, slot, texts) for level in plan.levels}
    )
    began, throttled = time.monotonic(), throttled_us()
    slowed: set[str] = set()
    dropped, interrupted, is_raising = INTERRUPTED, False, True
    try:
        with serve_arms(plan, order, log, *_measured_instances(folder)) as served:
            _record_environment(plan, served, folder)
            with watch_throttling(served.with_gpus, slowed):
                spec = RestartSpec(
                    plan=plan.path,
                    texts=plan.texts,
                    restart=attempt,
                    slot=slot,
                    run=run,
                    facts=facts,
                    addresses=served.addresses,
                )
                generate(plan, expected, spec, rows, log)
        is_raising = False
    except KeyboardInterrupt:
        interrupted = True
        raise
    except ServerNotStarted:
        dropped = NOT_STARTED
        if attempt == 0:
            raise
        is_raising = False
    except GeneratorFailed as error:
        dropped = GENERATOR_FAILED
        if error.lasting:
            raise
        is_raising = False
    finally:
        throttled = throttled_us() - throttled
        share = _generator_share(facts)
        columns = read_columns(rows)
        gpu_slowed = " ".join(sorted(slowed))
        # A generator that came to its end wrote everything, however the restart ended after that.
        if share != UNKNOWN:
            breach = restart_breach(plan, columns, expected, share, throttled, gpu_slowed)
            dropped = drop_reason(breach, interrupted and _lacks_rows(columns, expected))
        start = RestartRecord(
            restart=attempt,
            slot=slot,
            load_order=" ".join(plan.arms[i].name for i in order),
            instance=" ".join(sorted(set(columns["instance"].unique()) - {""})),
            seconds=round(time.monotonic() - began, 3),
            generator_cpu_share=share,
            throttled_us=throttled,
            dropped=dropped,
            gpu_slowed=gpu_slowed,
        )
        if is_raising and not len(columns["status"]):
            # Nothing was measured, so nothing is dropped: the run can be resumed as often as it
            # takes.
            rows.unlink(missing_ok=True)
        else:
            append_start(folder, start)
    return start


def _measured_instances(folder: Path) -> tuple[set[str], set[str]]:
    """Return the instances that answered in restarts that count, and in dropped ones."""
    counted: set[str] = set()
    tried: set[str] = set()
    for start in _recorded_restarts(folder):
        (tried if start.dropped else counted).update(start.instance.split())
    return counted, tried


def _lacks_rows(columns: Mapping[str, Any], expected: Mapping[str, int | None]) -> bool:
    return any(
        count is not None and (columns["level"] == level).sum() != count
        for level, count in expected.items()
    )


def drop_reason(breach: str, cut_short: bool) -> str:
    """Return why a restart is dropped: for the breach in its rows, if there is one.

    Rows that an interruption cut short, or that a stopping server refused, are the interruption's.
    """
    return INTERRUPTED if breach and cut_short else breach


def _generator_share(facts: Path) -> float:
    """Return the share of a core that the generator reported at its end, or UNKNOWN."""
    try:
        return float(json.loads(facts.read_text(encoding="utf-8"))["generator_cpu_share"])
    except (OSError, ValueError, KeyError):
        return UNKNOWN
    finally:
        facts.unlink(missing_ok=True)


def finish_run(folder: Path) -> Verdict:
    """Seal a run's rows and write what follows from them: restarts.csv, verdict, report, manifest.

    Returns the verdict.
    """
    plan = read_sealed_plan(folder)
    _record_killed_restarts(plan, folder)
    for facts in folder.glob("facts-*.json"):
        facts.unlink()  # of a generator whose run was killed
    starts = read_starts(folder)
    seal(folder)
    observed = Observed(folder, plan)
    lines = audit_rows(folder, plan, starts, observed.add)
    write_csv(folder / "restarts.csv", COLUMNS, lines)
    verdict = judge_lines(folder, plan, starts, lines, observed)
    (folder / "verdict.json").write_text(verdict.model_dump_json(indent=2) + "\n", encoding="utf-8")
    report.write(folder, verdict)
    write_manifest(folder)
    return verdict


def _check_copies(plan: Plan) -> dict[str, str]:
    """Return the digest of each arm's artifact, by the arm's name.

    Raise BadInput unless both arms of a role load one artifact: from one folder, or from a copy
    that has files of its own.
    """
    artifacts = {
        arm.name: read_artifact(Path(arm.artifact)) for arm in plan.arms if arm.artifact is not None
    }
    for role in ("reference", "candidate"):
        first, second = (artifacts.get(arm.name) for arm in plan.arms if arm.role == role)
        if first is None or second is None or first.directory == second.directory:
            continue
        folders = f"{first.directory} and {second.directory}"
        if first.digest != second.digest:
            raise BadInput(
                f"{plan.path}: {folders} are two artifacts ({first.digest[:12]} and"
                f" {second.digest[:12]}); the two arms that are {role} load one, or copies of it."
            )
        shared = [
            name for name in first.manifest.files if first.path(name).samefile(second.path(name))
        ]
        if shared:
            raise BadInput(
                f"{plan.path}: {folders} share the file {shared[0]}; copy the folder with `cp -r`,"
                " or name one folder twice."
            )
    return {name: artifact.digest for name, artifact in artifacts.items()}


def _compare_arms(plan: Plan) -> dict[str, Any]:
    """Return what identity.json holds: the reference compared with candidate and controls.

    A broken artifact is refused here, before anything runs.
    """
    if not plan.starts_servers:
        return {}
    # Both arms of a role load one artifact, or copies of it.
    reference = Path(plan.arms[plan.indices("reference")[0]].artifact or "")
    others = [plan.indices("candidate")[0], *plan.indices("control")]
    return {
        plan.arms[i].name: identity.compare(reference, Path(plan.arms[i].artifact or ""))
        for i in others
    }


def _record_environment(plan: Plan, served: Served, folder: Path) -> None:
    """Write environment.json at the first start.

    Raise BadInput at a later one if the machine or an artifact is another than at the first.
    """
    path, here = folder / "environment.json", _environment(plan, served)
    if not path.exists():
        _write_json(path, here)
        return
    before, models = read_json(path), loaded_models(folder)
    # As it would be read back: JSON has no tuples.
    here = json.loads(json.dumps(here))
    for key in SAME_PLACE:
        if before.get(key) != here[key]:
            raise BadInput(
                f"{folder} was begun elsewhere ({key}: {before.get(key)}, here {here[key]}); begin"
                " a new run."
            )
    for name, model in here["server"].get("models", {}).items():
        first = models.get(name, {})
        if any(first.get(key) != model[key] for key in ("digest", "variant", "runtime")):
            raise BadInput(
                f"The artifact of arm {name} is not the one this run began with; leave artifacts"
                " alone while they are measured."
            )


def _environment(plan: Plan, served: Served) -> dict[str, Any]:
    packages = (
        "openvino",
        "onnxruntime",
        "onnxruntime-gpu",
        "tokenizers",
        "fastapi",
        "uvicorn",
        "locust",
        "numpy",
        "scipy",
    )
    return {
        "processor": processor_name(),
        "processor_model": processor_model(),
        "processors": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "server_cpus": sorted(pinned_cpus(plan)[0]),
        "generator_cpus": sorted(pinned_cpus(plan)[1]),
        "throttling_readable": throttling_readable(),
        "packages": {name: version for name in packages if (version := _version(name))},
        "drbert_serve": _version("drbert-serve"),
        "commit": _commit(),
        # One server holds every arm, so its memory does not tell them apart.
        "resident_bytes_of_all_arms_together": served.resident_bytes,
        "server_nice": served.nice,
        "server": {
            key: value
            for key, value in served.info.items()
            if key not in ("instance_id", "started")
        },
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def processor_name() -> str:
    """Return the processor's name, as the system reports it."""
    return _processor_facts().get("model name") or platform.processor()


def processor_model() -> str:
    """Return the numbers of the processor's model, which many clouds hide from its name."""
    facts = _processor_facts()
    keys = ("cpu family", "model", "stepping", "CPU implementer", "CPU part")
    return ", ".join(f"{key} {facts[key]}" for key in keys if key in facts)


def _processor_facts() -> dict[str, str]:
    """Return what Linux reports of the first processor, by name."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _commit() -> str | None:
    """Return the commit of the working directory's repository, if it is one."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip()


def _write_json(path: Path, value: Any) -> None:
    write_text_atomic(path, json.dumps(value, indent=2) + "\n")
