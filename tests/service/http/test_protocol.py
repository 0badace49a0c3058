"""Time limits of a connection, timeouts that clients set, and upgrades."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import signal
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
import uvicorn
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from service.artifact import Artifact
from service.http.context import HttpContext, RequestHooks
from service.http.keys import Keys
from service.http.routes import build_app
from service.http.transport import protocol, request
from service.http.transport.exchange import ConnectionPolicy
from service.http.transport.request import ByteBudget
from service.server import bind, uvicorn_config
from service.settings import Settings
from service.state import ServiceState
from tests.factories import write_artifact
from tests.service.http.test_routes import classify, client_of, stuck, until
from tests.service.test_server import serving


async def test_a_request_may_set_a_shorter_timeout_than_the_service(artifact: Artifact) -> None:
    async with client_of(artifact) as (client, service):
        async with stuck(service):
            first = asyncio.create_task(classify(client, {"input": "good"}))
            await until(
                lambda: service.lifecycle.active_requests == 1 and service.batcher.waiting == 0
            )
            late = await client.post(
                "/classify", json={"input": "good"}, headers={"X-Request-Timeout-Ms": "60"}
            )
            assert not first.done()
        answered = await first
    assert late.status_code == 504
    assert late.json()["error"]["code"] == "deadline_exceeded"
    assert answered.status_code == 200
    # The late one never reached the model.
    assert (
        service.metrics.registry.get_sample_value("drbert_batch_size_sum", {"model": "reviews"})
        == 1
    )


@pytest.mark.parametrize("value", ["0", "-1", "soon", "nan", ""])
async def test_an_invalid_timeout_is_refused_by_name(artifact: Artifact, value: str) -> None:
    async with client_of(artifact) as (client, _):
        response = await client.post(
            "/classify", json={"input": "good"}, headers={"X-Request-Timeout-Ms": value}
        )
    assert response.status_code == 422
    assert response.json()["error"]["param"] == "X-Request-Timeout-Ms"


async def test_a_timeout_above_the_services_own_is_lowered_to_it(artifact: Artifact) -> None:
    assert request.read_timeout(b"999999999", 30.0) == 30.0
    assert request.read_timeout(b"1500", 30.0) == 1.5
    assert request.read_timeout(None, 30.0) == 30.0


async def test_a_body_that_never_ends_is_408(artifact: Artifact) -> None:
    async def half() -> AsyncIterator[bytes]:
        yield b'{"input": "go'
        await asyncio.sleep(30)
        yield b'od"}'

    async with client_of(artifact, request_timeout_s=0.1) as (client, _):
        response = await client.post("/classify", content=half())
    assert response.status_code == 408
    assert response.json()["error"] == {
        "message": "The body was not complete after 0.1 s; 13 bytes of it were read.",
        "type": "timeout_error",
        "param": "body",
        "code": "body_too_slow",
    }
    assert response.headers["connection"] == "close"


@asynccontextmanager
async def listening(
    app: ASGIApp, policy: ConnectionPolicy | None = None
) -> AsyncIterator[Callable[[], Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]]:
    """Serve an app over LimitedHttpProtocol, and yield a function that connects to it."""
    sock = bind("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn_config(app, policy))
    running = asyncio.create_task(server.serve([sock]))
    while not server.started:
        await asyncio.sleep(0.01)
    opened: list[asyncio.StreamWriter] = []

    async def connect() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", sock.getsockname()[1])
        opened.append(writer)
        return reader, writer

    try:
        async with asyncio.timeout(20):
            yield connect
    finally:
        for writer in opened:
            writer.close()
        server.should_exit = True
        await running


async def test_a_connection_without_a_complete_head_is_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(protocol, "HEAD_TIMEOUT_S", 0.2)

    async def app(scope: object, receive: object, send: object) -> None:
        raise AssertionError("nothing whole was asked")

    async with listening(app) as connect:
        silent, slow = await connect(), await connect()
        slow[1].write(b"POST /classify HTTP/1.1\r\nHost: a\r\nX-")
        for _ in range(3):  # a byte now and then makes it no better
            await asyncio.sleep(0.05)
            slow[1].write(b"a")
        assert [await reader.read() for reader, _ in (silent, slow)] == [b"", b""]


async def test_a_connection_is_closed_if_a_body_was_answered_before_its_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(protocol, "HEAD_TIMEOUT_S", 0.2)
    async with listening(PlainTextResponse("no", 405)) as connect:
        reader, writer = await connect()
        writer.write(b"POST /livez HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n")
        assert (await reader.readline()).startswith(b"HTTP/1.1 405")
        writer.write(b"a")
        assert (await reader.read()).endswith(b"no")


async def test_a_head_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    async with listening(PlainTextResponse("yes")) as connect:
        reader, writer = await connect()
        writer.write(b"GET /livez HTTP/1.1\r\nHost: a\r\n")
        line = b"X-Long: " + b"a" * 8000 + b"\r\n"
        with contextlib.suppress(ConnectionError):
            for _ in range(1000):
                writer.write(line)
                await writer.drain()
        with contextlib.suppress(
            ConnectionResetError
        ):  # bytes that arrive after the answer can reset the connection
            assert b"The head is longer than 65536 bytes." in await reader.read()


UPGRADE = (
    b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings:"
    b" AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA\r\n"
)


@pytest.mark.parametrize(
    "upgrade", [UPGRADE, b"Connection: keep-alive, Upgrade\r\nUpgrade: websocket\r\n", b""]
)
@pytest.mark.parametrize("pieces", [1, 2, 3])
async def test_an_upgrade_to_another_protocol_is_ignored(upgrade: bytes, pieces: int) -> None:
    async def echo(scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        await PlainTextResponse(f"{request.url.path} {(await request.body()).decode()}")(
            scope, receive, send
        )

    async with listening(echo) as connect:
        reader, writer = await connect()
        for body in (b"first", b"second"):
            head = b"POST /%b HTTP/1.1\r\nHost: a\r\n%bContent-Length: %d\r\n\r\n" % (
                body,
                upgrade,
                len(body),
            )
            for piece in ((head + body,), (head, body), (head[:30], head[30:], body))[pieces - 1]:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0.01)
            answer = await reader.readuntil(b"\r\n\r\n")
            assert answer.startswith(b"HTTP/1.1 200")
            expected = b"/%b %b" % (body, body)
            assert await reader.readexactly(len(expected)) == expected


async def test_connect_is_refused() -> None:
    async with listening(PlainTextResponse("yes")) as connect:
        for target in (b"/", b"example.org:80"):
            reader, writer = await connect()
            writer.write(b"CONNECT %b HTTP/1.1\r\nHost: a\r\n\r\n" % target)
            assert (await reader.read()).startswith(b"HTTP/1.1 400")


async def test_without_a_key_no_body_is_read(
    artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ByteBudget, "acquire", lambda *_: pytest.fail("it was kept"))
    (tmp_path / "keys").write_text("secret\n")
    service = ServiceState({"reviews": artifact}, Settings(warm_up_s=0))
    service.lifecycle.load()
    app = build_app(HttpContext(service, RequestHooks(keys=Keys(tmp_path / "keys"))))
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://test"
    ) as client:
        assert (await client.post("/classify", content=b" " * 100_000)).status_code == 401
    await service.lifecycle.drain()


async def test_all_bodies_together_have_a_byte_budget_and_return_their_bytes(
    artifact: Artifact,
) -> None:
    body, go_on = b'{"input":"good"}', asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        yield body[:10]
        await go_on.wait()
        yield body[10:]

    async with client_of(artifact, max_body_bytes=16, max_inflight_body_bytes=20) as (
        client,
        service,
    ):
        first = asyncio.create_task(client.post("/classify", content=slow()))
        await until(lambda: service.lifecycle.active_requests == 1)
        refused = await client.post("/classify", content=body)
        go_on.set()
        assert (await first).status_code == 200
        assert [(await client.post("/classify", content=body)).status_code for _ in range(3)] == [
            200,
            200,
            200,
        ]
        too_large = await client.post("/classify", content=body + b" ")
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
    assert (
        refused.json()["error"]["message"]
        == "The bodies of all requests hold 10 bytes, the limit is 20; retry later."
    )
    assert too_large.status_code == 413


def test_an_answer_that_is_read_slowly_is_sent_to_its_end_after_sigterm(tmp_path: Path) -> None:
    artifact = write_artifact(tmp_path / "reviews", labels=[f"label-{i}" for i in range(150)])
    with serving(artifact) as (url, process), socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        host, _, port = url.removeprefix("http://").partition(":")
        client.connect((host, int(port)))
        client.settimeout(30)
        body = json.dumps({"input": ["good"] * 1000}).encode()
        client.sendall(
            b"POST /classify HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        )
        stream = client.makefile("rb")
        assert stream.readline() == b"HTTP/1.1 200 OK\r\n"
        length = 0
        while (line := stream.readline()) != b"\r\n":
            if line.lower().startswith(b"content-length:"):
                length = int(line.split(b":")[1])
        process.send_signal(signal.SIGTERM)
        time.sleep(3)  # longer than connections were given once
        assert len(stream.read(length)) == length > 8_000_000
        assert process.wait(timeout=30) == 0


def test_several_requests_on_one_connection_are_answered(artifact: Artifact) -> None:
    with serving(artifact) as (url, _):
        connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=30)
        for _ in range(3):
            connection.request("POST", "/classify", json.dumps({"input": "good"}))
            assert json.load(connection.getresponse())["data"][0]["label"] == "POSITIVE"
        connection.close()
