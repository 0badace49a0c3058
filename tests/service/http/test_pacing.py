"""Cheap answers are given one at a time, but nobody is held up by too many others."""

from __future__ import annotations

import asyncio

import pytest

from service.http.transport import pacing
from service.http.transport.pacing import Pacer


async def test_callers_go_on_in_the_order_in_which_they_came(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pacing, "PAUSE_S", 0.01)
    line, gone = Pacer(), list[int]()

    async def one(name: int) -> None:
        await line.wait()
        gone.append(name)

    tasks = [asyncio.create_task(one(name)) for name in range(5)]
    await asyncio.gather(*tasks)
    assert gone == [0, 1, 2, 3, 4]


async def test_beyond_those_that_may_wait_nobody_does(monkeypatch: pytest.MonkeyPatch) -> None:
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
        await line.wait()  # those who left count no more
    assert line._waiting == 0
