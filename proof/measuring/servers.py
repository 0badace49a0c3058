"""
Starts and stops the servers of a run, pinned to their processors.
"""

from __future__ import annotations

import contextlib
import importlib.resources
import json
import os
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

from command import BAD_INPUT, UNAVAILABLE, USAGE, Unavailable
from proof.measuring import pod_instances
from proof.measuring.launch import ServerCommand, ServerNotStarted, last_line, running
from proof.plans.dialects import DIALECTS, headers_from
from proof.plans.plan import Arm, Plan
from proof.plans.restart import RestartSpec

READY_WITHIN_S = 120
PORT_FREE_WITHIN_S = 5
SLOWEST_REQUEST_S = 0.5


class GeneratorFailed(Unavailable):
    """Locust broke off; `lasting` if it would again."""

    def __init__(self, message: str, lasting: bool = False) -> None:
        super().__init__(message)
        self.lasting = lasting


@dataclass(frozen=True)
class Served:
    """What is asked in one restart."""

    info: dict[str, Any]
    """The server's /info; empty where it is not ours."""
    addresses: Mapping[str, str] = field(default_factory=dict)
    """Urls by arm, where they are not the plan's."""
    with_gpus: frozenset[str] = frozenset()
    """Urls of servers that have GPUs and tell of them."""


@contextmanager
def serve_arms(
    plan: Plan,
    order: list[int],
    log: Path,
    counted: Collection[str] = (),
    tried: Collection[str] = (),
) -> Iterator[Served]:
    """A server that has loaded the plan's arms in `order`. ServerNotStarted if it does not get
    ready.

    Where the plan takes instances: those that neither `counted` nor, if there are others, were
    `tried` in vain.
    """
    if plan.instances:
        taken = pod_instances.take(plan, order, counted, tried)
        told, urls = (
            pod_instances.told(taken, plan),
            {name: instance.address for name, instance in taken.items()},
        )
        yield Served(told, urls, frozenset(urls.values() if told.get("gpus") else ()))
        return
    if not plan.starts_servers:
        _restart_theirs(plan, order, log)
        yield Served({})
        return
    arms = [plan.arms[i] for i in order]
    command = [
        sys.executable,
        "-P",  # a folder named service where the run is started is not ours
        "-m",
        "service",
        *(f"{arm.name}={arm.artifact}" for arm in arms),
        "--port",
        str(plan.port),
    ]
    delayed_by_server = any(plan.arms[i].by == "server" for i in plan.indices("delayed"))
    switch = {"DRBERT_BUSY_WAIT": "loopback"} if delayed_by_server else {}
    _check_port(plan.port)
    spec = ServerCommand(
        command,
        f"http://127.0.0.1:{plan.port}",
        log,
        environment=switch | dict(plan.settings),
        cpus=pinned_cpus(plan)[0],
        ready_within_s=READY_WITHIN_S,
        # Whoever kills the run's group kills the server too, and the port is free again.
        own_group=False,
    )
    with running(spec) as process:
        with urllib.request.urlopen(f"{process.url}/info", timeout=10) as response:
            info = json.load(response)
        yield Served(info, with_gpus=frozenset([process.url] if info.get("gpus") else ()))


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
            preexec_fn=_first_in_line(pinned_cpus(plan)[1]),
        )
        os.close(writing)
        try:
            code = process.wait(longest_s(plan, requests))
        except subprocess.TimeoutExpired:
            raise GeneratorFailed(
                f"Locust did not end in time; {log} says how far it came."
            ) from None
        finally:
            process.kill()
            process.wait()
        message = complaint.read().strip()
    if code in (USAGE, BAD_INPUT, UNAVAILABLE) or not rows.exists():
        raise GeneratorFailed(
            f"The load generator cannot go on: {message or last_line(log)}",
            lasting=True,
        )
    # Locust ends with 1 when a request failed; the gates judge that by the rows.
    if code not in (0, 1):
        raise GeneratorFailed(f"Locust ended with {code}; {log} says why.")


def longest_s(plan: Plan, requests: Mapping[str, int | None]) -> float:
    """How long a restart's requests may take before something must be wrong."""
    seconds = 60.0
    for level in plan.levels:
        count = requests[level.name] or 0
        if level.kind == "capacity":
            seconds += 3 * level.sets * len(plan.arms) * (level.slice_s + 60)
        else:
            seconds += count * SLOWEST_REQUEST_S + (
                count / level.rate_per_s(plan) if level.percent else 0.0
            )
    return seconds


def _restart_theirs(plan: Plan, order: list[int], log: Path) -> None:
    """Runs the plan's restart command and waits until every arm answers a text."""
    names = " ".join(plan.arms[i].name for i in order)
    with log.open("ab") as output:
        done = subprocess.run(
            plan.restart_command or "true",
            shell=True,
            stdout=output,
            stderr=output,
            env=os.environ | {"LOAD_ORDER": names},
            check=False,
        )
    if done.returncode:
        raise ServerNotStarted(
            f"The restart command ended with {done.returncode}: {last_line(log)}"
        )
    text = plan.read_texts()[0]
    for arm in plan.arms:
        if arm.url:
            _wait_until_it_answers(arm, text)


def _wait_until_it_answers(arm: Arm, text: str) -> None:
    """A port that takes connections is not yet a model that answers: proxies accept before what is
    behind them.
    """
    dialect = DIALECTS[arm.dialect]
    url = f"{(arm.url or '').rstrip('/')}{dialect.path.format(model=arm.model)}"
    body = json.dumps(dialect.body(arm.model, text)).encode()
    request = urllib.request.Request(
        url, body, {"Content-Type": "application/json"} | headers_from(arm.headers_env)
    )
    give_up = time.monotonic() + READY_WITHIN_S
    while True:
        try:
            with urllib.request.urlopen(request, timeout=10):
                return
        except OSError as error:
            if time.monotonic() > give_up:
                raise ServerNotStarted(
                    f"Arm {arm.name} does not answer at {url} ({error}); is that where it listens?"
                ) from None
            time.sleep(0.1)


def pinned_cpus(plan: Plan) -> tuple[set[int], set[int]]:
    """Processors of the server and of the generator; both empty where the plan's cannot be had
    apart from each other.
    """
    available = os.sched_getaffinity(0)
    ours, theirs = set(plan.server_cpus), set(plan.generator_cpus)
    apart = bool(ours and theirs) and not ours & theirs and (ours | theirs) <= available
    return (ours, theirs) if apart else (set(), set())


_CPU_STAT = (Path("/sys/fs/cgroup/cpu.stat"), Path("/sys/fs/cgroup/cpu/cpu.stat"))


def throttling_readable() -> bool:
    return any(path.is_file() for path in _CPU_STAT)


def throttled_us() -> int:
    """Microseconds this cgroup has been throttled for so far; 0 where that cannot be read."""
    for path in _CPU_STAT:
        try:
            facts = dict(line.split() for line in path.read_text(encoding="utf-8").splitlines())
        except OSError:
            continue
        return int(facts.get("throttled_usec", int(facts.get("throttled_time", 0)) // 1000))
    return 0


def _check_port(port: int) -> None:
    # A server that was killed a moment ago, with its run, takes a moment to let go of it.
    give_up = time.monotonic() + PORT_FREE_WITHIN_S
    while True:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
                return
            except OSError as error:
                if time.monotonic() > give_up:
                    raise Unavailable(
                        f"Port {port} of 127.0.0.1 cannot be had ({error.strerror}); choose another"
                        " in the plan's [server]."
                    ) from None
        time.sleep(0.1)


def _first_in_line(cpus: set[int]) -> Callable[[], None]:
    """Pins the generator and, where that is permitted, lets it go before whatever else runs there:
    its clock is the run's.
    """

    def prepare() -> None:
        if cpus:
            os.sched_setaffinity(0, cpus)
        with contextlib.suppress(PermissionError):
            os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))

    return prepare
