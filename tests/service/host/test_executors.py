"""Each kind of work has threads and a queue of its own: if it is slow, full or stuck, other kinds
continue.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from service.artifact import Artifact
from service.classifier import Classifier, Encoded
from service.errors import Overloaded
from service.host.executors import Executor, Executors, Steps
from service.tokenization.encoding import LONG_CHARS
from tests.service.http.test_routes import classify, client_of, until

WAIT_S = 30


@contextmanager
def stuck_on(monkeypatch: pytest.MonkeyPatch, chars: int) -> Iterator[list[str]]:
    """Let tokenizing hang on texts of at least `chars` characters; yield those that it started."""
    begun, resume, encode = [], threading.Event(), Classifier.encode

    def slow(self: Classifier, text: str, *arguments: Any) -> Encoded:
        if len(text) >= chars:
            begun.append(text)
            assert resume.wait(WAIT_S)
        return encode(self, text, *arguments)

    monkeypatch.setattr(Classifier, "encode", slow)
    try:
        yield begun
    finally:
        resume.set()


async def test_texts_that_take_long_delay_neither_shorter_ones_nor_metrics(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = "good " * (LONG_CHARS // 4)
    short = "good " * 234  # 1,170 characters are tokenized in a thread too.
    async with client_of(artifact) as (client, service):
        with stuck_on(monkeypatch, LONG_CHARS) as begun:
            requests = [
                asyncio.create_task(classify(client, {"input": [long, long]})) for _ in range(40)
            ]
            await until(lambda: service.lifecycle.active_requests == 40 and bool(begun))
            async with asyncio.timeout(WAIT_S):
                answer = await classify(client, {"input": short})
                page = await client.get("/metrics")
                large = await classify(client, {"input": ["good"] * 100, "user": "a" * 70_000})
        assert [answer.status_code, page.status_code, large.status_code] == [200, 200, 200]
        assert {(await request).status_code for request in requests} == {200}


async def test_requests_beyond_the_queue_of_the_tokenizer_are_refused_at_once(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with client_of(artifact) as (client, service):
        service.executors.tokenizing_long = Executor("tokenizing long texts", 1, 2)
        with stuck_on(monkeypatch, LONG_CHARS):
            waiting = [
                asyncio.create_task(classify(client, {"input": "good " * LONG_CHARS}))
                for _ in range(2)
            ]
            await until(lambda: service.lifecycle.active_requests == 2)
            await asyncio.sleep(0)
            async with asyncio.timeout(WAIT_S):
                refused = await classify(client, {"input": "good " * LONG_CHARS})
        assert {(await request).status_code for request in waiting} == {200}
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
    assert (
        refused.json()["error"]["message"]
        == "2 requests are in the queue for tokenizing long texts, the limit; retry later."
    )


async def test_jobs_take_turns_step_by_step() -> None:
    order: list[str] = []
    hold = threading.Event()

    def steps(name: str, count: int) -> Steps[str]:
        for number in range(count):
            if number:
                yield
            order.append(f"{name}{number}")
        return name

    executor = Executor("test", 1, 10)
    blocker = asyncio.create_task(executor.run(lambda: hold.wait(WAIT_S)))
    jobs = [
        asyncio.create_task(executor.run_steps(steps(name, count)))
        for name, count in (("long", 3), ("short", 1), ("middle", 2))
    ]
    await asyncio.sleep(0)
    hold.set()
    assert await asyncio.gather(blocker, *jobs) == [True, "long", "short", "middle"]
    assert order == ["long0", "short0", "middle0", "long1", "middle1", "long2"]


async def test_a_job_of_a_cancelled_caller_leaves_the_queue_and_is_closed() -> None:
    closed: list[str] = []
    hold, begun = threading.Event(), threading.Event()

    def steps(name: str) -> Steps[None]:
        try:
            begun.set()
            assert hold.wait(WAIT_S)
            yield
            closed.append(f"{name} went on")
        except GeneratorExit:
            closed.append(name)
            raise

    executor = Executor("test", 1, 2)
    running = asyncio.create_task(executor.run_steps(steps("running")))
    waiting = asyncio.create_task(executor.run_steps(steps("waiting")))
    await until(begun.is_set)
    with pytest.raises(Overloaded):
        await executor.run(lambda: None)
    for task in (running, waiting):
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    hold.set()
    # The waiting job has left the queue at once, and the running job ended with its current step.
    await executor.run(lambda: None)
    await until(lambda: executor.running == 0 and bool(closed))
    assert closed == ["running"]


async def test_a_job_raises_in_its_caller_and_the_thread_continues() -> None:
    executor = Executor("test", 1, 1)

    def fail() -> None:
        raise KeyError("no")

    for _ in range(3):
        with pytest.raises(KeyError):
            await executor.run(fail)
        await until(lambda: not executor.running)
    assert await executor.run(lambda: 7) == 7


async def test_threads_are_limited_and_end_without_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("service.host.executors.IDLE_S", 0.01)
    executor = Executor("few threads", 2, 100)
    names: set[int] = set()

    def note() -> None:
        names.add(threading.get_ident())

    await asyncio.gather(*(executor.run(note) for _ in range(50)))
    assert 1 <= len(names) <= 2
    await until(lambda: not any(thread.name == "few threads" for thread in threading.enumerate()))
    assert await executor.run(lambda: "again") == "again"


async def test_running_kinds_of_work_are_named() -> None:
    executors, resume = Executors(10), threading.Event()
    assert executors.running == []
    task = asyncio.create_task(executors.loading.run(lambda: resume.wait(WAIT_S)))
    await until(lambda: executors.running == ["loading models"])
    resume.set()
    assert await task
    await until(lambda: executors.running == [])
