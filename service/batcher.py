"""
Turns concurrent calls into batches, and a batch's results back into answers.

The batcher knows neither HTTP nor ONNX: it moves items to a model's start function and
rows back to whoever asked. One queue, one submitting thread, no timer: a batch is what
waits when the device is free, so batches grow under load and an idle service adds no delay.

    submit (event loop)  →  queue  →  _next_batch → _start → _finish (thread)  →  submit returns
"""

from __future__ import annotations

import asyncio
import hashlib
import heapq
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, TypeVar

from service.errors import (
    DeadlineExceeded,
    ModelFailed,
    ModelOutputInvalid,
    Overloaded,
    ServiceError,
    ShuttingDown,
    TooLarge,
)

log = logging.getLogger(__name__)

# Texts share a batch if the shorter is at least this share of the longer, or nearly as long in tokens.
SHARED_LENGTH = 0.75
NEAR_TOKENS = 4

# What a busy-wait works on: hashlib lets go of the GIL above 2 KiB, as an engine does, and this takes some 10 µs.
_CHORE = bytes(4096)


class Item(Protocol):
    @property
    def tokens(self) -> int: ...


AnyItem = TypeVar("AnyItem", contravariant=True)


class Model(Protocol[AnyItem]):
    """What the batcher asks of a model."""

    @property
    def padding_safe(self) -> bool:
        """False: only items of equal length may share a batch."""
        ...

    def start(self, batch: Sequence[AnyItem], /) -> Callable[[], Collection[Any]]:
        """Begins a batch; the call returned waits for one row an item."""
        ...

    def padded_length(self, tokens: int) -> int:
        """How long an item of so many tokens is made when it runs alone."""
        ...


@dataclass(frozen=True, slots=True)
class Row:
    """One item's result, and where its time went."""

    value: Any
    queue_ns: int
    inference_ns: int
    batch_size: int
    length: int
    """Tokens each item of its batch was padded to."""


@dataclass(frozen=True, slots=True)
class Batch:
    """What became of a batch, for whoever counts."""

    model: str
    queue_ns: list[int]
    inference_ns: int
    tokens: int
    padding_tokens: int
    background: bool = False


@dataclass(slots=True)
class _Call:
    """A caller and the rows it waits for."""

    loop: asyncio.AbstractEventLoop
    answer: asyncio.Future[list[Row]]
    deadline: float
    rows: list[Row | None]
    missing: int

    @property
    def gone(self) -> bool:
        return self.answer.done()


@dataclass(slots=True)
class _Waiting:
    call: _Call
    place: int
    item: Item
    model: str
    length: int
    since_ns: int
    busy_wait: float
    background: bool = False


@dataclass(slots=True)
class _Running:
    batch: list[_Waiting]
    length: int
    started_ns: int
    finish: Callable[[], Collection[Any]]


@dataclass
class Batcher:
    """Batches for all models on one device.

    Limits: `max_batch_size` items and `max_batch_tokens` tokens a batch, padding counted
    (a single item may exceed it), `max_waiting` items in the queue. `batch_size` rounds a
    batch down to one the engine likes, `rows` says how many rows the engine makes of it. `in_flight` batches may run at once.

    What is submitted in the background waits beside the queue, at most `max_background` items, and a batch
    of it begins only when nothing else waits.
    """

    models: Mapping[str, Model[Any]]
    max_batch_size: int = 16
    max_batch_tokens: int = 4096
    max_waiting: int = 2048
    max_background: int = 256
    in_flight: int = 1
    batch_size: Callable[[int], int] = lambda waiting: waiting
    rows: Callable[[int], int] = lambda items: items
    on_batch: Callable[[Batch], None] = lambda batch: None

    _queue: deque[_Waiting] = field(default_factory=deque, init=False)
    _background: deque[_Waiting] = field(default_factory=deque, init=False)
    _changed: threading.Condition = field(default_factory=threading.Condition, init=False)
    _running: deque[_Running] = field(default_factory=deque, init=False)
    _called: bool = field(default=False, init=False)
    _runs: bool = field(default=False, init=False)
    _closing: bool = field(default=False, init=False)
    _items_per_s: float = field(default=0.0, init=False)
    _full_since: float | None = field(default=None, init=False)
    _starting_ns: int | None = field(default=None, init=False)
    _thread: threading.Thread | None = field(default=None, init=False)

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="batcher", daemon=True)
        self._runs = True
        self._thread.start()

    @property
    def waiting(self) -> int:
        return len(self._queue)

    @property
    def full_s(self) -> float:
        """For how long there has been no room: since an item was refused, until half of the queue is free again."""
        since = self._full_since
        return 0.0 if since is None else time.monotonic() - since

    async def submit(
        self, model: str, items: Sequence[Item], timeout_s: float = math.inf, busy_wait: float = 0.0, background: bool = False,
    ) -> list[Row]:
        """Returns the items' rows in order, or raises what became of them.

        Items are admitted together or not at all. Raises Overloaded when the queue has no
        room for all, TooLarge when it never could have, ShuttingDown while draining, DeadlineExceeded if an item could not be
        answered within `timeout_s`, and what the model raised for a batch of that item alone.

        `busy_wait` makes their batches longer by that share of their own duration, for a proof
        that must show it would see a slower model. Only items with one `busy_wait` share a batch. `background` is for work that
        nobody waits for: it takes no room of the queue, and is refused when there is too much of its kind.
        """
        if not items:
            return []
        if len(items) > self.max_waiting:
            raise TooLarge(f"The request makes {len(items)} items, and the queue holds {self.max_waiting}; send several requests.")
        loop = asyncio.get_running_loop()
        call = _Call(loop, loop.create_future(), time.monotonic() + timeout_s, [None] * len(items), len(items))
        now = time.monotonic_ns()
        padded = self.models[model].padded_length
        entries = [_Waiting(call, place, item, model, padded(item.tokens), now, busy_wait, background) for place, item in enumerate(items)]
        with self._changed:
            if self._closing:
                raise ShuttingDown("This replica is draining; another one answers.")
            if background and len(self._background) + len(entries) > self.max_background:
                raise Overloaded(f"{len(self._background)} items wait in the background already.")
            if not background and len(self._queue) + len(entries) > self.max_waiting:
                self._drop_the_gone_and_the_late()
            if not background and len(self._queue) + len(entries) > self.max_waiting:
                if self._full_since is None:
                    self._full_since = time.monotonic()
                raise Overloaded(
                    f"{len(self._queue)} texts wait and {len(entries)} more would pass the limit of {self.max_waiting}; retry later.",
                    retry_after_s=self._seconds_to_clear(),
                )
            (self._background if background else self._queue).extend(entries)
            if not self._called:
                # Once for all that the loop has at hand: called for the first of them, the thread would take it alone.
                self._called = True
                loop.call_soon(self._call_the_thread)
        # Leaving, by the deadline or because the caller is cancelled, settles the answer: what still waits of it is dropped.
        late = None if math.isinf(timeout_s) else loop.call_later(timeout_s, _expire, call)
        try:
            return await call.answer
        finally:
            if late is not None:
                late.cancel()

    def _call_the_thread(self) -> None:
        with self._changed:
            self._called = False
            self._changed.notify()

    @property
    def alive(self) -> bool:
        """Whether the submitting thread runs; it outlives whatever a model does."""
        return self._runs

    @property
    def stuck_s(self) -> float:
        """For how long the oldest batch that the model was given has been with it; 0 if there is none."""
        begun = [begun for begun in (self._starting_ns, *(run.started_ns for run in list(self._running))) if begun is not None]
        return (time.monotonic_ns() - min(begun)) / 1e9 if begun else 0.0

    async def close(self, timeout_s: float) -> bool:
        """Refuses new items, finishes the accepted ones, and says whether it could in time.

        What could not be finished, running or waiting, is answered with ShuttingDown.
        """
        with self._changed:
            self._closing = True
            self._changed.notify()
        thread = self._thread
        if thread is None:
            return True
        await asyncio.to_thread(thread.join, timeout_s)
        if not thread.is_alive():
            return True
        with self._changed:
            abandoned = [*self._queue, *self._background, *(entry for run in self._running for entry in run.batch)]
            self._queue.clear()
            self._background.clear()
        for entry in abandoned:
            _fail(entry.call, ShuttingDown("This replica stopped before it had answered this text."))
        return False

    # The submitting thread, in the order a batch goes through it.

    def _run(self) -> None:
        try:
            self._work()
        finally:
            self._runs = False

    def _work(self) -> None:
        running = self._running
        while True:
            batch = self._next_batch(wait=not running)
            if batch:
                self._start(batch, running)
            elif batch is None and not running:
                return
            if running and (not batch or len(running) >= self.in_flight):
                self._finish(running[0])
                running.popleft()

    def _next_batch(self, wait: bool) -> list[_Waiting] | None:
        """What to run next: [] if nothing waits just now, None if nothing ever will."""
        with self._changed:
            while True:
                self._drop_the_gone_and_the_late()
                if self._queue:
                    return self._take(self._queue)
                if self._closing:
                    self._drop_the_background()
                    return None
                if self._background:
                    return self._take(self._background)
                if not wait:
                    return []
                self._changed.wait()

    def _drop_the_gone_and_the_late(self) -> None:
        now = time.monotonic()
        for queue in (self._queue, self._background):
            kept = []
            for entry in queue:
                if entry.call.gone:
                    continue
                if now > entry.call.deadline:
                    _fail(entry.call, DeadlineExceeded("The text waited longer than the request's time limit."))
                    continue
                kept.append(entry)
            if len(kept) < len(queue):
                queue.clear()
                queue.extend(kept)

    def _drop_the_background(self) -> None:
        for entry in self._background:
            _fail(entry.call, ShuttingDown("This replica is draining; nothing is done in the background."))
        self._background.clear()

    def _take(self, queue: deque[_Waiting]) -> list[_Waiting]:
        """The oldest item and those nearest to it in length: nobody starves, and under backlog next to nothing is padding."""
        first = queue[0]
        mixes = self.models[first.model].padding_safe
        others = (e for e in queue if e is not first and e.model == first.model and e.busy_wait == first.busy_wait)
        chosen = [first]
        shortest = longest = first.length
        for entry in heapq.nsmallest(self.max_batch_size - 1, others, key=lambda e: abs(e.length - first.length)):
            low, high = min(shortest, entry.length), max(longest, entry.length)
            fits = low == high or (mixes and _share_a_batch(low, high))
            if fits and high * (len(chosen) + 1) <= self.max_batch_tokens:
                chosen.append(entry)
                shortest, longest = low, high
        del chosen[self.batch_size(len(chosen)) :]
        if len(chosen) == len(queue):
            queue.clear()
        else:
            taken = set(map(id, chosen))
            kept = [entry for entry in queue if id(entry) not in taken]
            queue.clear()
            queue.extend(kept)
        if self._full_since is not None and len(self._queue) <= self.max_waiting // 2:
            self._full_since = None
        return chosen

    def _start(self, batch: list[_Waiting], running: deque[_Running]) -> None:
        self._starting_ns = started = time.monotonic_ns()
        length = max(entry.length for entry in batch)
        try:
            finish = self.models[batch[0].model].start([entry.item for entry in batch])
        except Exception as error:  # The worker outlives whatever a model does.
            self._starting_ns = None
            self._failed(batch, error)
        else:
            running.append(_Running(batch, length, started, finish))
            self._starting_ns = None

    def _finish(self, run: _Running) -> None:
        try:
            values = run.finish()
            if len(values) != len(run.batch):
                raise ModelOutputInvalid(f"The model answered {len(values)} rows for {len(run.batch)} texts.")
        except Exception as error:  # The worker outlives whatever a model does.
            self._failed(run.batch, error)
            return
        if run.batch[0].busy_wait:
            _keep_busy(run.started_ns, run.batch[0].busy_wait)
        inference_ns = time.monotonic_ns() - run.started_ns
        rows = [
            Row(value, run.started_ns - entry.since_ns, inference_ns, len(run.batch), run.length)
            for value, entry in zip(values, run.batch, strict=True)
        ]
        # Counted first: the loop's thread and this one would get in each other's way once the answers are there.
        self._count(run, [row.queue_ns for row in rows], inference_ns)
        _deliver(run.batch, rows)

    def _failed(self, batch: list[_Waiting], error: Exception) -> None:
        """Runs the items of a failed batch alone, once, so that a poisonous text hurts nobody else."""
        if len(batch) == 1:
            if isinstance(error, ServiceError):
                log.error("model answered no answer", extra={"model": batch[0].model, "why": error.message})
                _fail(batch[0].call, error)
            else:
                log.error("model raised", extra={"model": batch[0].model}, exc_info=error)
                _fail(batch[0].call, ModelFailed("The model failed on this text; the failure is in the log."))
            return
        for entry in batch:
            if not entry.call.gone:
                alone: deque[_Running] = deque()
                self._start([entry], alone)
                if alone:
                    self._finish(alone.popleft())

    def _count(self, run: _Running, queue_ns: list[int], inference_ns: int) -> None:
        rate = len(run.batch) * 1e9 / max(1, inference_ns)
        self._items_per_s = rate if not self._items_per_s else 0.9 * self._items_per_s + 0.1 * rate
        tokens = sum(entry.item.tokens for entry in run.batch)
        try:
            self.on_batch(
                Batch(run.batch[0].model, queue_ns, inference_ns, tokens, run.length * self.rows(len(run.batch)) - tokens, run.batch[0].background)
            )
        except Exception:  # Nor does counting end the worker.
            log.exception("a batch could not be counted")

    def _seconds_to_clear(self) -> int:
        """When the queue will have gone, by its length and the measured rate; 1 to 60 s."""
        if not self._items_per_s:
            return 1
        return max(1, min(60, math.ceil(len(self._queue) / self._items_per_s)))


def _share_a_batch(shorter: int, longer: int) -> bool:
    return shorter >= SHARED_LENGTH * longer or longer - shorter <= NEAR_TOKENS


def _keep_busy(started_ns: int, share: float) -> None:
    """Computes until what began at `started_ns` has taken `share` longer. A sleep would leave the processor to others."""
    now = time.monotonic_ns()
    due = now + int(share * (now - started_ns))
    while (now := time.monotonic_ns()) < due:
        if due - now > 20_000:    # the last bit on the clock alone, or a short batch would be late by half a chore
            hashlib.sha256(_CHORE)


def _deliver(batch: list[_Waiting], rows: list[Row]) -> None:
    """Puts rows in their calls' places and wakes the callers that have all of theirs, with one call into each loop."""
    whole: dict[asyncio.AbstractEventLoop, list[_Call]] = {}
    for entry, row in zip(batch, rows, strict=True):
        call = entry.call
        call.rows[entry.place] = row
        call.missing -= 1
        if call.missing == 0:
            whole.setdefault(call.loop, []).append(call)
    for loop, calls in whole.items():
        _in_loop(loop, partial(_answer, calls))


def _answer(calls: list[_Call]) -> None:
    for call in calls:
        # The caller may have left, or another of its items may have failed, in the meantime.
        if not call.answer.done():
            call.answer.set_result(call.rows)    # type: ignore[arg-type]


def _expire(call: _Call) -> None:
    _refuse(call, DeadlineExceeded("The answer was not there within the request's time limit."))


def _refuse(call: _Call, error: Exception) -> None:
    if not call.answer.done():
        call.answer.set_exception(error)


def _fail(call: _Call, error: Exception) -> None:
    _in_loop(call.loop, partial(_refuse, call, error))


def _in_loop(loop: asyncio.AbstractEventLoop, settle: Callable[[], object]) -> None:
    try:
        loop.call_soon_threadsafe(settle)
    except RuntimeError:
        log.debug("a caller's event loop has closed")
