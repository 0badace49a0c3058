"""
Sends a plan's requests to its arms, one at a time, and appends a row for each.

    PLAN=examples/plans/demo.toml locust -f loadtests/ --headless       one restart of a plan against servers that run
    locust -f loadtests/ --headless --host http://127.0.0.1:8000         a look at one server's first two models

`python -m proof run` starts this once a restart. Locust's own percentiles are rounded to a
millisecond and more, so the rows are ours; Locust shows the arms while they run.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import sys
import time
import traceback
import urllib.request
import uuid
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from gevent import monkey
from locust import User, events, task

from command import BUG, BadInput, BadUsage, CommandError
from proof.evidence import Row, RowFile
from proof.plan import Plan, Send, plan_for_two, read_plan

# Locust patches time.sleep; with one request in flight nothing else is due, and the real one is finer than gevent's 1 ms.
sleep = monkey.get_original("time", "sleep")
_TIMING = re.compile(r'(\w+);dur=([\d.]+)(?:;desc="b=(\d+) t=(\d+)")?')
LOOK_TEXTS = Path(__file__).parent.parent / "examples" / "texts" / "sentences.txt"


class Dispatcher(User):
    """Walks through one restart's schedule; there is exactly one."""

    fixed_count = 1

    @task
    def restart(self) -> None:
        """Sends the schedule once and ends Locust, whatever happens: a task that raised would be run again."""
        try:
            self._restart()
        except CommandError as error:
            print(error, file=sys.stderr)
            self.environment.process_exit_code = error.exit_code
        except Exception:
            traceback.print_exc()
            self.environment.process_exit_code = BUG
        finally:
            self.environment.runner.quit()

    def _restart(self) -> None:
        plan = _plan(self.environment.host)
        restart, slot = int(os.environ.get("RESTART", "0")), int(os.environ.get("SLOT", "0"))
        run = os.environ.get("RUN", f"look-{plan.digest[:16]}")
        if not run.endswith(plan.digest[:16]):
            raise BadInput(f"{plan.path} is not the plan that run {run} was begun with.")
        path = Path(os.environ.get("ROWS", f"evidence/looks/{uuid.uuid4().hex[:8]}.csv"))
        rows = RowFile(path)
        try:
            share = _walk(plan, restart, slot, run, rows, self.environment)
        finally:
            rows.close()
        if "FACTS" in os.environ:
            Path(os.environ["FACTS"]).write_text(json.dumps({"generator_cpu_share": share}))
        print(f"{path}: one row a request; the generator used {share:.0%} of a core", file=sys.stderr)


def _plan(host: str | None) -> Plan:
    if "PLAN" in os.environ:
        plan = read_plan(Path(os.environ["PLAN"]))
        return dataclasses.replace(plan, texts=Path(os.environ.get("TEXTS", plan.texts)))
    if not host:
        raise BadUsage("Set PLAN=plan.toml, or give --host URL for a look at one server's first two models.")
    with urllib.request.urlopen(f"{host.rstrip('/')}/v1/models", timeout=10) as response:
        models = [model["id"] for model in json.load(response)["data"]][:2]
    return plan_for_two(host.rstrip("/"), models, LOOK_TEXTS)


def _walk(plan: Plan, restart: int, slot: int, run: str, rows: RowFile, environment: Any) -> float:
    """Sends everything; returns the share of a core the generator used while it measured."""
    texts = plan.read_texts()
    positions = {arm: position for position, arm in enumerate(plan.load_order(slot))}
    urls = [arm.url or f"http://127.0.0.1:{plan.port}" for arm in plan.arms]
    connections = {url: _connect(url) for url in set(urls)}
    bodies = [[json.dumps({"model": arm.model or arm.name, "input": text}).encode() for text in texts] for arm in plan.arms]
    service_s: list[float] = []
    pause_unit_s = 0.002
    cpu_began = wall_began = 0.0
    for send in plan.schedule(slot, len(texts)):
        if send.slice == 0 and not wall_began:
            pause_unit_s = sorted(service_s)[len(service_s) // 2] if service_s else pause_unit_s
            cpu_began, wall_began = time.process_time(), time.monotonic()
        # With one request in flight nothing is due at a time of its own: a request is scheduled when the pause is over.
        row = _send(connections[urls[send.arm]], bodies[send.arm][send.text], send, plan, restart, run, positions[send.arm], texts)
        rows.append(row)
        service_s.append((row.done_ns - row.sent_ns) / 1e9)
        failure = None if row.status == 200 else RuntimeError(f"status {row.status}")
        environment.events.request.fire(
            request_type="POST", name=row.arm, response_time=(row.done_ns - row.sent_ns) / 1e6,
            response_length=row.bytes, exception=failure, context={},
        )
        sleep(send.pause * pause_unit_s)
    return (time.process_time() - cpu_began) / max(1e-9, time.monotonic() - wall_began)


def _connect(url: str) -> HTTPConnection:
    """A connection that is kept: the standard library's sends head and body at once and without Nagle's delay,
    where a client that sends them apart waits 40 ms for an acknowledgement now and then."""
    parts = urlsplit(url)
    kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
    return kind(parts.hostname or "127.0.0.1", parts.port, timeout=60)


def _send(
    connection: HTTPConnection, body: bytes, send: Send, plan: Plan, restart: int, run: str, position: int, texts: list[str]
) -> Row:
    scheduled_ns = time.monotonic_ns()
    request_id = f"{restart}-{send.tuple}-{send.place}"
    headers = {"Content-Type": "application/json", "X-Request-Id": request_id}
    content, status, answered = b"", 0, dict[str, str]()
    sent_ns = time.monotonic_ns()
    try:
        connection.request("POST", "/classify", body, headers)
        response = connection.getresponse()
        content = response.read()
        done_ns = time.monotonic_ns()
        status, answered = response.status, {name.lower(): value for name, value in response.getheaders()}
    except (OSError, HTTPException):
        # No answer is a row as well: the judge must see it.
        done_ns = time.monotonic_ns()
        connection.close()
    timing, batch_size, batch_tokens = _timing(answered.get("server-timing", ""))
    tokens = json.loads(content)["usage"]["prompt_tokens"] if status == 200 else 0
    return Row(
        run=run, level=plan.level.name, restart=restart, instance=answered.get("x-instance-id", ""), slice=send.slice,
        tuple=send.tuple, place=send.place, request_id=request_id, arm=plan.arms[send.arm].name, load_position=position,
        text_id=send.text, chars=len(texts[send.text]), tokens=tokens, scheduled_ns=scheduled_ns, sent_ns=sent_ns, done_ns=done_ns,
        status=status, tokenize_us=timing.get("tokenize", 0.0), queue_us=timing.get("queue", 0.0),
        inference_us=timing.get("inference", 0.0), total_us=timing.get("total", 0.0),
        batch_size=batch_size, batch_tokens=batch_tokens, bytes=len(content),
    )


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
    """One user, ever: more dispatchers would put more than one request in flight."""
    if environment.parsed_options is not None:
        environment.parsed_options.num_users = 1
