"""
The servers and the load generator of one restart: started, pinned to their processors, stopped.
"""

from __future__ import annotations

import contextlib
import importlib.resources
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from command import BAD_INPUT, UNAVAILABLE, USAGE, BadInput, Unavailable
from proof.measuring import pod_instances
from proof.measuring.launch import (
    ServerCommand,
    ServerNotStarted,
    last_line,
    running,
    tied_to_caller,
)
from proof.plans.dialects import DIALECTS, headers_from
from proof.plans.new_texts import PREFIX_TOKENS
from proof.plans.plan import Arm, Plan
from proof.plans.restart import RestartSpec
from service.artifact import TOKENIZER

READY_WITHIN_S = 900
"""Longest wait for a server that was started, in seconds."""
PORT_FREE_WITHIN_S = 5
"""Longest wait for the port of a server that was killed a moment ago, in seconds."""
SLOWEST_REQUEST_S = 0.5
"""Mean duration of a request beyond which the load generator is taken to hang, in seconds."""
WARM_UP_WITHIN_S = 3600
"""Time for warming up one model, in seconds: no limit in practice."""
POLL_S = 0.1
"""Seconds between two looks at something that is not there yet."""


class GeneratorFailed(Unavailable):
    """The load generator failed; `lasting` if it would fail again."""

    def __init__(self, message: str, lasting: bool = False) -> None:
        super().__init__(message)
        self.lasting = lasting


SERVER_NICE = -10
"""Nice value of the servers that a run starts, where that is permitted.

Other processes then hardly ever take their processor. All arms are in the server, so it favours
none of them.
"""


@dataclass(frozen=True)
class Served:
    """The servers of one restart."""

    info: dict[str, Any]
    """The server's /info; empty for servers of other projects."""
    addresses: Mapping[str, str] = field(default_factory=dict)
    """URLs by arm, where they are not the plan's."""
    with_gpus: frozenset[str] = frozenset()
    """URLs of servers that report on GPUs."""
    resident_bytes: int | None = None
    """Resident memory of the server once it is warm, of all copies together; None if unknown."""
    nice: int | None = None
    """Nice value of the server; None if it was not started here."""


@contextmanager
def serve_arms(
    plan: Plan,
    order: list[int],
    log: Path,
    counted: Collection[str] = (),
    tried: Collection[str] = (),
) -> Iterator[Served]:
    """Yield servers that have loaded the plan's arms in `order`; those started here are stopped.

    `counted` and `tried` are ids of instances to avoid, where the plan takes instances. Raise
    ServerNotStarted if a server does not become ready.
    """
    if plan.instances:
        instances = pod_instances.take_instances(plan, order, counted, tried)
        info = pod_instances.merge_info(instances, plan)
        for instance in instances.values():
            check_computes(instance.info, instance.address)
        urls = {name: instance.address for name, instance in instances.items()}
        yield Served(info, urls, frozenset(urls.values() if info.get("gpus") else ()))
    elif plan.starts_servers:
        _check_port(plan.port)
        with running(_server_command(plan, order, log)) as server:
            with urllib.request.urlopen(f"{server.url}/info", timeout=10) as response:
                info = json.load(response)
            check_computes(info, server.url)
            gpus = frozenset([server.url] if info.get("gpus") else ())
            pid = server.process.pid
            nice = os.getpriority(os.PRIO_PROCESS, pid)
            yield Served(info, with_gpus=gpus, resident_bytes=_resident_bytes(pid), nice=nice)
    else:
        _run_restart_command(plan, order, log)
        yield Served({})


def check_computes(info: Mapping[str, Any], address: str) -> None:
    """Raise BadInput if a server answers from a cache, so that its times are not its model's."""
    if info.get("settings", {}).get("cache_mib") is not None:
        raise BadInput(
            f"{address} has a cache of answers, so its times say nothing about its model; start it"
            " without DRBERT_CACHE_MIB."
        )


def _resident_bytes(pid: int) -> int | None:
    """Return the resident memory of a process; None where the system does not tell."""
    try:
        pages = Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]
    except (OSError, IndexError):
        return None
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def _server_command(plan: Plan, order: list[int], log: Path) -> ServerCommand:
    """Return how to start our service with the plan's arms."""
    arms = [plan.arms[i] for i in order]
    command = [
        sys.executable,
        "-P",  # a folder named service where the run is started is not ours
        "-m",
        "service",
        *(f"{arm.name}={arm.artifact}" for arm in arms),
        "--port",
        str(plan.port),
        "--variant",
        plan.variant,
    ]
    delayed_by_server = any(plan.arms[i].by == "server" for i in plan.indices("delayed"))
    delay_allowed = {"DRBERT_BUSY_WAIT": "loopback"} if delayed_by_server else {}
    return ServerCommand(
        command,
        f"http://127.0.0.1:{plan.port}",
        log,
        environment={**delay_allowed, **plan.settings, **_warm_up_settings(plan)},
        cpus=pinned_cpus(plan)[0],
        nice=SERVER_NICE,
        ready_within_s=READY_WITHIN_S,
        # A SIGKILL to the run's group also ends the server, which frees the port.
        own_group=False,
    )


def _warm_up_settings(plan: Plan) -> dict[str, str]:
    """Return settings that warm up every batch shape that the plan's texts can make.

    The first batch of a shape takes longer than the later ones. So there is no limit of time, and
    what the plan says about warming up is replaced.
    """
    texts = plan.read_texts()
    longest, added = 1, PREFIX_TOKENS if plan.levels != plan.judged_levels else 0
    for artifact in {arm.artifact for arm in plan.arms if arm.artifact is not None}:
        tokenizer = Tokenizer.from_file(str(Path(artifact) / TOKENIZER))
        tokenizer.no_truncation()
        longest = max(longest, *(len(each.ids) for each in tokenizer.encode_batch(texts)))
    return {
        "DRBERT_WARM_UP_S": str(WARM_UP_WITHIN_S),
        "DRBERT_WARM_UP_MAX_TOKENS": str(longest + added),
    }


def generate(
    plan: Plan, requests: Mapping[str, int | None], spec: RestartSpec, rows: Path, log: Path
) -> None:
    """Run Locust over one restart's schedule.

    It writes `rows`, a line for each request, and appends what Locust prints to `log`. Raise
    GeneratorFailed if it breaks or takes unreasonably long.
    """
    locustfile = importlib.resources.files("loadtests") / "locustfile.py"
    command = [sys.executable, "-P", "-m", "locust", "-f", str(locustfile)]
    command += ["--headless", "-u", "1", "-r", "1", "--only-summary"]
    reading, writing = os.pipe()
    spec = spec.model_copy(update={"rows": rows, "complaint_fd": writing})
    with log.open("ab") as output, os.fdopen(reading) as complaint:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=output,
            env=os.environ | spec.to_environment(),
            pass_fds=(writing,),
            preexec_fn=tied_to_caller(_pin_and_prioritise(pinned_cpus(plan)[1]), signal.SIGKILL),
        )
        os.close(writing)
        try:
            code = process.wait(longest_s(plan, requests))
        except subprocess.TimeoutExpired:
            raise GeneratorFailed(
                f"Locust did not end in time; {log} shows how far it came."
            ) from None
        finally:
            process.kill()
            process.wait()
        message = complaint.read().strip()
    if code in (USAGE, BAD_INPUT, UNAVAILABLE) or not rows.exists():
        raise GeneratorFailed(
            f"The load generator cannot continue: {message or last_line(log)}", lasting=True
        )
    # Locust ends with 1 when a request failed; the gates judge that by the rows.
    if code not in (0, 1):
        raise GeneratorFailed(f"Locust ended with {code}; {log} shows why.")


def longest_s(plan: Plan, requests: Mapping[str, int | None]) -> float:
    """Return the seconds after which the requests of a restart must have hung.

    `requests` is their number by level, None where time decides it.
    """
    seconds = 60.0
    for level in plan.levels:
        if level.kind == "capacity":
            seconds += 3 * level.sets * len(plan.arms) * (level.slice_s + 60)
            continue
        count = requests[level.name] or 0
        seconds += count * SLOWEST_REQUEST_S
        if level.percent:
            seconds += count / level.arrivals_per_s(plan)
    return seconds


def _run_restart_command(plan: Plan, order: list[int], log: Path) -> None:
    """Run the plan's restart command and wait until every arm answers a text."""
    names = " ".join(plan.arms[i].name for i in order)
    with log.open("ab") as output:
        completed = subprocess.run(
            plan.restart_command or "true",
            shell=True,
            stdout=output,
            stderr=output,
            env=os.environ | {"LOAD_ORDER": names},
            check=False,
        )
    if completed.returncode:
        raise ServerNotStarted(
            f"The restart command ended with {completed.returncode}: {last_line(log)}"
        )
    text = plan.read_texts()[0]
    for arm in plan.arms:
        if arm.url:
            _wait_until_arm_answers(arm, text)


def _wait_until_arm_answers(arm: Arm, text: str) -> None:
    """Wait for an answer to a text: a proxy accepts connections before its model is ready."""
    dialect = DIALECTS[arm.dialect]
    url = f"{(arm.url or '').rstrip('/')}{dialect.path.format(model=arm.model)}"
    body = json.dumps(dialect.body(arm.model, text)).encode()
    headers = {"Content-Type": "application/json"} | headers_from(arm.headers_env)
    request = urllib.request.Request(url, body, headers)
    deadline = time.monotonic() + READY_WITHIN_S
    while True:
        try:
            with urllib.request.urlopen(request, timeout=10):
                return
        except OSError as error:
            if time.monotonic() > deadline:
                raise ServerNotStarted(
                    f"Arm {arm.name} does not answer at {url} ({error}); is that where it listens?"
                ) from None
            time.sleep(POLL_S)


def pinned_cpus(plan: Plan) -> tuple[set[int], set[int]]:
    """Return the processors of the server and of the generator.

    Both are empty where the plan's are not available, or are not apart from each other.
    """
    available = os.sched_getaffinity(0)
    server, generator = set(plan.server_cpus), set(plan.generator_cpus)
    apart = bool(server and generator) and not server & generator
    return (server, generator) if apart and server | generator <= available else (set(), set())


_CPU_STAT = (Path("/sys/fs/cgroup/cpu.stat"), Path("/sys/fs/cgroup/cpu/cpu.stat"))


def throttling_readable() -> bool:
    """Return whether the system reports how long this cgroup was throttled."""
    return any(path.is_file() for path in _CPU_STAT)


def throttled_us() -> int:
    """Return the microseconds for which this cgroup was throttled so far; 0 if not readable."""
    for path in _CPU_STAT:
        try:
            facts = dict(line.split() for line in path.read_text(encoding="utf-8").splitlines())
        except OSError:
            continue
        return int(facts.get("throttled_usec", int(facts.get("throttled_time", 0)) // 1000))
    return 0


def _check_port(port: int) -> None:
    """Raise Unavailable if another process keeps the port for longer than PORT_FREE_WITHIN_S."""
    deadline = time.monotonic() + PORT_FREE_WITHIN_S
    while True:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
                return
            except OSError as error:
                if time.monotonic() > deadline:
                    raise Unavailable(
                        f"Port {port} of 127.0.0.1 cannot be had ({error.strerror}); choose another"
                        " in the plan's [server]."
                    ) from None
        time.sleep(POLL_S)


def _pin_and_prioritise(cpus: set[int]) -> Callable[[], None]:
    """Return a `preexec_fn` for the generator, whose clock is the run's.

    It pins the process and, where that is permitted, schedules it before any other.
    """

    def prepare() -> None:
        if cpus:
            os.sched_setaffinity(0, cpus)
        with contextlib.suppress(PermissionError):
            os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))

    return prepare
