"""
The scenarios: each starts a service of its own, does its worst, and says what became of every
request.
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

import httpx
import numpy as np
from scipy import stats

from benchmarks.harness.models_under_test import subject
from benchmarks.harness.processes import Process, free_port, our_service, started
from benchmarks.memory import meet_every_shape
from client.classify import Service, classify_lines
from tests.chaos.caller import Caller, Seen, closed, for_seconds, opened, request, texts
from tests.factories import write_artifact

MIB = 2**20
SENTENCES = texts(*Path("examples/texts/sentences.txt").read_text().splitlines()[:64])
LONG = texts(
    *(f"{number} " + "a charming and often affecting journey " * 20 for number in range(16))
)


@dataclass(frozen=True)
class Row:
    """A scenario's line in the table."""

    scenario: str
    done: str
    requests: int
    lost: int
    """Accepted requests without an answer."""
    hung: int
    """Requests that had no end within a minute."""
    figures: str
    holds: bool
    series: list[tuple[float, int, float]] = field(default_factory=list)
    """Of a soak: seconds since its beginning, anonymous bytes, and p99 in seconds since the entry
    before.
    """
    when: str = field(
        default_factory=lambda: f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC"
    )


def row(scenario: str, done: str, seen: Seen, lost: int, figures: str, holds: bool) -> Row:
    return Row(scenario, done, seen.requests, lost, seen.hung, figures, holds and not seen.hung)


@contextlib.contextmanager
def served(
    *more: str,
    module: Sequence[str] | None = None,
    admin: int | None = None,
    cpus: set[int] | None = None,
    settings: Mapping[str, str] | None = None,
    **variables: str,
) -> Iterator[Process]:
    """The example twin behind a service of its own; `settings` and `variables` are its DRBERT_*
    variables, without that prefix.
    """
    port = free_port()
    artifact = str(subject("mini").artifact.directory)
    command = (
        [sys.executable, "-m", *module, f"bert={artifact}", "--port", str(port)]
        if module
        else our_service(f"bert={artifact}", *more, port=port)
    )
    environment = {
        f"DRBERT_{name}": value for name, value in {**(settings or {}), **variables}.items()
    } | ({"DRBERT_ADMIN_PORT": str(admin)} if admin else {})
    with (
        tempfile.TemporaryDirectory() as folder,
        started(
            "chaos", command, port, Path(folder) / "log", environment=environment, cpus=cpus
        ) as server,
    ):
        yield server


@contextlib.contextmanager
def kept_to(cpus: set[int]) -> Iterator[None]:
    """This thread on these processors for as long."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def gauge(server: Process, name: str) -> float:
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=10) as response:
        found = re.search(rf"^{name}(?:{{[^}}]*}})? (\S+)$", response.read().decode(), re.M)
    assert found is not None, f"no metric {name}"
    return float(found[1])


def settled(server: Process) -> bool:
    """Whether, a moment later, nothing is being answered and nothing waits."""
    give_up = time.monotonic() + 30
    while time.monotonic() < give_up:
        if (
            gauge(server, "drbert_inflight_requests") == 0
            and gauge(server, "drbert_queue_depth") == 0
        ):
            return True
        time.sleep(0.05)
    return False


def told(seen: Seen) -> str:
    return ", ".join(f"{status}: {count:,}" for status, count in sorted(seen.statuses.items()))


def schemas(cases: int) -> Row:
    """Every operation of the OpenAPI description, with what it allows and what it does not."""
    seen, words, ok = Seen(), [], True
    checks = (
        "not_a_server_error,status_code_conformance,content_type_conformance,"
        "response_schema_conformance,unsupported_method"
    )
    for dialect in ("native", "infinity"):
        with tempfile.TemporaryDirectory() as folder:
            bag = write_artifact(Path(folder) / "bag")
            port = free_port()
            with started(
                "chaos",
                our_service(f"bert={bag.directory}", port=port),
                port,
                Path(folder) / "log",
                environment={"DRBERT_CLASSIFY_DIALECT": dialect},
            ) as server:
                only = ["--include-path", "/classify"] if dialect == "infinity" else []
                done = subprocess.run(
                    [
                        str(Path(sys.executable).with_name("schemathesis")),
                        "run",
                        f"{server.url}/openapi.json",
                        "--checks",
                        checks,
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
                        *only,
                    ],
                    capture_output=True,
                    text=True,
                    check=False,
                    cwd=folder,
                )
                found = re.search(r"([\d,]+) generated", done.stdout)
                seen.statuses[200] += int(found[1].replace(",", "")) if found else 0
                ok = ok and done.returncode == 0 and settled(server)
                if done.returncode:
                    words.append(done.stdout[-6000:])
    if words:
        print("\n".join(words), flush=True)
    return row(
        "schemathesis on every dialect",
        "valid and invalid requests of each operation",
        seen,
        0,
        f"{seen.statuses[200]:,} cases, no 500, no undocumented status",
        ok,
    )


async def half_requests(clients: int) -> Row:
    """Clients that send half a head or half a body and wait, beside one that asks as always."""
    seen, answers = Seen(), Seen()
    with served() as server:
        idle = await _answered_alone(server, answers)
        halves = [b"POST /classify HTTP/1.1\r\nHost: cha", request(b'{"input": "good"}')[:-5]]
        streams = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(clients)]
        for number, (_, writer) in enumerate(streams):
            writer.write(halves[number % 2])
        beside = await _answered_alone(server, answers)

        async def end(reader: asyncio.StreamReader) -> None:
            async with asyncio.timeout(60):
                answer = await reader.read()
            seen.note(int(answer[9:12]) if answer else None, 0.0)

        await asyncio.gather(*(end(reader) for reader, _ in streams))
        for _, writer in streams:
            writer.close()
        ok = (
            settled(server)
            and answers.statuses[200] == answers.requests
            and seen.statuses[408] == clients // 2
            and seen.requests == clients
        )
    return row(
        "half a request",
        f"{clients:,} clients stop in a head or a body; default settings",
        answers,
        answers.requests - answers.statuses[200],
        f"all {clients:,} closed, half with 408; p50 of others {1000 * beside:.1f} ms,"
        f" {1000 * idle:.1f} before",
        ok,
    )


async def _answered_alone(server: Process, seen: Seen) -> float:
    own = Seen()
    await closed(server.port, SENTENCES, 1, for_seconds(3), own)
    seen.statuses += own.statuses
    seen.unanswered += own.unanswered
    seen.hung += own.hung
    return own.percentile(50)


async def cancellations(seconds: float) -> Row:
    """Every other client leaves at a random moment."""
    seen, draw = Seen(), random.Random(0)
    with served() as server:
        until = for_seconds(seconds)
        left = asyncio.gather(*(_leave(server.port, until, draw) for _ in range(8)))
        await closed(server.port, SENTENCES, 8, until, seen)
        abandoned = sum(await left)
        ok = settled(server) and seen.statuses[200] == seen.requests
    return row(
        "clients that leave",
        f"8 callers stay, {abandoned:,} requests are abandoned in {seconds:.0f} s",
        seen,
        seen.requests - seen.statuses[200],
        f"{told(seen)}; nothing waits afterwards",
        ok,
    )


async def _leave(port: int, until: Callable[[], bool], draw: random.Random) -> int:
    """Abandons requests at random moments, and says how many."""
    left = 0
    while not until():
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(draw.choice(SENTENCES))
            await asyncio.sleep(draw.uniform(0, 0.05))
            writer.close()
            left += 1
    return left


async def termination(rounds: int) -> Row:
    """SIGTERM under load: what was sent before is answered, the process ends with 0."""
    seen, codes, lost = Seen(), [], 0
    for _ in range(rounds):
        with served() as server:
            stopped = asyncio.Event()
            before = Seen()

            async def one(
                number: int,
                server: Process = server,
                stopped: asyncio.Event = stopped,
                before: Seen = before,
            ) -> None:
                nonlocal lost
                caller = Caller(server.port)
                while True:
                    early = not stopped.is_set()
                    status = await caller.ask(SENTENCES[number % len(SENTENCES)])
                    # Sent before the signal, so it was accepted; a connection that closes on a
                    # later one is the refusal of it.
                    lost += early and status not in (200, 503)
                    if status != 200:
                        break
                    before.note(status, 0.0)
                    number += 16

            calling = [asyncio.create_task(one(i)) for i in range(16)]
            await asyncio.sleep(1.0)
            stopped.set()
            os.kill(server.process.pid, signal.SIGTERM)
            await asyncio.gather(*calling)
            codes.append(await asyncio.to_thread(server.process.wait, 30))
            seen.statuses += before.statuses
    return row(
        "SIGTERM under load",
        f"{rounds} times with 16 callers",
        seen,
        lost,
        f"{told(seen)}; exit codes {sorted(set(codes))}",
        lost == 0 and set(codes) == {0},
    )


def kill_and_restart() -> Row:
    """SIGKILL in the middle of a file; a supervisor starts the service again and drbert-classify
    goes on.
    """
    seen = Seen()
    lines = [f"{'good' if i % 3 else 'bad'} film number {i}" for i in range(2000)]
    artifact, port = str(subject("mini").artifact.directory), free_port()
    with (
        tempfile.TemporaryDirectory() as folder,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http,
    ):
        log = Path(folder) / "log"
        service = Service(http, {}, retry_timeout_s=120)
        with started("chaos", our_service(f"bert={artifact}", port=port), port, log) as first:
            rows = classify_lines(service, lines, batch_size=16, connections=4)
            got = [next(rows)[0] for _ in range(200)]
            first.process.kill()
            first.process.wait()
        with started("chaos", our_service(f"bert={artifact}", port=port), port, log):
            got += [line for line, answer in rows if answer is not None]
    seen.statuses[200] = len(got)
    return row(
        "SIGKILL and restart",
        "in the middle of 2,000 lines of drbert-classify",
        seen,
        len(lines) - len(got),
        "every line answered, in order",
        got == lines,
    )


async def reload(rounds: int) -> Row:
    """The model is loaded again and again under load, while some callers give up after milliseconds
    and others leave.
    """
    seen, hasty, admin = Seen(), Seen(), free_port()
    with served(admin=admin, WARM_UP_S="0.2") as server:
        done = False
        load = asyncio.gather(
            closed(server.port, SENTENCES, 8, lambda: done, seen),
            closed(
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
        left = asyncio.gather(
            *(_leave(server.port, lambda: done, random.Random(i)) for i in range(4))
        )
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{admin}", timeout=120) as private:
            changes = [await private.post("/models/bert", json={}) for _ in range(rounds)]
        done = True
        await load
        abandoned = sum(await left)
        in_time = set(hasty.statuses) <= {200, 429, 504} and hasty.unanswered == hasty.hung == 0
        ok = (
            settled(server)
            and in_time
            and seen.statuses[200] == seen.requests
            and all(change.status_code == 200 for change in changes)
        )
    took = max(change.json()["seconds"] for change in changes)
    figures = f"{told(seen)}; of the hasty {told(hasty)}; the longest reload {took:.1f} s"
    return row(
        "reload under load",
        f"{rounds} times with 8 callers, 4 of little patience, {abandoned:,} requests abandoned",
        seen,
        seen.requests - seen.statuses[200],
        figures,
        ok,
    )


async def engine(how: str) -> Row:
    """An engine that fails on texts of five words, and what the others see of it."""
    fatal, fine = (
        texts("one two three four five"),
        texts("one two", "a charming and often affecting journey of many words"),
    )
    if how in ("stalls", "breaks"):
        return await _end(how, fatal, fine)
    seen, spoiled = Seen(), Seen()
    with served(module=("tests.chaos.broken", how)) as server:
        until = for_seconds(4)
        await asyncio.gather(
            closed(server.port, fine, 6, until, seen), closed(server.port, fatal, 2, until, spoiled)
        )
        ok = (
            settled(server)
            and seen.statuses[200] == seen.requests
            and spoiled.statuses[500] == spoiled.requests > 0
        )
    words = {"raises": "raises", "nan": "answers NaN", "few": "answers too few rows"}[how]
    return row(
        f"an engine that {words}",
        "on every text of five words, 2 callers with those, 6 with others",
        seen,
        seen.requests - seen.statuses[200],
        f"the others {told(seen)}; its own {told(spoiled)}",
        ok,
    )


async def _end(how: str, fatal: list[bytes], fine: list[bytes]) -> Row:
    """An engine that nothing in the process mends: it ends, for its supervisor to start another."""
    seen = Seen()
    with served(module=("tests.chaos.broken", how), ENGINE_STALL_TIMEOUT_S="1") as server:
        await closed(server.port, fine, 2, for_seconds(1), seen)
        began = time.monotonic()
        waiting = Seen()
        asking = asyncio.gather(
            *(
                closed(server.port, messages, 1, _once(), waiting)
                for messages in (fatal, fine, fine)
            )
        )
        not_ready = None
        while server.process.poll() is None and time.monotonic() < began + 30:
            with contextlib.suppress(OSError):
                status = await Caller(server.port).ask(
                    b"GET /readyz HTTP/1.1\r\nHost: chaos\r\n\r\n"
                )
                if status == 503 and not_ready is None:
                    not_ready = time.monotonic() - began
            await asyncio.sleep(0.05)
        ended = time.monotonic() - began
        await asking
        code = server.process.poll()
    lost = waiting.requests - waiting.statuses[503] - waiting.statuses[200]
    if how == "breaks":
        # Of the text that broke it, and of those in its batch.
        lost -= waiting.statuses[500]
        ok = code == 70 and ended < 5 and waiting.statuses[500] > 0 and lost == 0
        return row(
            "an engine that breaks for good",
            "a text that it does not survive",
            seen,
            lost,
            f"waiting requests {told(waiting)}, ended after {ended:.1f} s with {code}",
            ok,
        )
    return row(
        "an engine that stalls",
        "DRBERT_ENGINE_STALL_TIMEOUT_S=1",
        seen,
        lost,
        f"not ready after {not_ready or 0:.1f} s, waiting requests {told(waiting)}, ended after"
        f" {ended:.1f} s with {code}",
        code == 70 and not_ready is not None and lost == 0,
    )


def _once() -> Callable[[], bool]:
    asked = iter((False,))
    return lambda: next(asked, True)


async def soak(seconds: float) -> Row:
    """Hours in small: 70 % of what it can do, after every shape and a full queue were met, and what
    grows once it has settled.

    Memory must not grow by 1 %, and in ten minutes or more 0 must lie within its slope's interval.
    Sooner an allocator has not settled.
    """
    seen = Seen()
    with served() as server:
        await asyncio.to_thread(meet_every_shape, server, 128)
        first = Seen()
        mixed = [
            *SENTENCES,
            *LONG[:4],
            *(
                request(
                    json.dumps({"input": ["good", "a bad film", "an affecting journey"]}).encode()
                )
                for _ in range(8)
            ),
        ]
        probed = max(5.0, seconds / 60)
        await closed(server.port, mixed, 16, for_seconds(probed), first)
        rate = 0.7 * first.statuses[200] / probed
        # As full as it gets, which it does when a shared machine's processors are taken away for
        # seconds: what that takes of memory stays with the allocator, and is no growth.
        await opened(server.port, mixed, 3 * rate, probed, Seen())
        parts: list[tuple[float, int, float]] = []
        part = max(2.0, seconds / 60)
        began = time.monotonic()
        while time.monotonic() < began + seconds:
            own = Seen()
            await opened(server.port, mixed, rate, part, own, seed=len(parts))
            seen.statuses += own.statuses
            seen.unanswered += own.unanswered
            seen.hung += own.hung
            parts.append((time.monotonic() - began, server.anonymous_bytes(), own.percentile(99)))
        # On a machine whose processors are taken away for a while, 70 % of what it could do is more
        # than it can: that much is refused.
        ok = settled(server) and set(seen.statuses) <= {200, 429} and not seen.unanswered
    memory, tail = trends(parts, seconds)
    found = row(
        "soak",
        f"{rate:,.0f} requests/s (70 %) for {seconds / 60:.0f} min, every shape and a full queue"
        " met before",
        seen,
        seen.requests - seen.statuses[200] - seen.statuses[429],
        f"{told(seen)}; memory {parts[-1][1] / MIB:.0f} MiB, {_shown(memory, 3)} over so long, its"
        f" first sixth left out; p99 {_shown(tail)}",
        ok and memory[0] < 1 and (memory[1] <= 0 or seconds < 600),
    )
    return dataclasses.replace(found, series=parts)


def trends(
    parts: Sequence[tuple[float, int, float]], seconds: float
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Growth of memory and of the tail over so many seconds, in percent, with intervals; the first
    sixth of (when, bytes, p99) is left out.
    """
    settled_parts = parts[len(parts) // 6 :]
    when, memory, tail = zip(*settled_parts, strict=True)
    return _growth(memory, when, seconds), _slope(tail, when, seconds)


def _growth(
    values: Sequence[float], when: Sequence[float], over_s: float
) -> tuple[float, float, float]:
    """What the values grow by in `over_s`, in percent of their median, with a 95 % interval.

    Memory is a staircase: each value stands on the one before, so it is the steps that are drawn
    again (percentile bootstrap), not the values. A leak steps all the time, and 0 is far outside; a
    page now and then leaves it inside.
    """
    steps = np.diff(values)
    draws = np.random.default_rng(0).choice(steps, (10_000, len(steps))).sum(axis=1)
    scale = 100 * over_s / (when[-1] - when[0]) / float(np.median(values))
    low, high = np.percentile(draws, (2.5, 97.5))
    return float(steps.sum() * scale), float(low * scale), float(high * scale)


def _slope(
    values: Sequence[float], when: Sequence[float], over_s: float
) -> tuple[float, float, float]:
    """What the values grow by in `over_s`, in percent of their median: by all pairs' slopes (Theil
    and Sen), with a 95 % interval.
    """
    slope, _, low, high = stats.theilslopes(values, when)
    level = sorted(values)[len(values) // 2]
    return tuple(float(100 * over_s * one / level) for one in (slope, low, high))  # type: ignore[return-value]


def _shown(slope: tuple[float, float, float], digits: int = 2) -> str:
    return f"{slope[0]:+.{digits}f} % ({slope[1]:+.{digits}f}…{slope[2]:+.{digits}f})"
