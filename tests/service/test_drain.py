"""From SIGTERM to the exit: clients are sent to other replicas before a request is refused."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import math
import signal
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from service.artifact import Artifact
from service.http.transport.exchange import ConnectionPolicy
from tests.balancer import Balancer
from tests.factories import write_artifact
from tests.service.http.test_routes import client_of
from tests.service.test_server import free_port, ready, serving, start

BODY = json.dumps({"input": "good"})


@contextlib.contextmanager
def kept_connection(url: str) -> Iterator[http.client.HTTPConnection]:
    with contextlib.closing(
        http.client.HTTPConnection(url.removeprefix("http://"), timeout=30)
    ) as connection:
        connection.connect()
        yield connection


def ask(
    connection: http.client.HTTPConnection, method: str = "POST", path: str = "/classify"
) -> tuple[int, dict[str, str]]:
    connection.request(method, path, BODY if method == "POST" else None)
    answer = connection.getresponse()
    answer.read()
    return answer.status, {name.lower(): value for name, value in answer.getheaders()}


def wait_until_not_ready(url: str) -> None:
    give_up = time.monotonic() + 30
    while ready(url):
        assert time.monotonic() < give_up


def wait_until_it_listens_no_more(url: str) -> None:
    give_up = time.monotonic() + 30
    while time.monotonic() < give_up:
        try:
            with kept_connection(url):
                time.sleep(0.02)
        except ConnectionRefusedError:
            return
        except ConnectionResetError:  # it waited to be accepted
            continue
    raise AssertionError("it listens still")


@contextlib.contextmanager
def unread_answer(url: str, texts: int = 1000) -> Iterator[socket.socket]:
    """Yield a client that has requested megabytes and reads none of them."""
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        host, _, port = url.removeprefix("http://").partition(":")
        client.connect((host, int(port)))
        client.settimeout(30)
        body = json.dumps({"input": ["good"] * texts}).encode()
        client.sendall(
            b"POST /classify HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        )
        assert client.recv(12, socket.MSG_WAITALL) == b"HTTP/1.1 200"
        yield client


@pytest.fixture
def many_labels(tmp_path: Path) -> Artifact:
    return write_artifact(tmp_path / "many", labels=[f"label-{i}" for i in range(150)])


def test_requests_during_the_lame_duck_phase_are_answered_and_their_connections_closed(
    artifact: Artifact,
) -> None:
    with contextlib.ExitStack() as stack:
        url, process = stack.enter_context(
            serving(artifact, DRBERT_LAME_DUCK_S="9", DRBERT_ADMIN_PORT=str(admin := free_port()))
        )
        first, second, private = [
            stack.enter_context(kept_connection(at))
            for at in (url, url, f"http://127.0.0.1:{admin}")
        ]
        for connection in (first, second):
            status, headers = ask(connection)
            assert (status, headers.get("connection")) == (200, None)
        process.send_signal(signal.SIGTERM)
        wait_until_not_ready(url)
        late = stack.enter_context(
            kept_connection(url)
        )  # the load balancer has not noticed yet that it is not ready
        status, headers = ask(late, "GET", "/readyz")
        assert (status, headers["connection"], headers["retry-after"]) == (503, "close", "1")
        for connection in (first, second, late):
            status, headers = ask(connection)
            assert (status, headers["connection"]) == (200, "close")
        status, headers = ask(private, "GET", "/info")
        assert (status, headers["connection"]) == (200, "close")
        output = process.communicate(timeout=30)[0]
        assert process.returncode == 0
    assert [json.loads(line)["event"] for line in output.splitlines()] == [
        "model ready",
        "ready",
        "draining",
        "drained",
    ]


def test_pipelined_requests_during_the_drain_are_all_answered(artifact: Artifact) -> None:
    with (
        serving(artifact, DRBERT_LAME_DUCK_S="9") as (url, process),
        socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=30) as client,
    ):
        process.send_signal(signal.SIGTERM)
        wait_until_not_ready(url)
        client.sendall(
            b"POST /classify HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%s"
            % (len(BODY), BODY.encode())
            * 20
        )
        answers = b""
        while data := client.recv(65_536):
            answers += data
        assert answers.count(b"HTTP/1.1 200 OK") == 20
        assert answers.count(b"connection: close") == 1
        assert process.wait(timeout=30) == 0


def test_the_drain_ends_at_once_without_clients(artifact: Artifact) -> None:
    with serving(artifact, DRBERT_LAME_DUCK_S="300", DRBERT_DRAIN_TIMEOUT_S="600") as (_, process):
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0


def test_the_drain_ends_once_all_clients_have_disconnected(artifact: Artifact) -> None:
    with (
        serving(artifact, DRBERT_LAME_DUCK_S="300", DRBERT_DRAIN_TIMEOUT_S="600") as (url, process),
        kept_connection(url) as connection,
    ):
        process.send_signal(signal.SIGTERM)
        wait_until_not_ready(url)
        assert ask(connection)[0] == 200
        assert process.wait(timeout=60) == 0


@pytest.mark.parametrize(
    "settings",
    [{"DRBERT_LAME_DUCK_S": "0.3"}, {"DRBERT_LAME_DUCK_S": "600", "DRBERT_DRAIN_TIMEOUT_S": "1"}],
)
def test_an_idle_connection_is_closed_at_the_end_of_the_drain(
    artifact: Artifact, settings: dict[str, str]
) -> None:
    with serving(artifact, **settings) as (url, process), kept_connection(url) as idle:
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
        assert idle.sock.recv(1) == b""


def test_requests_after_the_lame_duck_phase_are_refused_with_the_reason(
    many_labels: Artifact,
) -> None:
    with (
        serving(many_labels, DRBERT_LAME_DUCK_S="0.2", DRBERT_DRAIN_TIMEOUT_S="60") as (
            url,
            process,
        ),
        unread_answer(url) as client,
        kept_connection(url) as connection,
    ):
        process.send_signal(signal.SIGTERM)
        wait_until_it_listens_no_more(url)  # the unread answer holds the end up
        status, headers = ask(connection)
        assert (status, headers["connection"], headers["retry-after"]) == (503, "close", "1")
        while client.recv(1_000_000):
            pass
        assert process.wait(timeout=60) == 0


async def test_a_drain_is_reported_in_every_dialect(artifact: Artifact) -> None:
    async with client_of(artifact) as (client, service):
        await service.lifecycle.drain()
        for path in (
            "/classify",
            "/v1/classify",
            "/predict",
            "/",
            "/models/reviews",
            "/v1/models/reviews:predict",
            "/v2/models/reviews/infer",
        ):
            instances = (
                {"instances": ["good"]}
                if "v1/models" in path
                else (
                    {
                        "inputs": [
                            {"name": "text", "shape": [1], "datatype": "BYTES", "data": ["good"]}
                        ]
                    }
                    if "v2" in path
                    else {"inputs": "good"}
                )
            )
            answer = await client.post(path, json=instances)
            assert (
                answer.status_code,
                answer.headers["connection"],
                answer.headers["retry-after"],
            ) == (503, "close", "1"), path
        answer = await client.get("/readyz")
        assert (
            answer.status_code,
            answer.headers["connection"],
            answer.headers["retry-after"],
        ) == (503, "close", "1")


async def test_a_lame_duck_is_not_ready_and_still_answers(artifact: Artifact) -> None:
    async with client_of(artifact) as (client, service):
        service.lifecycle.start_draining()
        assert (await client.get("/readyz")).status_code == 503
        assert (await client.post("/classify", content=BODY)).status_code == 200
        assert service.metrics.registry.get_sample_value("drbert_ready") == 0


def test_clients_that_never_read_cause_no_traceback_at_the_end(many_labels: Artifact) -> None:
    with (
        serving(many_labels, DRBERT_DRAIN_TIMEOUT_S="2") as (url, process),
        contextlib.ExitStack() as clients,
    ):
        for _ in range(3):
            clients.enter_context(unread_answer(url))
        process.send_signal(signal.SIGTERM)
        output = process.communicate(timeout=60)[0]
        assert process.returncode == 0
    assert [json.loads(line)["event"] for line in output.splitlines()] == [
        "model ready",
        "ready",
        "draining",
        "drained",
    ]


def test_a_client_that_never_reads_does_not_delay_the_end(many_labels: Artifact) -> None:
    with (
        serving(
            many_labels,
            DRBERT_LAME_DUCK_S="0",
            DRBERT_WRITE_TIMEOUT_S="1",
            DRBERT_DRAIN_TIMEOUT_S="600",
        ) as (url, process),
        unread_answer(url),
    ):
        process.send_signal(signal.SIGTERM)
        output = process.communicate(timeout=60)[0]
        assert process.returncode == 0
    assert "A client read nothing of its answer for 1 s; its connection was aborted." in output


def test_half_a_body_causes_no_traceback_at_the_end(artifact: Artifact) -> None:
    with (
        serving(artifact, DRBERT_DRAIN_TIMEOUT_S="2") as (url, process),
        socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=30) as client,
    ):
        client.sendall(b"POST /classify HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\nabc")
        give_up = time.monotonic() + 30
        while "drbert_inflight_requests 1.0" not in httpx.get(f"{url}/metrics").text:
            assert time.monotonic() < give_up
        process.send_signal(signal.SIGTERM)
        output = process.communicate(timeout=60)[0]
        assert process.returncode == 0
    assert [json.loads(line)["event"] for line in output.splitlines()] == [
        "model ready",
        "ready",
        "draining",
        "drained",
    ]


def test_a_lingering_connection_does_not_delay_the_end(artifact: Artifact) -> None:
    with (
        serving(artifact) as (url, process),
        socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=30) as client,
    ):
        client.sendall(
            b"POST /classify HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nno size\r\n"
        )
        assert client.recv(12) == b"HTTP/1.1 400"
        process.send_signal(signal.SIGTERM)
        output = process.communicate(timeout=60)[0]
        assert process.returncode == 0
    events = [json.loads(line)["event"] for line in output.splitlines()]
    assert events == [
        "model ready",
        "ready",
        "Invalid HTTP request received.",
        "draining",
        "drained",
    ]


async def test_a_rolling_restart_loses_no_request_of_clients_with_connection_pools(
    artifact: Artifact,
) -> None:
    ports = [free_port(), free_port()]
    processes: dict[int, subprocess.Popen[str]] = {}
    stop, outcomes = asyncio.Event(), Counter[str]()

    async def begin(port: int) -> None:
        processes[port] = start(
            f"reviews={artifact.directory}", "--port", str(port), DRBERT_LAME_DUCK_S="2"
        )
        while not await asyncio.to_thread(ready, f"http://127.0.0.1:{port}"):
            assert processes[port].poll() is None
            await asyncio.sleep(0.05)

    async def call(client: httpx.AsyncClient) -> None:
        while not stop.is_set():
            try:
                outcomes[str((await client.post("/classify", content=BODY)).status_code)] += 1
            except httpx.HTTPError as error:
                outcomes[type(error).__name__] += 1
            await asyncio.sleep(0.01)

    try:
        await asyncio.gather(*map(begin, ports))
        async with Balancer(ports).running() as balancer, contextlib.AsyncExitStack() as pools:
            clients = [
                await pools.enter_async_context(
                    httpx.AsyncClient(base_url=f"http://127.0.0.1:{balancer.port}", timeout=60)
                )
                for _ in range(8)
            ]
            calls = [asyncio.create_task(call(client)) for client in clients for _ in range(2)]
            for port in ports:
                await asyncio.sleep(0.3)
                process = processes[port]
                process.send_signal(signal.SIGTERM)
                output = (await asyncio.to_thread(process.communicate))[0]
                assert process.returncode == 0, output
                assert "Traceback" not in output
                await begin(port)
                await balancer.wait_until_ready(port, True)
            await asyncio.sleep(0.3)
            stop.set()
            await asyncio.gather(*calls)
    finally:
        for process in processes.values():
            process.kill()
            process.communicate()
    assert set(outcomes) == {"200"}, outcomes
    assert outcomes["200"] > 100


def test_a_connection_ends_after_so_many_requests_and_a_new_one_goes_on(artifact: Artifact) -> None:
    with serving(artifact, DRBERT_MAX_CONNECTION_REQUESTS="3") as (url, _):
        for _ in range(2):
            with kept_connection(url) as connection:
                answers = [ask(connection) for _ in range(3)]
        assert [status for status, _ in answers] == [200] * 3
        assert [headers.get("connection") for _, headers in answers] == [None, None, "close"]


def test_an_old_connection_ends_with_its_next_answer(artifact: Artifact) -> None:
    with (
        serving(artifact, DRBERT_MAX_CONNECTION_AGE_S="0.5") as (url, _),
        kept_connection(url) as connection,
    ):
        time.sleep(0.6)
        status, headers = ask(connection)
        assert (status, headers["connection"]) == (200, "close")


def test_connections_that_began_together_end_at_different_times() -> None:
    policy = ConnectionPolicy(max_age_s=100.0, max_requests=1000)
    lives = [policy.lifetime(now=50.0) for _ in range(200)]
    ends, counts = {end for end, _ in lives}, {count for _, count in lives}
    assert 140 <= min(ends) < max(ends) <= 160
    assert 900 <= min(counts) < max(counts) <= 1100
    assert ConnectionPolicy().lifetime(now=50.0) == (math.inf, math.inf)
