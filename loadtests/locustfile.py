"""
Sends a plan's requests to its arms and appends a row for each.

    PLAN=examples/plans/demo.toml locust -f loadtests/ --headless       one restart of a plan
        against servers that run
    locust -f loadtests/ --headless --host http://127.0.0.1:8000         a look at one server's
        first two models

`python -m proof run` starts this once a restart. Locust's own percentiles are rounded to a
millisecond and more, so the rows are ours; Locust's page shows the arms while they run.

    unloaded            one request in flight: send, read, pause
    mixed, switchback   open loop: every request goes out when it is due, whatever has been answered
    capacity            closed loop: a fixed number in flight for some seconds
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import time
import traceback
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import gevent
from gevent import monkey
from gevent.pool import Group
from locust import User, events, task

# Locust puts the working directory first, and a folder named proof or service there is not ours.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from command import BUG, BadInput, BadUsage, CommandError, Unavailable
from proof.evidence.store import Row, RowFile
from proof.plans.dialects import DIALECTS, headers_from, tokens_of
from proof.plans.plan import Level, Plan, plan_for_two
from proof.plans.restart import RestartSpec
from proof.plans.schedule import (
    SLICE_WARM_UP,
    WARM_UP,
    Schedule,
    build_schedule,
    load_positions,
    slice_texts,
)

# Locust patches time.sleep; with one request in flight nothing else is due, and the real one is
# finer than gevent's 1 ms.
sleep = monkey.get_original("time", "sleep")
# gevent's timers have a grain of a millisecond: they wait until shortly before a request is due,
# and yielding does the rest.
TIMER_GRAIN_NS = 1_500_000
# Servers close connections that were idle for some seconds (uvicorn: 5); one that may be closed is
# not used again.
IDLE_S = 4.0
ANSWERED_WITHIN_S = 60.0
LOOK_TEXTS = Path(__file__).parent.parent / "examples" / "texts" / "sentences.txt"
_TIMING = re.compile(r'(\w+);dur=([\d.]+)(?:;desc="b=(\d+) t=(\d+)")?')


class Dispatcher(User):
    """Walks through one restart's schedule; there is exactly one, for a second would send
    everything twice.
    """

    fixed_count = 1

    @task
    def restart(self) -> None:
        """Sends the schedule once and ends Locust, whatever happens: a task that raised would be
        run again.
        """
        spec = None
        try:
            spec = RestartSpec.from_environment()
            self._restart(spec)
        except CommandError as error:
            print(error, file=sys.stderr)
            if spec is not None and spec.complaint_fd is not None:
                os.write(spec.complaint_fd, str(error).encode())
            self.environment.process_exit_code = error.exit_code
        except Exception:
            traceback.print_exc()
            self.environment.process_exit_code = BUG
        finally:
            self.environment.runner.quit()

    def _restart(self, spec: RestartSpec | None) -> None:
        if spec is None:
            plan = _plan_of_host(self.environment.host)
            spec = RestartSpec(plan=plan.path)
        else:
            plan = spec.read_plan()
        run = spec.run or f"look-{plan.digest[:16]}"
        if not run.endswith(plan.digest[:16]):
            raise BadInput(f"{plan.path} is not the plan that run {run} was begun with.")
        path = spec.rows or Path(f"evidence/looks/{uuid.uuid4().hex[:8]}.csv")
        rows = RowFile(path)
        try:
            shares = Restart(plan, spec, run, rows, self.environment).walk()
        finally:
            rows.close()
        if spec.facts is not None:
            facts = {"generator_cpu_share": max(shares.values())}
            spec.facts.write_text(json.dumps(facts), encoding="utf-8")
        used = ", ".join(f"{share:.0%} at {name}" for name, share in shares.items())
        print(f"{path}: one row a request; the generator used of a core {used}", file=sys.stderr)


def _plan_of_host(host: str | None) -> Plan:
    if not host:
        raise BadUsage(
            "Set PLAN=plan.toml, or give --host URL for a look at one server's first two models."
        )
    with urllib.request.urlopen(f"{host.rstrip('/')}/v1/models", timeout=10) as response:
        models = [model["id"] for model in json.load(response)["data"]][:2]
    return plan_for_two(host.rstrip("/"), models, LOOK_TEXTS)


class Restart:
    """All requests of one restart, level after level."""

    def __init__(
        self, plan: Plan, spec: RestartSpec, run: str, rows: RowFile, environment: Any
    ) -> None:
        self.plan, self.restart, self.slot, self.run = plan, spec.restart, spec.slot, run
        self.rows, self.environment = rows, environment
        self.texts = plan.read_texts()
        self.arms = _arms(plan, spec, self.texts)
        self.failed = False
        """A request had no good answer: the restart will not count, so nothing more is sent."""
        self.unrecorded: Exception | None = None
        """Why a row could not be written."""

    def walk(self) -> dict[str, float]:
        """Sends everything; returns the share of a core used at each level."""
        walks: dict[str, Callable[[Level, Schedule], None]] = {
            "unloaded": self.one_in_flight,
            "mixed": self.open_loop,
            "switchback": self.slices,
            "capacity": self.closed_loop,
        }
        shares = {}
        for level in self.plan.levels:
            cpu, wall = time.process_time(), time.monotonic()
            walks[level.kind](level, build_schedule(self.plan, level, self.slot, len(self.texts)))
            shares[level.name] = round((time.process_time() - cpu) / (time.monotonic() - wall), 4)
            if self.failed:
                break
        if self.unrecorded is not None:
            raise Unavailable(f"{self.rows.path} cannot be written: {self.unrecorded}.")
        return shares

    def one_in_flight(self, level: Level, due: Schedule) -> None:
        """With one request in flight nothing is due at a time of its own: a request is scheduled
        when the pause is over.
        """
        service_s, unit_s = [0.002], 0.0
        for i in range(len(due)):
            if due.slice_id[i] != WARM_UP and not unit_s:
                unit_s = sorted(service_s)[len(service_s) // 2]
            row = self.record(self.prepare(level, due, i))
            if self.failed:
                return
            service_s.append((row.done_ns - row.sent_ns) / 1e9)
            sleep(due.pause[i] * (unit_s or service_s[-1]))

    def open_loop(self, level: Level, due: Schedule) -> None:
        self.send_when_due(level, due, range(len(due)))

    def slices(self, level: Level, due: Schedule) -> None:
        """One arm at a time; the next begins when nothing is in flight."""
        size = level.slice_requests
        for first in range(0, len(due), size):
            self.warm_up_slice(int(due.arm[first]))
            self.send_when_due(level, due, range(first, first + size))
            if self.failed:
                return

    def closed_loop(self, level: Level, due: Schedule) -> None:
        """Slices of one arm with a fixed number in flight; a slice ends when its time is over and
        all are answered.
        """
        arms = len(self.plan.claimed_arms) + len(self.plan.indices("delayed"))
        for i in range(len(due)):
            self.warm_up_slice(int(due.arm[i]))
            numbers = iter(range(10**9))
            texts = slice_texts(self.plan, level, self.slot, i // arms, len(self.texts), 4096)
            over_ns = time.monotonic_ns() + int(level.slice_s * 1e9)
            group = Group()
            for _ in range(level.in_flight):
                group.spawn(self._ask_until, over_ns, numbers, texts, level, due, i)
            group.join()
            if self.failed:
                return

    def _ask_until(
        self, over_ns: int, numbers: Iterator[int], texts: Any, level: Level, due: Schedule, i: int
    ) -> None:
        while time.monotonic_ns() < over_ns and not self.failed:
            number = next(numbers)
            self.record(self.prepare(level, due, i, number, int(texts[number % len(texts)])))

    def send_when_due(self, level: Level, due: Schedule, requests: range) -> None:
        """Open loop: none waits for another's answer. Returns when all are answered.

        All that can be done before a request is due is done before, and it is sent from here:
        only its answer is waited for elsewhere.
        """
        group = Group()
        begin_ns = time.monotonic_ns() + 5_000_000
        for i in requests:
            scheduled_ns = begin_ns + int(due.offset_ns[i])
            asked = self.prepare(level, due, i)
            asked.connect()
            _wait_until(scheduled_ns)
            if self.failed:
                break
            asked.send()
            group.spawn(self.answered, asked, scheduled_ns)
        group.join()

    def warm_up_slice(self, arm: int) -> None:
        for number in range(SLICE_WARM_UP):
            asked = Asked(self.arms[arm], number % len(self.texts), "warm-up")
            asked.send()
            asked.receive()
            if not asked.status:  # Nobody answers: the first measured request will say so.
                return

    def prepare(
        self,
        level: Level,
        due: Schedule,
        i: int,
        number: int | None = None,
        text: int | None = None,
    ) -> Asked:
        """The i-th request of a schedule; in a closed loop, a slice's `number`th with a text of its
        own.
        """
        arm = self.arms[int(due.arm[i])]
        tuple_ = int(due.block_id[i]) if number is None else number
        asked = Asked(
            arm,
            int(due.text[i]) if text is None else text,
            f"{level.name}.{self.restart}.{due.slice_id[i]}.{tuple_}.{due.position[i]}",
        )
        asked.where = {
            "level": level.name,
            "slice_id": int(due.slice_id[i]),
            "block_id": tuple_,
            "position": int(due.position[i]),
        }
        return asked

    def record(self, asked: Asked) -> Row:
        """Sends one request and appends its row; with nothing else to wait for, it is due when it
        is sent.
        """
        asked.connect()
        scheduled_ns = time.monotonic_ns()
        asked.send()
        return self.answered(asked, scheduled_ns)

    def answered(self, asked: Asked, scheduled_ns: int) -> Row:
        """Waits for the answer and appends the row, whatever it is."""
        asked.receive()
        timing, batch_size, batch_tokens = _timing(asked.answered.get("server-timing", ""))
        row = Row(
            run=self.run,
            restart=self.restart,
            instance=asked.answered.get("x-instance-id", f"r{self.restart}"),
            request_id=asked.request_id,
            arm=asked.arm.name,
            load_position=asked.arm.load_position,
            text_id=asked.text,
            chars=len(self.texts[asked.text]),
            tokens=tokens_of(asked.content),
            scheduled_ns=scheduled_ns,
            sent_ns=asked.sent_ns,
            done_ns=asked.done_ns,
            status=asked.status,
            tokenize_us=timing.get("tokenize", 0.0),
            queue_us=timing.get("queue", 0.0),
            inference_us=timing.get("inference", 0.0),
            total_us=timing.get("total", 0.0),
            batch_size=batch_size,
            batch_tokens=batch_tokens,
            bytes=len(asked.content),
            **asked.where,
        )
        try:
            if self.unrecorded is None:
                self.rows.append(row)
        except OSError as error:
            self.unrecorded = error
        good = 200 <= row.status <= 299
        self.failed = self.failed or self.unrecorded is not None or not good
        self.environment.events.request.fire(
            request_type="POST",
            name=row.arm,
            response_time=(row.done_ns - row.scheduled_ns) / 1e6,
            response_length=row.bytes,
            exception=None if good else RuntimeError(f"status {row.status}"),
            context={},
        )
        return row


class ArmClient:
    """One arm as it is asked; every text's body is ready before it is due."""

    def __init__(
        self, plan: Plan, arm: int, load_position: int, connections: Connections, texts: list[str]
    ) -> None:
        # The delayed arm is the second reference, slowed down.
        asked = (
            plan.arms[plan.indices("reference")[1]]
            if plan.arms[arm].role == "delayed"
            else plan.arms[arm]
        )
        dialect = DIALECTS[asked.dialect]
        model = asked.model or (asked.name if asked.artifact else None)
        self.name, self.load_position, self.connections = (
            plan.arms[arm].name,
            load_position,
            connections,
        )
        self.path = connections.path + dialect.path.format(model=model)
        self.bodies = [json.dumps(dialect.body(model, text)).encode() for text in texts]
        self.headers = {"Content-Type": "application/json"} | headers_from(asked.headers_env)
        self.own_delay = 0.0
        if plan.arms[arm].role == "delayed":
            if plan.arms[arm].by == "server":
                self.headers["X-Busy-Wait"] = repr(plan.delay)
            else:
                self.own_delay = plan.delay


class Asked:
    """One request on its way: connect, send, receive. No answer leaves status 0, for the judge must
    see it.
    """

    def __init__(self, arm: ArmClient, text: int, request_id: str) -> None:
        self.arm, self.text, self.request_id = arm, text, request_id
        self.where: dict[str, Any] = {}
        self.headers = arm.headers | {"X-Request-Id": request_id}
        self.connection = arm.connections.take()
        self.sent_ns = self.done_ns = self.status = 0
        self.content, self.answered = b"", dict[str, str]()

    def connect(self) -> None:
        if self.connection.sock is None:
            # What is wrong with the server is found out by sending.
            with contextlib.suppress(OSError):
                self.connection.connect()

    def send(self) -> None:
        self.sent_ns = time.monotonic_ns()
        try:
            self.connection.request("POST", self.arm.path, self.arm.bodies[self.text], self.headers)
        except (OSError, HTTPException):
            self.lost()

    def receive(self) -> None:
        if not self.done_ns:
            try:
                response = self.connection.getresponse()
                self.content = response.read()
                self.done_ns = time.monotonic_ns()
                self.status, self.answered = (
                    response.status,
                    {name.lower(): value for name, value in response.getheaders()},
                )
                self.arm.connections.give_back(self.connection)
            except (OSError, HTTPException):
                self.lost()
        if self.arm.own_delay:
            late_ns = self.done_ns + int(self.arm.own_delay * (self.done_ns - self.sent_ns))
            while (now := time.monotonic_ns()) < late_ns:
                pass
            self.done_ns = now

    def lost(self) -> None:
        self.done_ns = time.monotonic_ns()
        self.connection.close()


class Connections:
    """Open connections to one server, the last used first."""

    def __init__(self, url: str) -> None:
        self.url = urlsplit(url)
        self.path = self.url.path.rstrip("/")
        self._idle: list[tuple[float, HTTPConnection]] = []

    def take(self) -> HTTPConnection:
        """One that is open, or a new one. The standard library's sends head and body at once and
        without Nagle's delay, where a client that sends them apart waits 40 ms for an
        acknowledgement now and then.
        """
        while self._idle:
            since, connection = self._idle.pop()
            if time.monotonic() - since < IDLE_S:
                return connection
            connection.close()
        kind = HTTPSConnection if self.url.scheme == "https" else HTTPConnection
        return kind(self.url.hostname or "127.0.0.1", self.url.port, timeout=ANSWERED_WITHIN_S)

    def give_back(self, connection: HTTPConnection) -> None:
        if connection.sock is not None:
            self._idle.append((time.monotonic(), connection))


def _arms(plan: Plan, spec: RestartSpec, texts: list[str]) -> list[ArmClient]:
    positions = load_positions(plan, spec.slot)
    own = f"http://127.0.0.1:{plan.port}"
    reference = plan.arms[plan.indices("reference")[-1]]
    asked = [reference if arm.role == "delayed" else arm for arm in plan.arms]
    urls = [spec.addresses.get(arm.name) or arm.url or own for arm in asked]
    connections = {url: Connections(url) for url in set(urls)}
    return [
        ArmClient(plan, i, positions[i], connections[urls[i]], texts) for i in range(len(plan.arms))
    ]


def _wait_until(due_ns: int) -> None:
    while (left_ns := due_ns - time.monotonic_ns()) > 0:
        gevent.sleep((left_ns - TIMER_GRAIN_NS) / 1e9 if left_ns > TIMER_GRAIN_NS else 0)


def _timing(header: str) -> tuple[dict[str, float], int, int]:
    """Microseconds by phase, and the batch the text ran in."""
    phases, size, tokens = {}, 0, 0
    for name, milliseconds, batch, length in _TIMING.findall(header):
        phases[name] = float(milliseconds) * 1000
        if batch:
            size, tokens = int(batch), int(batch) * int(length)
    return phases, size, tokens


@events.init.add_listener
def start_at_once(environment: Any, **_: Any) -> None:
    """One user, ever: more dispatchers would send everything more than once."""
    if environment.parsed_options is not None:
        environment.parsed_options.num_users = 1
