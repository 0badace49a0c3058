"""
The scenarios: each starts a service of its own, breaks something, and counts the outcomes.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import datetime
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from scipy import stats

from benchmarks.harness.models_under_test import model_under_test
from benchmarks.harness.processes import Server, running_server, service_command
from benchmarks.memory import run_every_shape
from client.classify import Service, classify_lines
from proof.measuring.launch import free_port
from tests.chaos.caller import (
    Caller,
    Outcomes,
    closed_loop,
    for_seconds,
    open_loop,
    request,
    text_requests,
)
from tests.factories import write_artifact

MIB = 2**20
SENTENCES = text_requests(*Path("examples/texts/sentences.txt").read_text().splitlines()[:64])
LONG = text_requests(
    *(f"{number} " + "a charming and often affecting journey " * 20 for number in range(16))
)


@dataclass(frozen=True)
class Row:
    """A scenario's line in the table."""

    scenario: str
    done: str
    """What the scenario did."""
    requests: int
    lost: int
    """Accepted requests without an answer."""
    hung: int
    """Requests without an answer within a minute."""
    figures: str
    """What was measured, as a sentence."""
    holds: bool
    series: list[tuple[float, int, float]] = field(default_factory=list)
    """Samples of a soak test.

    Each has seconds since the start, anonymous bytes, and the p99 in seconds since the sample
    before.
    """
    when: str = field(
        default_factory=lambda: f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC"
    )


def make_row(
    scenario: str, done: str, outcomes: Outcomes, lost: int, figures: str, holds: bool
) -> Row:
    """Return a scenario's row, which never holds if a request hung."""
    return Row(
        scenario, done, outcomes.requests, lost, outcomes.hung, figures, holds and not outcomes.hung
    )


@contextlib.contextmanager
def running_service(
    *more: str,
    module: Sequence[str] | None = None,
    admin: int | None = None,
    cpus: set[int] | None = None,
    settings: Mapping[str, str] | None = None,
    **variables: str,
) -> Iterator[Server]:
    """Run a service with the example twin.

    `more` are arguments of the service. `module` starts another module with its own first
    arguments instead. `settings` and `variables` are DRBERT_* variables without that prefix.
    """
    port = free_port()
    artifact = str(model_under_test("mini").artifact.directory)
    command = (
        [sys.executable, "-m", *module, f"bert={artifact}", "--port", str(port)]
        if module
        else service_command(f"bert={artifact}", *more, port=port)
    )
    environment = {
        f"DRBERT_{name}": value for name, value in {**(settings or {}), **variables}.items()
    } | ({"DRBERT_ADMIN_PORT": str(admin)} if admin else {})
    with (
        tempfile.TemporaryDirectory() as folder,
        running_server(
            "chaos", command, port, Path(folder) / "log", environment=environment, cpus=cpus
        ) as server,
    ):
        yield server


@contextlib.contextmanager
def pinned_to(cpus: set[int]) -> Iterator[None]:
    """Pin this thread to `cpus` for the block."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def read_gauge(server: Server, name: str) -> float:
    """Return the value of a metric."""
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=10) as response:
        match = re.search(rf"^{name}(?:{{[^}}]*}})? (\S+)$", response.read().decode(), re.M)
    assert match is not None, f"no metric {name}"
    return float(match[1])


def settles(server: Server) -> bool:
    """Return whether, within 30 s, no request is in flight and none waits."""
    give_up = time.monotonic() + 30
    while time.monotonic() < give_up:
        if (
            read_gauge(server, "drbert_inflight_requests") == 0
            and read_gauge(server, "drbert_queue_depth") == 0
        ):
            return True
        time.sleep(0.05)
    return False


CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,"
    "response_schema_conformance,unsupported_method"
)


def schemas(cases: int) -> Row:
    """Send valid and invalid requests for every operation of the OpenAPI description.

    schemathesis makes at most `cases` of them for each operation.
    """
    outcomes, reports, ok = Outcomes(), [], True
    # A model of natural language inference, so that labels of a request are judged, too.
    texts: dict[str, Any] = {"labels": ("contradiction", "entailment")}
    tokens: dict[str, Any] = {"task": "token_labels", "takes_pairs": False}
    reranker: dict[str, Any] = {"labels": ("LABEL_0",), "activation": "sigmoid"}
    everything: tuple[str, ...] = ()
    ranking = ("/rerank", "/v1/rerank", "/v2/rerank", "/score", "/v1/score")
    for dialect, model, paths in (
        ("native", texts, everything),
        ("infinity", texts, ("/classify",)),
        ("semantic-router", texts, ("/classify",)),
        ("ort-server", texts, ("/classify",)),
        ("native", tokens, ("/tokens", "/v1/tokens", "/pooling", "/", "/models/{model}")),
        ("native", reranker, ranking),
    ):
        with tempfile.TemporaryDirectory() as folder:
            bag = write_artifact(Path(folder) / "bag", **model)
            port = free_port()
            with running_server(
                "chaos",
                service_command(f"bert={bag.directory}", port=port),
                port,
                Path(folder) / "log",
                environment={"DRBERT_CLASSIFY_DIALECT": dialect},
            ) as server:
                only = [word for path in paths for word in ("--include-path", path)]
                done = _schemathesis(server, cases, Path(folder), only)
                match = re.search(r"([\d,]+) generated", done.stdout)
                outcomes.statuses[200] += int(match[1].replace(",", "")) if match else 0
                ok = ok and done.returncode == 0 and settles(server)
                if done.returncode:
                    reports.append(done.stdout[-6000:])
    if reports:
        print("\n".join(reports), flush=True)
    return make_row(
        "schemathesis on every dialect",
        "valid and invalid requests of each operation",
        outcomes,
        0,
        f"{outcomes.statuses[200]:,} cases, no 500, no undocumented status",
        ok,
    )


def _schemathesis(
    server: Server, cases: int, folder: Path, more: Sequence[str]
) -> subprocess.CompletedProcess[str]:
    """Run schemathesis in `folder` against a server, with `more` arguments."""
    return subprocess.run(
        [
            str(Path(sys.executable).with_name("schemathesis")),
            "run",
            f"{server.url}/openapi.json",
            "--checks",
            CHECKS,
            "--mode",
            "all",
            "--phases",
            "examples,coverage,fuzzing",
            "--max-examples",
            str(cases),
            "--continue-on-failure",
            "--no-color",
            "--seed",
            "1",
            "--request-timeout",
            "30",
            "--suppress-health-check",
            "all",
            "--generation-database",
            "none",
            *more,
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
    )


async def half_requests(clients: int) -> Row:
    """Send half a head or half a body from many clients, next to a client with whole requests."""
    outcomes, answers = Outcomes(), Outcomes()
    with running_service() as server:
        idle = await _single_caller(server, answers)
        halves = [b"POST /classify HTTP/1.1\r\nHost: cha", request(b'{"input": "good"}')[:-5]]
        streams = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(clients)]
        for number, (_, writer) in enumerate(streams):
            writer.write(halves[number % 2])
        busy = await _single_caller(server, answers)

        async def read_answer(reader: asyncio.StreamReader) -> None:
            async with asyncio.timeout(60):
                answer = await reader.read()
            outcomes.count(int(answer[9:12]) if answer else None, 0.0)

        await asyncio.gather(*(read_answer(reader) for reader, _ in streams))
        for _, writer in streams:
            writer.close()
        ok = (
            settles(server)
            and answers.statuses[200] == answers.requests
            and outcomes.statuses[408] == clients // 2
            and outcomes.requests == clients
        )
    return make_row(
        "half a request",
        f"{clients:,} clients stop in a head or a body; default settings",
        answers,
        answers.failed,
        f"all {clients:,} closed, half with 408; p50 of others {1000 * busy:.1f} ms,"
        f" {1000 * idle:.1f} before",
        ok,
    )


async def _single_caller(server: Server, outcomes: Outcomes) -> float:
    """Run one caller for 3 s, add its outcomes, and return its p50 in seconds."""
    part = Outcomes()
    await closed_loop(server.port, SENTENCES, 1, for_seconds(3), part)
    outcomes.add(part)
    return part.percentile(50)


async def cancellations(seconds: float) -> Row:
    """Disconnect every other client at a random moment of its request."""
    outcomes, rng = Outcomes(), random.Random(0)
    with running_service() as server:
        until = for_seconds(seconds)
        leaving = asyncio.gather(*(_abandon(server.port, until, rng) for _ in range(8)))
        await closed_loop(server.port, SENTENCES, 8, until, outcomes)
        abandoned = sum(await leaving)
        ok = settles(server) and outcomes.statuses[200] == outcomes.requests
    return make_row(
        "clients that leave",
        f"8 callers stay, {abandoned:,} requests are abandoned in {seconds:.0f} s",
        outcomes,
        outcomes.failed,
        f"{outcomes}; nothing waits afterwards",
        ok,
    )


async def _abandon(port: int, is_over: Callable[[], bool], rng: random.Random) -> int:
    """Abandon requests at random moments; return their number."""
    abandoned = 0
    while not is_over():
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(rng.choice(SENTENCES))
            await asyncio.sleep(rng.uniform(0, 0.05))
            writer.close()
            abandoned += 1
    return abandoned


async def termination(rounds: int) -> Row:
    """Send SIGTERM under load: requests sent before it are answered, the process ends with 0."""
    outcomes, codes, lost = Outcomes(), [], 0
    for _ in range(rounds):
        with running_service() as server:
            stopped = asyncio.Event()
            callers = [
                asyncio.create_task(_call_until_stopped(server.port, number, stopped, outcomes))
                for number in range(16)
            ]
            await asyncio.sleep(1.0)
            stopped.set()
            os.kill(server.process.pid, signal.SIGTERM)
            lost += sum(await asyncio.gather(*callers))
            codes.append(await asyncio.to_thread(server.process.wait, 30))
    return make_row(
        "SIGTERM under load",
        f"{rounds} times with 16 callers",
        outcomes,
        lost,
        f"{outcomes}; exit codes {sorted(set(codes))}",
        lost == 0 and set(codes) == {0},
    )


async def _call_until_stopped(
    port: int, number: int, stopped: asyncio.Event, outcomes: Outcomes
) -> int:
    """Send requests until one is not answered with 200; return how many were lost.

    A request sent before `stopped` is set was accepted, so it is lost if it gets neither 200 nor
    503. A connection that closes on a later one refuses it.
    """
    caller, lost = Caller(port), 0
    while True:
        accepted = not stopped.is_set()
        status = await caller.send(SENTENCES[number % len(SENTENCES)])
        lost += accepted and status not in (200, 503)
        if status != 200:
            return lost
        outcomes.count(status, 0.0)
        number += 16


def kill_and_restart() -> Row:
    """Send SIGKILL in the middle of a file and start the service again, as a supervisor would.

    drbert-classify must continue and lose no line.
    """
    outcomes = Outcomes()
    lines = [f"{'good' if i % 3 else 'bad'} film number {i}" for i in range(2000)]
    artifact, port = str(model_under_test("mini").artifact.directory), free_port()
    with (
        tempfile.TemporaryDirectory() as folder,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http,
    ):
        log = Path(folder) / "log"
        service = Service(http, {}, retry_timeout_s=120)
        with running_server(
            "chaos", service_command(f"bert={artifact}", port=port), port, log
        ) as first:
            rows = classify_lines(service, lines, batch_size=16, connections=4)
            got = [next(rows)[0] for _ in range(200)]
            first.process.kill()
            first.process.wait()
        with running_server("chaos", service_command(f"bert={artifact}", port=port), port, log):
            got += [line for line, answer in rows if answer is not None]
    outcomes.statuses[200] = len(got)
    return make_row(
        "SIGKILL and restart",
        "in the middle of 2,000 lines of drbert-classify",
        outcomes,
        len(lines) - len(got),
        "every line answered, in order",
        got == lines,
    )


async def reload(rounds: int) -> Row:
    """Reload the model again and again under load.

    Some callers have a deadline of milliseconds, and others disconnect.
    """
    outcomes, hasty, admin = Outcomes(), Outcomes(), free_port()
    with running_service(admin=admin, WARM_UP_S="0.2") as server:
        done = False
        load = asyncio.gather(
            closed_loop(server.port, SENTENCES, 8, lambda: done, outcomes),
            closed_loop(
                server.port,
                [
                    request(b'{"input": "good"}', X_Request_Timeout_Ms=str(ms))
                    for ms in range(1, 30)
                ],
                4,
                lambda: done,
                hasty,
            ),
        )
        leaving = asyncio.gather(
            *(_abandon(server.port, lambda: done, random.Random(i)) for i in range(4))
        )
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{admin}", timeout=120) as private:
            changes = [await private.post("/models/bert", json={}) for _ in range(rounds)]
        done = True
        await load
        abandoned = sum(await leaving)
        in_time = set(hasty.statuses) <= {200, 429, 504} and hasty.unanswered == hasty.hung == 0
        ok = (
            settles(server)
            and in_time
            and outcomes.statuses[200] == outcomes.requests
            and all(change.status_code == 200 for change in changes)
        )
    took = max(change.json()["seconds"] for change in changes)
    figures = f"{outcomes}; of the hasty {hasty}; the longest reload {took:.1f} s"
    return make_row(
        "reload under load",
        f"{rounds} times with 8 callers, 4 of little patience, {abandoned:,} requests abandoned",
        outcomes,
        outcomes.failed,
        figures,
        ok,
    )


async def engine(failure: str) -> Row:
    """Run an engine that fails on texts of five words, with callers of those and of others."""
    fatal, fine = (
        text_requests("one two three four five"),
        text_requests("one two", "a charming and often affecting journey of many words"),
    )
    if failure in ("stalls", "breaks"):
        return await _unrecoverable_engine(failure, fatal, fine)
    outcomes, spoiled = Outcomes(), Outcomes()
    with running_service(module=("tests.chaos.broken", failure)) as server:
        until = for_seconds(4)
        await asyncio.gather(
            closed_loop(server.port, fine, 6, until, outcomes),
            closed_loop(server.port, fatal, 2, until, spoiled),
        )
        ok = (
            settles(server)
            and outcomes.statuses[200] == outcomes.requests
            and spoiled.statuses[500] == spoiled.requests > 0
        )
    words = {"raises": "raises", "nan": "answers NaN", "few": "answers too few rows"}[failure]
    return make_row(
        f"an engine that {words}",
        "on every text of five words, 2 callers with those, 6 with others",
        outcomes,
        outcomes.failed,
        f"the others {outcomes}; its own {spoiled}",
        ok,
    )


async def _unrecoverable_engine(failure: str, fatal: list[bytes], fine: list[bytes]) -> Row:
    """Run an engine that cannot recover: the process ends, for its supervisor to start another."""
    outcomes = Outcomes()
    with running_service(
        module=("tests.chaos.broken", failure), ENGINE_STALL_TIMEOUT_S="1"
    ) as server:
        await closed_loop(server.port, fine, 2, for_seconds(1), outcomes)
        began = time.monotonic()
        waiting = Outcomes()
        calls = asyncio.gather(
            *(
                closed_loop(server.port, messages, 1, _once(), waiting)
                for messages in (fatal, fine, fine)
            )
        )
        not_ready = None
        while server.process.poll() is None and time.monotonic() < began + 30:
            with contextlib.suppress(OSError):
                status = await Caller(server.port).send(
                    b"GET /readyz HTTP/1.1\r\nHost: chaos\r\n\r\n"
                )
                if status == 503 and not_ready is None:
                    not_ready = time.monotonic() - began
            await asyncio.sleep(0.05)
        ended = time.monotonic() - began
        await calls
        code = server.process.poll()
    lost = waiting.requests - waiting.statuses[503] - waiting.statuses[200]
    if failure == "breaks":
        # The text that broke the engine, and those in its batch, are answered with 500.
        lost -= waiting.statuses[500]
        ok = code == 70 and ended < 5 and waiting.statuses[500] > 0 and lost == 0
        return make_row(
            "an engine that breaks for good",
            "a text that it does not survive",
            outcomes,
            lost,
            f"waiting requests {waiting}, ended after {ended:.1f} s with {code}",
            ok,
        )
    return make_row(
        "an engine that stalls",
        "DRBERT_ENGINE_STALL_TIMEOUT_S=1",
        outcomes,
        lost,
        f"not ready after {not_ready or 0:.1f} s, waiting requests {waiting}, ended after"
        f" {ended:.1f} s with {code}",
        code == 70 and not_ready is not None and lost == 0,
    )


def _once() -> Callable[[], bool]:
    """Return a function that returns False once and then True."""
    answers = iter((False,))
    return lambda: next(answers, True)


async def soak(seconds: float) -> Row:
    """Run a soak test at 70 % of the capacity, after every shape has run and the queue was full.

    Memory must not grow by 1 %. In ten minutes or more, 0 must also lie within the interval of its
    slope; in less time an allocator has not settled.
    """
    outcomes = Outcomes()
    with running_service() as server:
        await asyncio.to_thread(run_every_shape, server, 128)
        first = Outcomes()
        three_texts = json.dumps({"input": ["good", "a bad film", "an affecting journey"]})
        mixed = [*SENTENCES, *LONG[:4], *[request(three_texts.encode())] * 8]
        probed = max(5.0, seconds / 60)
        await closed_loop(server.port, mixed, 16, for_seconds(probed), first)
        rate = 0.7 * first.statuses[200] / probed
        # Fill the queue, as happens when a shared machine loses its processors for seconds. The
        # memory of that stays with the allocator and is not growth.
        await open_loop(server.port, mixed, 3 * rate, probed, Outcomes())
        parts: list[tuple[float, int, float]] = []
        part_s = max(2.0, seconds / 60)
        began = time.monotonic()
        while time.monotonic() < began + seconds:
            part = Outcomes()
            await open_loop(server.port, mixed, rate, part_s, part, seed=len(parts))
            outcomes.add(part)
            parts.append((time.monotonic() - began, server.anonymous_bytes(), part.percentile(99)))
        # While a shared machine lacks its processors, 70 % of its capacity is more than it can do,
        # and the excess is refused.
        ok = settles(server) and set(outcomes.statuses) <= {200, 429} and not outcomes.unanswered
    memory, tail = trends(parts, seconds)
    soaked = make_row(
        "soak",
        f"{rate:,.0f} requests/s (70 %) for {seconds / 60:.0f} min, every shape and a full queue"
        " met before",
        outcomes,
        outcomes.failed - outcomes.statuses[429],
        f"{outcomes}; memory {parts[-1][1] / MIB:.0f} MiB, {_shown(memory, 3)} over so long, its"
        f" first sixth left out; p99 {_shown(tail)}",
        ok and memory[0] < 1 and (memory[1] <= 0 or seconds < 600),
    )
    return dataclasses.replace(soaked, series=parts)


def trends(
    parts: Sequence[tuple[float, int, float]], seconds: float
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Return the growth of memory and of the p99 in `seconds`, in percent with 95 % intervals.

    The first sixth of `parts` (seconds, bytes, p99) is left out.
    """
    settled_parts = parts[len(parts) // 6 :]
    when, memory, tail = zip(*settled_parts, strict=True)
    return _growth(memory, when, seconds), _slope(tail, when, seconds)


def _growth(
    values: Sequence[float], when: Sequence[float], over_s: float
) -> tuple[float, float, float]:
    """Return the growth in `over_s` seconds, in percent of the median, with a 95 % interval.

    Memory is a staircase: each value contains the one before, so the steps are resampled
    (percentile bootstrap) and not the values. A leak steps all the time, so 0 is far outside the
    interval; a page now and then leaves it inside.
    """
    steps = np.diff(values)
    draws = np.random.default_rng(0).choice(steps, (10_000, len(steps))).sum(axis=1)
    scale = 100 * over_s / (when[-1] - when[0]) / float(np.median(values))
    low, high = np.percentile(draws, (2.5, 97.5))
    return float(steps.sum() * scale), float(low * scale), float(high * scale)


def _slope(
    values: Sequence[float], when: Sequence[float], over_s: float
) -> tuple[float, float, float]:
    """Return the growth in `over_s` seconds, in percent of the median, with a 95 % interval.

    It is the median slope of all pairs (Theil and Sen).
    """
    slope, _, low, high = stats.theilslopes(values, when)
    level = sorted(values)[len(values) // 2]
    scale = 100 * over_s / level
    return float(scale * slope), float(scale * low), float(scale * high)


def _shown(slope: tuple[float, float, float], digits: int = 2) -> str:
    return f"{slope[0]:+.{digits}f} % ({slope[1]:+.{digits}f}…{slope[2]:+.{digits}f})"
