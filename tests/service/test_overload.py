"""Answers of an overloaded service."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from service.artifact import Artifact
from service.http.context import HttpContext
from service.http.routes import build_app
from service.state import ServiceState
from tests.service.http.test_protocol import listening
from tests.service.http.test_routes import classify, client_of, stuck, until


def key_of(service: ServiceState) -> str:
    return next(iter(service.registry.loaded.values())).key


def as_slow_as(service: ServiceState, token_s: float) -> None:
    """Make the queue expect `token_s` seconds for a token of the model."""
    capacity = service.batcher.queue.capacity
    capacity.forget(key_of(service))
    capacity.note(key_of(service), 1000, 1000 * token_s, full=True)


def counted(service: ServiceState) -> list[str]:
    """Return a list that fills with the texts that are tokenized from now on."""
    texts: list[str] = []
    classifier = next(iter(service.registry.loaded.values())).classifier
    encode = classifier.encode

    def noting(text: str, *more: Any) -> Any:
        texts.append(text)
        return encode(text, *more)

    classifier.encode = noting  # type: ignore[method-assign, assignment]
    return texts


async def waiting(
    client: httpx.AsyncClient, service: ServiceState, count: int
) -> list[asyncio.Task[httpx.Response]]:
    """Start one request that occupies the stuck model, and `count` requests that wait."""
    tasks = [asyncio.create_task(classify(client, {"input": "good"}))]
    await until(lambda: service.lifecycle.active_requests == 1 and service.batcher.waiting == 0)
    tasks += [asyncio.create_task(classify(client, {"input": "good"})) for _ in range(count)]
    await until(lambda: service.batcher.waiting == count)
    return tasks


async def test_a_request_that_would_be_late_is_refused_untokenized_with_retry_after(
    artifact: Artifact,
) -> None:
    async with client_of(artifact) as (client, service):
        async with stuck(service):
            tasks = await waiting(client, service, 10)
            as_slow_as(service, 0.5)  # 4 tokens a text, and the next is done in 30 s
            texts = counted(service)
            refused = await classify(client, {"input": "bad " * 40})
            assert refused.status_code == 429
            error = refused.json()["error"]
            assert error["code"] == "queue_full"
            assert "may wait" in error["message"]
            assert "bad" not in error["message"]
            assert 1 <= int(refused.headers["Retry-After"]) <= 60
            assert not texts
            page = (await client.get("/metrics")).text
            [seconds] = [
                float(line.split()[1])
                for line in page.splitlines()
                if line.startswith("drbert_queue_seconds ")
            ]
            assert seconds == pytest.approx(25, rel=0.01)  # 4 tokens, and a text counts as one more
        assert [response.status_code for response in await asyncio.gather(*tasks)] == [200] * 11
        assert service.batcher.queue_s == 0


async def test_a_list_that_can_never_be_done_in_time_is_413_with_the_possible_size(
    artifact: Artifact,
) -> None:
    async with client_of(artifact) as (client, service):
        as_slow_as(service, 0.5)
        texts = counted(service)
        listed = await classify(client, {"input": ["bad film"] * 50})
        assert listed.status_code == 413
        error = listed.json()["error"]
        assert error["code"] == "too_large"
        assert "Send at most" in error["message"]
        assert "bad" not in error["message"]
        assert not texts
        assert (await classify(client, {"input": ["bad film"] * 5})).status_code == 200


async def test_a_request_counts_as_waiting_while_it_is_tokenized(artifact: Artifact) -> None:
    gate = threading.Event()
    async with client_of(artifact, request_timeout_s=20) as (client, service):
        as_slow_as(service, 0.5)
        classifier = next(iter(service.registry.loaded.values())).classifier
        encode = classifier.encode

        def slow(text: str, *more: Any) -> Any:
            assert gate.wait(10)
            return encode(text, *more)

        classifier.encode = slow  # type: ignore[method-assign, assignment]
        # Long enough for a thread: 16 tokens of it are read.
        tokenized = asyncio.create_task(classify(client, {"input": "good film " * 200}))
        await until(lambda: service.batcher.queue_s > 0)
        assert service.batcher.queue_s == pytest.approx(17 * 0.5, rel=0.01)
        refused = await classify(client, {"input": "bad " * 300})
        gate.set()
        assert refused.status_code == 429
        assert (await tokenized).status_code == 200
        assert service.batcher.queue_s == 0


async def test_a_reservation_is_released_if_tokenizing_fails_or_the_client_disconnects(
    artifact: Artifact,
) -> None:
    async with client_of(artifact) as (client, service):
        as_slow_as(service, 0.001)
        failed = await classify(client, {"input": "good " * 40, "truncate": "none"})
        assert failed.status_code == 422
        assert service.batcher.queue_s == 0
        async with stuck(service):
            tasks = await waiting(client, service, 3)
            for task in tasks[1:]:
                task.cancel()
            await asyncio.wait(tasks[1:])
            assert service.batcher.waiting == 0
            assert service.batcher.queue_s == 0
        assert (await tasks[0]).status_code == 200


async def test_a_request_carries_the_time_at_which_its_head_was_read() -> None:
    began: list[float] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        began.append(scope["state"]["began"])
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body"})

    async with listening(app) as connect:
        reader, writer = await connect()
        for _ in range(2):  # the second by the same connection
            before = time.monotonic()
            writer.write(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 204")
            assert before <= began[-1] <= time.monotonic()
    assert began[0] < began[1]


@pytest.mark.parametrize("late_s", [0.0, 31.0])
async def test_a_request_whose_handler_runs_after_its_deadline_is_504(
    artifact: Artifact, late_s: float
) -> None:
    async with client_of(artifact) as (_, service):
        inner = build_app(HttpContext(service))

        async def late(scope: Scope, receive: Receive, send: Send) -> None:
            await inner({**scope, "state": {"began": time.monotonic() - late_s}}, receive, send)

        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(late), base_url="http://test"
        ) as client:
            response = await classify(client, {"input": "good"})
    assert response.status_code == (504 if late_s else 200)


async def test_an_answer_that_is_ready_too_late_is_504(artifact: Artifact) -> None:
    async with client_of(artifact, request_timeout_s=0.2) as (client, service):
        classifier = next(iter(service.registry.loaded.values())).classifier
        begin = classifier.start

        def start(batch: Any, layout: Any = None) -> Callable[[], Any]:
            finish = begin(batch, layout)

            def finished() -> Any:
                # The event loop is busy from before the deadline until after it, and hears of both
                # at once.
                loop.call_soon_threadsafe(time.sleep, 0.4)
                time.sleep(0.1)
                return finish()

            return finished

        loop = asyncio.get_running_loop()
        classifier.start = start  # type: ignore[method-assign]
        response = await classify(client, {"input": "good"})
    assert response.status_code == 504


async def test_the_queue_can_be_limited_in_seconds(artifact: Artifact) -> None:
    async with client_of(artifact, max_queue_s=1.0) as (client, service), stuck(service):
        as_slow_as(service, 0.1)
        tasks = await waiting(client, service, 1)
        refused = await classify(client, {"input": "good"})
        assert refused.status_code == 429
        assert refused.headers["Retry-After"] in ("1", "2")
        for task in tasks:
            task.cancel()
