"""Cheap answers are sent one at a time, but only a limited number of callers wait."""

from __future__ import annotations

import asyncio

import pytest

from service.http.transport import pacing
from service.http.transport.pacing import Pacer


async def test_callers_continue_in_order_of_arrival(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pacing, "PAUSE_S", 0.01)
    line, gone = Pacer(), list[int]()

    async def call(name: int) -> None:
        await line.wait()
        gone.append(name)

    tasks = [asyncio.create_task(call(name)) for name in range(5)]
    await asyncio.gather(*tasks)
    assert gone == [0, 1, 2, 3, 4]


async def test_callers_above_the_limit_do_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pacing, "PAUSE_S", 30.0)
    monkeypatch.setattr(pacing, "MAX_WAITING", 2)
    line = Pacer()
    waiting = [asyncio.create_task(line.wait()) for _ in range(2)]
    await asyncio.sleep(0)
    async with asyncio.timeout(10):
        await line.wait()
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    monkeypatch.setattr(pacing, "PAUSE_S", 0.0)
    async with asyncio.timeout(10):
        await line.wait()  # cancelled callers do not count
    assert line._waiting == 0
