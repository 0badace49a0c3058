"""What a connection may take of time: heads and bodies that never come, and deadlines that callers set."""

from __future__ import annotations

import asyncio
import http.client
import json
from collections.abc import AsyncIterator

import pytest
import uvicorn

from service import connection
from service.artifact import Artifact
from service.server import bind, configured
from tests.service.test_routes import classify, client_of, stuck, until
from tests.service.test_server import serving


async def test_a_caller_may_ask_for_less_time_than_the_service_allows(artifact: Artifact) -> None:
    async with client_of(artifact) as (client, models):
        async with stuck(models):
            first = asyncio.create_task(classify(client, {"input": "good"}))
            await until(lambda: models.answering == 1 and models.batcher.waiting == 0)
            late = await client.post("/classify", json={"input": "good"}, headers={"X-Request-Timeout-Ms": "60"})
            assert not first.done()
        answered = await first
    assert late.status_code == 504
    assert late.json()["error"]["code"] == "deadline_exceeded"
    assert answered.status_code == 200
    # The late one never reached the model.
    assert models.metrics.registry.get_sample_value("drbert_batch_size_sum", {"model": "reviews"}) == 1


@pytest.mark.parametrize("given", ["0", "-1", "soon", "nan", ""])
async def test_a_deadline_that_is_none_is_refused_by_name(artifact: Artifact, given: str) -> None:
    async with client_of(artifact) as (client, _):
        response = await client.post("/classify", json={"input": "good"}, headers={"X-Request-Timeout-Ms": given})
    assert response.status_code == 422
    assert response.json()["error"]["param"] == "X-Request-Timeout-Ms"


async def test_a_deadline_beyond_the_services_own_is_cut(artifact: Artifact) -> None:
    assert connection.read_timeout(b"999999999", 30.0) == 30.0
    assert connection.read_timeout(b"1500", 30.0) == 1.5
    assert connection.read_timeout(None, 30.0) == 30.0


async def test_a_body_that_never_ends_is_408(artifact: Artifact) -> None:
    async def half() -> AsyncIterator[bytes]:
        yield b'{"input": "go'
        await asyncio.sleep(30)
        yield b'od"}'

    async with client_of(artifact, request_timeout_s=0.1) as (client, _):
        response = await client.post("/classify", content=half())
    assert response.status_code == 408
    assert response.json()["error"] == {
        "message": "13 bytes of the body came within 0.1 s, and no end of it.", "type": "timeout_error", "param": "body", "code": "body_too_slow",
    }
    assert response.headers["connection"] == "close"


async def test_a_connection_that_never_says_what_it_wants_is_closed(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEAD_WITHIN_S", 0.2)

    async def app(scope: object, receive: object, send: object) -> None:
        raise AssertionError("nothing whole was asked")

    config = configured(app)
    sock = bind("127.0.0.1", 0)
    server = uvicorn.Server(config)
    running = asyncio.create_task(server.serve([sock]))
    while not server.started:
        await asyncio.sleep(0.01)
    try:
        silent, slow = [await asyncio.open_connection("127.0.0.1", sock.getsockname()[1]) for _ in range(2)]
        slow[1].write(b"POST /classify HTTP/1.1\r\nHost: a\r\nX-")
        for _ in range(3):    # a byte now and then makes it no better
            await asyncio.sleep(0.05)
            slow[1].write(b"a")
        async with asyncio.timeout(10):
            assert [await reader.read() for reader, _ in (silent, slow)] == [b"", b""]
        for _, writer in (silent, slow):
            writer.close()
    finally:
        server.should_exit = True
        await running


def test_a_kept_connection_is_answered_as_often_as_it_asks(artifact: Artifact) -> None:
    with serving(artifact) as (url, _):
        kept = http.client.HTTPConnection(url.removeprefix("http://"), timeout=30)
        for _ in range(3):
            kept.request("POST", "/classify", json.dumps({"input": "good"}))
            assert json.load(kept.getresponse())["data"][0]["label"] == "POSITIVE"
        kept.close()
