"""
Sends a plan's requests to its arms and appends a row of evidence for each.

    PLAN=examples/plans/demo.toml locust -f loadtests/ --headless
        one restart of a plan, with servers that are running

Without a plan, users.py tests the load of one server.
`drbert-prove run` starts it once for each restart. Locust rounds its own percentiles to a
millisecond or more, so the rows are written here. Locust's page shows the arms while they run.

    unloaded            one request in flight: send, read, pause
    mixed, switchback   open loop: each request is sent at its time, whatever has been answered
    capacity            closed loop: a fixed number in flight for some seconds
    repeat              one request in flight; new texts, each of which is sent several times
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import socket
import sys
import time
import traceback
import uuid
from collections.abc import Callable
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import gevent
from gevent import monkey
from gevent.pool import Group
from locust import User, events, task

# Import our packages, not folders of the same name in the working directory.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from command import BUG, BadInput, BadUsage, CommandError, Unavailable
from proof.evidence.store import UNKNOWN, Row, RowFile
from proof.plans.answers import read_answer
from proof.plans.dialects import DIALECTS, headers_from, parse_server_timing
from proof.plans.new_texts import make_new
from proof.plans.plan import Arm, Level, Plan
from proof.plans.restart import RestartSpec, is_given
from proof.plans.schedule import (
    CLOSED_LOOP_TEXTS,
    SLICE_WARM_UP,
    WARM_UP,
    Schedule,
    build_schedule,
    load_positions,
    slice_texts,
)

# Locust replaces time.sleep by gevent's, which has a grain of 1 ms. With one request in flight
# nothing else has to run meanwhile, and the original is finer.
sleep = monkey.get_original("time", "sleep")

TIMER_GRAIN_NS = 1_500_000
"""Error of gevent's timers: `_wait_until` sleeps until this long before a request, then polls."""
IDLE_S = 4.0
"""Longest idle time of a connection that is used again; servers close theirs (uvicorn: after 5 s).
"""
ANSWERED_WITHIN_S = 60.0
"""Longest wait for one answer."""
CONNECT_WITHIN_S = 5.0
"""Longest wait for a connection to a server that a plan wants."""
START_AFTER_NS = 5_000_000
"""Time between the preparation of an open loop and its first request."""


class Dispatcher(User):
    """Sends the schedule of one restart. There is exactly one: a second would send it twice."""

    abstract = not is_given()
    fixed_count = 1

    @task
    def send_once(self) -> None:
        """Send the schedule once and end Locust.

        It catches everything, because Locust repeats a task that raises.
        """
        spec = None
        try:
            spec = RestartSpec.from_environment()
            if spec is None:
                raise BadUsage("PLAN is not set any more; set it to a plan's file.")
            self._send_restart(spec)
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

    def _send_restart(self, spec: RestartSpec) -> None:
        plan = spec.read_plan()
        if spec.rows is None:
            check_servers(plan)
        run = spec.run or f"look-{plan.digest[:16]}"
        if not run.endswith(plan.digest[:16]):
            raise BadInput(
                f"{plan.path} has the digest {plan.digest[:16]}, and run {run} was started with"
                " another plan; give it the plan.toml of its own folder."
            )
        path = spec.rows or Path(f"evidence/looks/{uuid.uuid4().hex[:8]}.csv")
        rows = RowFile(path)
        try:
            cpu_shares = Restart(plan, spec, run, rows, self.environment).send()
        finally:
            rows.close()
        if spec.facts is not None:
            facts = {"generator_cpu_share": max(cpu_shares.values())}
            spec.facts.write_text(json.dumps(facts), encoding="utf-8")
        shares = ", ".join(f"{share:.0%} at {name}" for name, share in cpu_shares.items())
        print(f"{path}: one row per request; CPU of the generator: {shares}", file=sys.stderr)


def check_servers(plan: Plan) -> None:
    """Raise Unavailable, with the command that starts it, if a server of the plan is missing."""
    for url in dict.fromkeys(arm.url for arm in plan.arms if arm.url is not None):
        _check_server(url, "start it, or correct the plan's url")
    artifacts = [arm for arm in plan.arms if arm.artifact is not None]
    if artifacts:
        models = " ".join(f"{arm.name}={arm.artifact}" for arm in artifacts)
        delayed = any(plan.arms[i].by == "server" for i in plan.indices("delayed"))
        start = f"{'DRBERT_BUSY_WAIT=loopback ' if delayed else ''}drbert-serve {models}"
        _check_server(
            f"http://127.0.0.1:{plan.port}",
            f"start it with `{start} --port {plan.port}`. `drbert-prove run {plan.path}` starts and"
            " restarts it by itself",
        )


def _check_server(url: str, remedy: str) -> None:
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname or "127.0.0.1", port), CONNECT_WITHIN_S).close()
    except OSError as error:
        raise Unavailable(
            f"The plan's server at {url} did not answer ({error.strerror or error}); {remedy}."
        ) from None


class Restart:
    """All requests of one restart, level after level."""

    def __init__(
        self, plan: Plan, spec: RestartSpec, run: str, rows: RowFile, environment: Any
    ) -> None:
        self.plan = plan
        self.restart_number = spec.restart
        self.slot = spec.slot
        self.run = run
        self.rows = rows
        self.environment = environment
        self.texts = plan.read_texts()
        self.arms = _arm_clients(plan, spec, self.texts)
        """Clients by arm and by the copy that answers for it."""
        self.failed = False
        """Whether a request failed: the restart will not count, so nothing more is sent."""
        self.write_error: OSError | None = None
        """Why a row could not be written."""

    def send(self) -> dict[str, float]:
        """Send everything; return the share of a core that was used at each level."""
        senders: dict[str, Callable[[Level, Schedule], None]] = {
            "unloaded": self.send_one_at_a_time,
            "mixed": self.send_open_loop,
            "switchback": self.send_slices,
            "capacity": self.send_closed_loop,
            "repeat": self.send_one_at_a_time,
        }
        cpu_shares = {}
        for level in self.plan.levels:
            schedule = build_schedule(self.plan, level, self.slot, len(self.texts))
            cpu_s, wall_s = time.process_time(), time.monotonic()
            senders[level.kind](level, schedule)
            cpu_s, wall_s = time.process_time() - cpu_s, time.monotonic() - wall_s
            cpu_shares[level.name] = round(cpu_s / wall_s, 4)
            if self.failed:
                break
        if self.write_error is not None:
            raise Unavailable(f"{self.rows.path} cannot be written: {self.write_error}.")
        return cpu_shares

    def send_one_at_a_time(self, level: Level, schedule: Schedule) -> None:
        """Send each request after a pause that follows the previous answer.

        Pauses are multiples of the median service time of the warm-up.
        """
        service_s, unit_s = [0.002], 0.0
        for i in range(len(schedule)):
            if schedule.slice_id[i] != WARM_UP and not unit_s:
                unit_s = sorted(service_s)[len(service_s) // 2]
            row = self.send_and_record(self.prepare(level, schedule, i))
            if self.failed:
                return
            service_s.append((row.done_ns - row.sent_ns) / 1e9)
            sleep(schedule.pause[i] * (unit_s or service_s[-1]))

    def send_open_loop(self, level: Level, schedule: Schedule) -> None:
        """Send all requests of a level at their times."""
        self.send_on_time(level, schedule, range(len(schedule)))

    def send_slices(self, level: Level, schedule: Schedule) -> None:
        """Send one arm's slice at a time; the next begins when nothing is in flight."""
        size = level.slice_requests
        for first in range(0, len(schedule), size):
            self.warm_up_slice(self._client(schedule, first))
            self.send_on_time(level, schedule, range(first, first + size))
            if self.failed:
                return

    def send_closed_loop(self, level: Level, schedule: Schedule) -> None:
        """Keep a fixed number of requests to one arm in flight for the time of each slice."""
        for i in range(len(schedule)):
            self.warm_up_slice(self._client(schedule, i))
            self._send_closed_loop_slice(level, schedule, i)
            if self.failed:
                return

    def _send_closed_loop_slice(self, level: Level, schedule: Schedule, i: int) -> None:
        """Send one slice; it ends when its time is over and all its requests are answered."""
        arms = len(self.plan.claimed_arms) + len(self.plan.indices("delayed"))
        round_number = i // arms
        texts = slice_texts(
            self.plan, level, self.slot, round_number, len(self.texts), CLOSED_LOOP_TEXTS
        )
        block_ids = itertools.count()
        end_ns = time.monotonic_ns() + int(level.slice_s * 1e9)

        def send_until_end() -> None:
            while time.monotonic_ns() < end_ns and not self.failed:
                block_id = next(block_ids)
                text = int(texts[block_id % len(texts)])
                self.send_and_record(self.prepare(level, schedule, i, block_id, text))

        group = Group()
        for _ in range(level.in_flight):
            group.spawn(send_until_end)
        group.join()

    def send_on_time(self, level: Level, schedule: Schedule, requests: range) -> None:
        """Send each request at its time, whatever has been answered; return when all are.

        What can be prepared is prepared before a request is due. It is sent from this greenlet, and
        only its answer is awaited in another.
        """
        group = Group()
        begin_ns = time.monotonic_ns() + START_AFTER_NS
        for i in requests:
            scheduled_ns = begin_ns + int(schedule.offset_ns[i])
            request = self.prepare(level, schedule, i)
            request.connect()
            _wait_until(scheduled_ns)
            if self.failed:
                break
            request.send()
            group.spawn(self.record, request, scheduled_ns)
        group.join()

    def _client(self, schedule: Schedule, i: int) -> ArmClient:
        return self.arms[int(schedule.arm[i]), int(schedule.copy[i])]

    def warm_up_slice(self, arm: ArmClient) -> None:
        """Send unrecorded requests to an arm, one at a time."""
        for number in range(SLICE_WARM_UP):
            request = ArmRequest(arm, number % len(self.texts), "warm-up", {})
            request.send()
            request.receive()
            if not request.status:  # Nothing answers: the first measured request will report it.
                return

    def prepare(
        self,
        level: Level,
        schedule: Schedule,
        i: int,
        block_id: int | None = None,
        text: int | None = None,
    ) -> ArmRequest:
        """Return the i-th request of a schedule, ready to be sent.

        In a closed loop entry i is a slice; `block_id` and `text` name one of its requests.
        """
        if block_id is None:
            block_id = int(schedule.block_id[i])
        if text is None:
            text = int(schedule.text[i])
        slice_id, position = int(schedule.slice_id[i]), int(schedule.position[i])
        request_id = f"{level.name}.{self.restart_number}.{slice_id}.{block_id}.{position}"
        columns: dict[str, Any] = {
            "level": level.name,
            "chars": len(self.texts[text]),
            "slice_id": slice_id,
            "block_id": block_id,
            "position": position,
        }
        arm = self._client(schedule, i)
        if level.kind == "repeat":
            new_text = make_new(self.texts[text], self.run, self.restart_number, block_id, arm.name)
            columns["chars"] = len(new_text)
            return ArmRequest(arm, text, request_id, columns, arm.body(new_text))
        return ArmRequest(arm, text, request_id, columns)

    def send_and_record(self, request: ArmRequest) -> Row:
        """Send a request that is due at once, wait for its answer and append its row."""
        request.connect()
        scheduled_ns = time.monotonic_ns()
        request.send()
        return self.record(request, scheduled_ns)

    def record(self, request: ArmRequest, scheduled_ns: int) -> Row:
        """Wait for the answer to a request and append its row, whatever the answer is."""
        request.receive()
        row = self._row(request, scheduled_ns)
        try:
            if self.write_error is None:
                self.rows.append(row)
        except OSError as error:
            self.write_error = error
        succeeded = 200 <= row.status <= 299
        self.failed = self.failed or self.write_error is not None or not succeeded
        self.environment.events.request.fire(
            request_type="POST",
            name=row.arm,
            response_time=(row.done_ns - row.scheduled_ns) / 1e6,
            response_length=row.bytes,
            exception=None if succeeded else RuntimeError(f"status {row.status}"),
            context={},
        )
        return row

    def _row(self, request: ArmRequest, scheduled_ns: int) -> Row:
        timing = parse_server_timing(request.response_headers.get("server-timing", ""))
        phases_us = {phase: 1000 * ms for phase, ms in timing.phases_ms.items()}
        answer = read_answer(request.content)
        return Row(
            run=self.run,
            restart=self.restart_number,
            instance=request.response_headers.get("x-instance-id", f"r{self.restart_number}"),
            request_id=request.request_id,
            arm=request.arm.name,
            load_position=request.arm.load_position,
            text_id=request.text,
            tokens=answer.tokens,
            scheduled_ns=scheduled_ns,
            sent_ns=request.sent_ns,
            done_ns=request.done_ns,
            status=request.status,
            tokenize_us=phases_us.get("tokenize", 0.0),
            queue_us=phases_us.get("queue", 0.0),
            inference_us=phases_us.get("inference", 0.0),
            total_us=phases_us.get("total", 0.0),
            batch_size=timing.batch_size,
            batch_tokens=timing.batch_tokens,
            bytes=len(request.content),
            inference_cpu_us=phases_us.get("cpu", UNKNOWN),
            batch_id=timing.batch_id,
            first_of_shape=timing.first_of_shape,
            label=answer.label,
            score=answer.score,
            score_count=answer.score_count,
            score_checksum=answer.score_checksum,
            **request.schedule_columns,
        )


class ArmClient:
    """The path, headers and bodies of requests to one arm; bodies are built in advance."""

    def __init__(
        self,
        arm: Arm,
        copy: Arm,
        delay: float,
        load_position: int,
        pool: ConnectionPool,
        texts: list[str],
    ) -> None:
        """`delay` is the share by which an arm that is delayed is slower than its copy."""
        dialect = DIALECTS[copy.dialect]
        model = copy.model or (copy.name if copy.artifact else None)
        self.name = arm.name
        self.load_position = load_position
        self.pool = pool
        self.path = pool.path + dialect.path.format(model=model)
        self._dialect, self._model = dialect, model
        self.bodies = [self.body(text) for text in texts]
        self.headers = {"Content-Type": "application/json"} | headers_from(copy.headers_env)
        self.client_delay_share = 0.0
        """Share of its own duration by which the client delays each answer."""
        if arm.role == "delayed":
            if arm.by == "server":
                # A copy may be slowed down itself, by its headers: both delays add up.
                own = float(self.headers.get("X-Busy-Wait", 0.0))
                self.headers["X-Busy-Wait"] = repr((1 + own) * (1 + delay) - 1 if own else delay)
            else:
                self.client_delay_share = delay

    def body(self, text: str) -> bytes:
        """Return the body of a request for one text."""
        return json.dumps(self._dialect.body(self._model, text)).encode()


class ArmRequest:
    """One request to an arm: connect, send, receive. Without an answer its status stays 0."""

    def __init__(
        self,
        arm: ArmClient,
        text: int,
        request_id: str,
        schedule_columns: dict[str, Any],
        body: bytes | None = None,
    ) -> None:
        self.arm = arm
        self.text = text
        self.body = arm.bodies[text] if body is None else body
        self.request_id = request_id
        self.schedule_columns = schedule_columns
        """Columns of its row that identify it in the schedule."""
        self.headers = arm.headers | {"X-Request-Id": request_id}
        self.connection = arm.pool.acquire()
        self.sent_ns = self.done_ns = self.status = 0
        self.content = b""
        self.response_headers: dict[str, str] = {}
        """Headers of the answer, by their names in lower case."""

    def connect(self) -> None:
        """Open the connection if it is not open yet."""
        if self.connection.sock is None:
            # Ignored here: `send` fails and records it.
            with contextlib.suppress(OSError):
                self.connection.connect()

    def send(self) -> None:
        """Send the request."""
        self.sent_ns = time.monotonic_ns()
        try:
            self.connection.request("POST", self.arm.path, self.body, self.headers)
        except (OSError, HTTPException):
            self._fail()

    def receive(self) -> None:
        """Wait for the answer, and for the client's delay where the arm has one."""
        if not self.done_ns:
            try:
                response = self.connection.getresponse()
                self.content = response.read()
                self.done_ns = time.monotonic_ns()
                self.status = response.status
                self.response_headers = {
                    name.lower(): value for name, value in response.getheaders()
                }
                self.arm.pool.release(self.connection)
            except (OSError, HTTPException):
                self._fail()
        if self.arm.client_delay_share:
            end_ns = self.done_ns + int(self.arm.client_delay_share * (self.done_ns - self.sent_ns))
            while (now_ns := time.monotonic_ns()) < end_ns:
                pass
            self.done_ns = now_ns

    def _fail(self) -> None:
        self.done_ns = time.monotonic_ns()
        self.connection.close()


class ConnectionPool:
    """Open connections to one server; the one used last is used next."""

    def __init__(self, url: str) -> None:
        self.url = urlsplit(url)
        self.path = self.url.path.rstrip("/")
        self._idle: list[tuple[float, HTTPConnection]] = []

    def acquire(self) -> HTTPConnection:
        """Return an open connection, or a new one that is not open yet.

        The standard library's sends head and body at once and without Nagle's delay. A client that
        sends them apart sometimes waits 40 ms for an acknowledgement.
        """
        while self._idle:
            idle_since, connection = self._idle.pop()
            if time.monotonic() - idle_since < IDLE_S:
                return connection
            connection.close()
        kind = HTTPSConnection if self.url.scheme == "https" else HTTPConnection
        return kind(self.url.hostname or "127.0.0.1", self.url.port, timeout=ANSWERED_WITHIN_S)

    def release(self, connection: HTTPConnection) -> None:
        """Take a connection back, unless the server has closed it."""
        if connection.sock is not None:
            self._idle.append((time.monotonic(), connection))


def _arm_clients(
    plan: Plan, spec: RestartSpec, texts: list[str]
) -> dict[tuple[int, int], ArmClient]:
    """Return the clients by arm and copy: an arm is its own copy, the delayed arm any other's."""
    run_server_url = f"http://127.0.0.1:{plan.port}"
    delayed = plan.indices("delayed")
    pools: dict[str, ConnectionPool] = {}
    clients = {}
    for i, position in load_positions(plan, spec.slot).items():
        copy = plan.arms[i]
        url = spec.addresses.get(copy.name) or copy.url or run_server_url
        pool = pools.setdefault(url, ConnectionPool(url))
        for arm in (i, *delayed):
            clients[arm, i] = ArmClient(plan.arms[arm], copy, plan.delay, position, pool, texts)
    return clients


def _wait_until(due_ns: int) -> None:
    while (remaining_ns := due_ns - time.monotonic_ns()) > 0:
        is_far_off = remaining_ns > TIMER_GRAIN_NS
        gevent.sleep((remaining_ns - TIMER_GRAIN_NS) / 1e9 if is_far_off else 0)


@events.init.add_listener
def limit_to_one_dispatcher(environment: Any, **_: Any) -> None:
    """Set the number of users to one: further dispatchers would send everything again."""
    if is_given() and environment.parsed_options is not None:
        environment.parsed_options.num_users = 1
