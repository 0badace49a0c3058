"""The batcher's thread: batches, failures, deadlines, draining and stalls."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from service.batching.batcher import Batcher, BatchStats
from service.batching.queue import BatchLimits
from service.errors import (
    DeadlineExceeded,
    EngineBroken,
    ModelFailed,
    ModelOutputInvalid,
    Overloaded,
    ShuttingDown,
    TooLarge,
)


@dataclass(frozen=True)
class Word:
    """An item: its name is its answer, and `poison` and `short` make a batch fail."""

    name: str
    tokens: int = 4


@dataclass
class Echo:
    """A model that returns each item once its gate is open, and remembers its batches."""

    padding_invariant: bool = True
    gate: threading.Event = field(default_factory=threading.Event)
    batches: list[list[str]] = field(default_factory=list)

    @property
    def packing(self) -> None:
        return None

    def padded_length(self, tokens: int) -> int:
        return tokens

    def has_run(self, rows: int, length: int, texts: int) -> bool:
        return True

    def start(self, batch: Sequence[Word], _layout: object = None) -> Callable[[], Sequence[Any]]:
        self.batches.append([word.name for word in batch])

        def finish() -> list[str]:
            assert self.gate.wait(10)
            if any(word.name == "poison" for word in batch):
                raise ValueError("poisoned")
            if any(word.name == "short" for word in batch):
                return []
            return [word.name for word in batch]

        return finish


@asynccontextmanager
async def running(
    model: Echo, limits: BatchLimits | None = None, **options: Any
) -> AsyncIterator[Batcher]:
    """Run a batcher with one model, and drain it at the end."""
    batcher = Batcher({"echo": model}, limits or BatchLimits(), **options)
    batcher.start()
    try:
        yield batcher
    finally:
        model.gate.set()
        assert await batcher.close(10)


async def ask(
    batcher: Batcher, *names: str, tokens: int = 4, timeout_s: float = math.inf
) -> list[str]:
    """Submit items, and return their answers."""
    results = await batcher.submit("echo", [Word(name, tokens) for name in names], timeout_s)
    return [result.value for result in results]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


async def block(batcher: Batcher, model: Echo) -> asyncio.Task[list[str]]:
    """Occupy the model with one item, so that later items wait."""
    task = asyncio.create_task(ask(batcher, "blocker"))
    await until(lambda: bool(model.batches))
    return task


async def test_items_that_wait_while_the_model_runs_form_one_batch() -> None:
    model = Echo()
    async with running(model) as batcher:
        blocker = await block(batcher, model)
        others = [asyncio.create_task(ask(batcher, name)) for name in "abc"]
        await until(lambda: batcher.waiting == 3)
        model.gate.set()
        assert await asyncio.gather(blocker, *others) == [["blocker"], ["a"], ["b"], ["c"]]
    assert model.batches == [["blocker"], ["a", "b", "c"]]


async def test_a_cancelled_caller_does_not_affect_the_rest_of_its_batch() -> None:
    model = Echo()
    async with running(model) as batcher:
        await block(batcher, model)
        first, gone, last = [
            asyncio.create_task(ask(batcher, name)) for name in ("first", "gone", "last")
        ]
        await until(lambda: batcher.waiting == 3)
        gone.cancel()
        await asyncio.wait([gone])
        model.gate.set()
        assert await first == ["first"]
        assert await last == ["last"]
    assert model.batches[1] == ["first", "last"]


async def test_an_item_on_which_the_model_fails_affects_no_other() -> None:
    model = Echo()
    async with running(model) as batcher:
        await block(batcher, model)
        good, poison, fine = [
            asyncio.create_task(ask(batcher, name)) for name in ("good", "poison", "fine")
        ]
        await until(lambda: batcher.waiting == 3)
        model.gate.set()
        assert await good == ["good"]
        assert await fine == ["fine"]
        with pytest.raises(ModelFailed):
            await poison
        assert await ask(batcher, "after") == ["after"]


async def test_a_short_result_is_an_error_and_not_a_hang() -> None:
    model = Echo()
    model.gate.set()
    async with running(model) as batcher:
        with pytest.raises(ModelOutputInvalid, match="0 rows for 1 texts"):
            await ask(batcher, "short")


async def test_a_full_queue_refuses_at_once_with_retry_after() -> None:
    model = Echo()
    async with running(model, max_queue_size=2) as batcher:
        await block(batcher, model)
        waiting = [asyncio.create_task(ask(batcher, name)) for name in "ab"]
        await until(lambda: batcher.waiting == 2)
        with pytest.raises(Overloaded, match="limit of 2") as refused:
            await ask(batcher, "c")
        assert refused.value.retry_after_s is not None
        assert refused.value.retry_after_s >= 1
        model.gate.set()
        assert await asyncio.gather(*waiting) == [["a"], ["b"]]


async def test_a_list_is_admitted_whole_or_not_at_all() -> None:
    model = Echo()
    async with running(model, max_queue_size=3) as batcher:
        await block(batcher, model)
        first = asyncio.create_task(ask(batcher, "a", "b"))
        await until(lambda: batcher.waiting == 2)
        with pytest.raises(Overloaded):
            await ask(batcher, "c", "d")
        assert batcher.waiting == 2
        model.gate.set()
        assert await first == ["a", "b"]


async def test_draining_finishes_what_was_accepted_and_refuses_the_rest() -> None:
    model = Echo()
    async with running(model) as batcher:
        blocker = await block(batcher, model)
        accepted = asyncio.create_task(ask(batcher, "accepted"))
        await until(lambda: batcher.waiting == 1)
        closing = asyncio.create_task(batcher.close(10))
        await asyncio.sleep(0)
        with pytest.raises(ShuttingDown):
            await ask(batcher, "late")
        model.gate.set()
        assert await closing
        assert await blocker == ["blocker"]
        assert await accepted == ["accepted"]


async def test_a_drain_that_takes_too_long_fails_the_callers_that_still_wait() -> None:
    model = Echo()
    batcher = Batcher({"echo": model})
    batcher.start()
    started = await block(batcher, model)
    waiting = asyncio.create_task(ask(batcher, "waiting"))
    await until(lambda: batcher.waiting == 1)
    assert not await batcher.close(0.05)
    for task in (started, waiting):
        with pytest.raises(ShuttingDown):
            await task
    model.gate.set()


async def test_a_long_text_among_many_short_ones_is_not_starved() -> None:
    model = Echo()
    async with running(model, BatchLimits(size=2)) as batcher:
        await block(batcher, model)
        long = asyncio.create_task(ask(batcher, "long", tokens=100))
        await until(lambda: batcher.waiting == 1)
        short = [asyncio.create_task(ask(batcher, f"s{i}")) for i in range(10)]
        await until(lambda: batcher.waiting == 11)
        model.gate.set()
        await asyncio.gather(long, *short)
    assert model.batches[1] == ["long"]


async def test_a_short_text_is_not_padded_to_a_long_one() -> None:
    model = Echo()
    async with running(model) as batcher:
        await block(batcher, model)
        tasks = [asyncio.create_task(ask(batcher, f"{n}", tokens=n)) for n in (10, 100, 12, 90)]
        await until(lambda: batcher.waiting == 4)
        model.gate.set()
        await asyncio.gather(*tasks)
    assert model.batches[1:] == [["10", "12"], ["100", "90"]]


async def test_padding_counts_against_the_token_budget() -> None:
    model = Echo()
    async with running(model, BatchLimits(tokens=40)) as batcher:
        await block(batcher, model)
        tasks = [asyncio.create_task(ask(batcher, f"{n}", tokens=n)) for n in (16, 20, 18)]
        await until(lambda: batcher.waiting == 3)
        model.gate.set()
        await asyncio.gather(*tasks)
    # The nearest first, and no third: 3 × 18 tokens would be computed for it.
    assert model.batches[1:] == [["16", "18"], ["20"]]


async def test_a_model_that_is_not_padding_invariant_gets_equal_lengths_only() -> None:
    model = Echo(padding_invariant=False)
    async with running(model) as batcher:
        await block(batcher, model)
        tasks = [asyncio.create_task(ask(batcher, f"{n}", tokens=n)) for n in (10, 11, 10)]
        await until(lambda: batcher.waiting == 3)
        model.gate.set()
        await asyncio.gather(*tasks)
    assert model.batches[1] == ["10", "10"]


async def test_a_batch_is_rounded_down_to_a_preferred_size() -> None:
    model = Echo()
    async with running(model, BatchLimits(round_down=lambda items: min(items, 2))) as batcher:
        await block(batcher, model)
        tasks = [asyncio.create_task(ask(batcher, name)) for name in "abc"]
        await until(lambda: batcher.waiting == 3)
        model.gate.set()
        assert await asyncio.gather(*tasks) == [["a"], ["b"], ["c"]]
    assert model.batches[1:] == [["a", "b"], ["c"]]


async def test_a_text_whose_deadline_has_passed_never_reaches_the_model() -> None:
    model = Echo()
    async with running(model) as batcher:
        await block(batcher, model)
        with pytest.raises(DeadlineExceeded):
            await ask(batcher, "late", timeout_s=0.0)
        assert batcher.waiting == 0
        model.gate.set()
    assert model.batches == [["blocker"]]


async def test_a_caller_is_refused_at_its_deadline_even_if_the_model_hangs() -> None:
    model = Echo()
    async with running(model) as batcher:
        with pytest.raises(DeadlineExceeded):
            await ask(batcher, "stuck", timeout_s=0.05)
        with pytest.raises(DeadlineExceeded):
            await ask(batcher, "behind it", timeout_s=0.05)


async def test_places_of_cancelled_callers_are_free_again() -> None:
    model = Echo()
    async with running(model, max_queue_size=2) as batcher:
        await block(batcher, model)
        gone = [asyncio.create_task(ask(batcher, name)) for name in "ab"]
        await until(lambda: batcher.waiting == 2)
        for task in gone:
            task.cancel()
        await asyncio.wait(gone)
        staying = asyncio.create_task(ask(batcher, "c", "d"))
        await until(lambda: batcher.waiting == 2)
        model.gate.set()
        assert await staying == ["c", "d"]


async def test_a_failing_statistics_callback_does_not_stop_the_batcher() -> None:
    def fail(batch: object) -> None:
        raise RuntimeError("no space left")

    model = Echo()
    model.gate.set()
    async with running(model, on_batch=fail) as batcher:
        assert await ask(batcher, "a") == ["a"]
        assert await ask(batcher, "b") == ["b"]
        assert batcher.is_alive


async def test_an_empty_request_gets_an_empty_answer() -> None:
    async with running(Echo()) as batcher:
        assert await batcher.submit("echo", []) == []


async def test_two_models_share_the_queue_in_order_of_arrival() -> None:
    first, second = Echo(), Echo()
    second.gate = first.gate
    batcher = Batcher({"first": first, "second": second})
    batcher.start()
    blocker = asyncio.create_task(batcher.submit("first", [Word("blocker")]))
    await until(lambda: bool(first.batches))
    tasks = [
        asyncio.create_task(batcher.submit(model, [Word(name)]))
        for model, name in (("second", "a"), ("first", "b"), ("second", "c"))
    ]
    await until(lambda: batcher.waiting == 3)
    first.gate.set()
    await asyncio.gather(blocker, *tasks)
    assert await batcher.close(10)
    assert second.batches == [["a", "c"]]
    assert first.batches == [["blocker"], ["b"]]


async def test_a_runtime_that_accepts_two_batches_at_once_gets_two() -> None:
    model = Echo()
    async with running(model, BatchLimits(size=1, in_flight=2)) as batcher:
        tasks = [asyncio.create_task(ask(batcher, name)) for name in "abc"]
        # Two are started before either has finished; the third waits.
        await until(lambda: len(model.batches) == 2)
        assert batcher.waiting == 1
        model.gate.set()
        assert await asyncio.gather(*tasks) == [["a"], ["b"], ["c"]]


async def test_a_batch_submitted_during_another_counts_that_time_as_waiting() -> None:
    done_ns: list[int] = []

    class Gpu(Echo):
        def start(
            self, batch: Sequence[Word], _layout: object = None
        ) -> Callable[[], Sequence[Any]]:
            finish = super().start(batch)

            def noted() -> Sequence[Any]:
                rows = finish()
                done_ns.append(time.monotonic_ns())
                return rows

            return noted

    model = Gpu()
    batches: list[BatchStats] = []
    async with running(model, BatchLimits(size=1, in_flight=2), on_batch=batches.append) as batcher:
        tasks = [asyncio.create_task(batcher.submit("echo", [Word(name)])) for name in "ab"]
        await until(lambda: len(model.batches) == 2)
        handed_over_ns = time.monotonic_ns()
        model.gate.set()
        [_, [second]] = await asyncio.gather(*tasks)
    assert second.queue_ns >= done_ns[0] - handed_over_ns
    assert [batch.inference_ns for batch in batches][1] == second.inference_ns


async def test_a_broken_engine_fails_its_whole_batch_and_is_marked_broken() -> None:
    class Broken(Echo):
        def start(
            self, batch: Sequence[Word], _layout: object = None
        ) -> Callable[[], Sequence[Any]]:
            super().start(batch)

            def finish() -> list[str]:
                raise EngineBroken("The GPU does nothing any more.")

            return finish

    model = Broken()
    async with running(model) as batcher:
        assert not batcher.is_broken
        errors = await asyncio.gather(
            *(ask(batcher, name) for name in "ab"), return_exceptions=True
        )
        assert [type(error) for error in errors] == [EngineBroken, EngineBroken]
        assert batcher.is_broken
    assert len(model.batches) <= 2, "each is tried once"


async def test_items_with_other_delays_share_a_batch_which_the_largest_one_lengthens() -> None:
    class Slow(Echo):
        def start(
            self, batch: Sequence[Word], _layout: object = None
        ) -> Callable[[], Sequence[Any]]:
            finish = super().start(batch)

            def finish_late() -> Sequence[Any]:
                values = finish()
                time.sleep(0.05)
                return values

            return finish_late

    model = Slow()
    async with running(model) as batcher:
        first = asyncio.create_task(ask(batcher, "first"))
        while not model.batches:
            await asyncio.sleep(0.001)
        waiting = [
            asyncio.create_task(batcher.submit("echo", [Word(name)], injected_delay=share))
            for name, share in (("a", 0.0), ("b", 1.0), ("c", 0.5))
        ]
        while batcher.waiting < 3:
            await asyncio.sleep(0.001)
        model.gate.set()
        await first
        rows = [row for task in waiting for row in await task]
    assert model.batches[1:] == [["a", "b", "c"]]
    assert [row.value for row in rows] == ["a", "b", "c"]
    assert all(row.inference_ns >= 0.1e9 for row in rows)


async def test_an_injected_delay_lengthens_the_inference_by_its_share() -> None:
    class Slow(Echo):
        def start(
            self, batch: Sequence[Word], _layout: object = None
        ) -> Callable[[], Sequence[Any]]:
            def finish() -> list[str]:
                time.sleep(0.05)
                return [word.name for word in batch]

            return finish

    async with running(Slow()) as batcher:
        [row] = await batcher.submit("echo", [Word("a")], injected_delay=1.0)
    assert row.inference_ns >= 0.1e9


async def test_background_items_run_only_when_nothing_else_waits() -> None:
    model = Echo()
    async with running(model, BatchLimits(size=2)) as batcher:
        first = asyncio.create_task(ask(batcher, "first"))
        await until(lambda: model.batches == [["first"]])
        hidden = asyncio.create_task(
            batcher.submit(
                "echo", [Word("hidden"), Word("hidden too"), Word("hidden three")], background=True
            )
        )
        live = [asyncio.create_task(ask(batcher, name)) for name in ("a", "b", "c")]
        await until(lambda: batcher.waiting == 3)  # background items take no room of the others
        model.gate.set()
        await asyncio.gather(first, hidden, *live)
    assert model.batches == [
        ["first"],
        ["a", "b"],
        ["c"],
        ["hidden", "hidden too"],
        ["hidden three"],
    ]


async def test_background_items_have_their_own_limit_and_end_with_the_queue() -> None:
    model = Echo()
    batcher = Batcher({"echo": model}, max_background=2)
    batcher.start()
    first = asyncio.create_task(ask(batcher, "first"))
    await until(lambda: model.batches == [["first"]])
    hidden = asyncio.create_task(batcher.submit("echo", [Word("hidden")], background=True))
    await asyncio.sleep(0)
    with pytest.raises(Overloaded, match="in the background"):
        await batcher.submit("echo", [Word("a"), Word("b")], background=True)
    closing = asyncio.create_task(batcher.close(10))
    await asyncio.sleep(0)
    model.gate.set()
    assert await closing
    assert await first == ["first"]
    with pytest.raises(ShuttingDown):
        await hidden
    assert model.batches == [["first"]]


async def test_a_batch_that_does_not_return_is_reported() -> None:
    model = Echo()
    async with running(model) as batcher:
        assert batcher.stalled_for_s == 0.0
        asking = asyncio.create_task(ask(batcher, "endless"))
        await until(lambda: batcher.stalled_for_s > 0.01)
        model.gate.set()
        await asking
        await until(lambda: batcher.stalled_for_s == 0.0)


async def test_the_time_of_being_full_is_reported_until_half_of_the_queue_is_free() -> None:
    model = Echo()
    async with running(model, BatchLimits(size=1), max_queue_size=2) as batcher:
        asking = [asyncio.create_task(ask(batcher, "first"))]
        await until(lambda: model.batches == [["first"]])
        asking += [asyncio.create_task(ask(batcher, name)) for name in ("a", "b")]
        await until(lambda: batcher.waiting == 2)
        assert batcher.queue.full_for_s == 0.0  # full, and nobody was refused
        with pytest.raises(Overloaded):
            await ask(batcher, "c")
        await until(lambda: batcher.queue.full_for_s > 0.01)
        model.gate.set()
        await asyncio.gather(*asking)
        assert batcher.queue.full_for_s == 0.0


async def test_a_request_larger_than_the_queue_is_told_to_split() -> None:
    async with running(Echo(), max_queue_size=2) as batcher:
        with pytest.raises(TooLarge, match="makes 3 items, and the queue holds 2"):
            await ask(batcher, "a", "b", "c")


async def test_accepted_items_are_answered_by_their_model_even_if_it_is_released() -> None:
    model = Echo()
    models = {"echo": model, "other": model}
    batcher = Batcher(models)
    batcher.start()
    blocker = await block(batcher, model)
    waiting = asyncio.create_task(ask(batcher, "a"))
    await until(lambda: batcher.waiting == 1)
    del models["echo"]
    model.gate.set()
    assert [await blocker, await waiting] == [["blocker"], ["a"]]
    assert [row.value for row in await batcher.submit("other", [Word("b")])] == ["b"]
    assert await batcher.close(10)


async def test_a_bug_that_ends_the_thread_fails_the_waiting_callers_and_is_reported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = Echo()
    batcher = Batcher({"echo": model})
    batcher.start()
    blocker = await block(batcher, model)
    waiting = asyncio.create_task(ask(batcher, "a"))
    await until(lambda: batcher.waiting == 1)
    monkeypatch.setattr(batcher.queue, "take", lambda limits: 1 / 0)
    assert not batcher.crashed
    model.gate.set()
    assert await blocker == ["blocker"]
    with pytest.raises(ModelFailed, match="has ended"):
        await waiting
    await until(lambda: batcher.crashed)
    assert not batcher.is_alive


async def test_an_isolated_retry_that_does_not_return_is_reported() -> None:
    model = Echo()
    batcher = Batcher({"echo": model})
    batcher.start()
    await block(batcher, model)
    two = [asyncio.create_task(ask(batcher, name)) for name in ("poison", "a")]
    await until(lambda: batcher.waiting == 2)
    held = threading.Event()
    begin = model.start

    def start(batch: Sequence[Word], _layout: object = None) -> Callable[[], Sequence[Any]]:
        begin(batch)
        if len(batch) > 1:
            raise ValueError("too many")
        return lambda: [word.name for word in batch] if held.wait(10) else []

    model.start = start  # type: ignore[method-assign]
    model.gate.set()
    await until(lambda: model.batches[-1] == ["poison"])
    await until(lambda: batcher.stalled_for_s > 0.01)
    assert not await batcher.close(0.01)
    for answer in await asyncio.gather(*two, return_exceptions=True):
        assert isinstance(answer, ShuttingDown)
    held.set()


async def test_the_queue_is_no_longer_full_when_all_waiting_callers_have_gone() -> None:
    model = Echo()
    async with running(model, max_queue_size=2) as batcher:
        await block(batcher, model)
        late = [asyncio.create_task(ask(batcher, name, timeout_s=0.05)) for name in "ab"]
        await until(lambda: batcher.waiting == 2)
        with pytest.raises(Overloaded):
            await ask(batcher, "c")
        assert batcher.queue.full_for_s > 0
        await asyncio.wait(late)
        model.gate.set()
        await until(lambda: batcher.queue.full_for_s == 0.0)
        await asyncio.gather(*late, return_exceptions=True)
