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
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from service.batching.capacity import TEXT_COST, estimated_tokens
from service.batching.queue import BatchLimits, Queue
from service.batching.requests import Call, Entry, Flow, Item, Model, Row, deliver, expire, fail
from service.errors import (
    EngineBroken,
    ModelFailed,
    ModelOutputInvalid,
    ServiceError,
    ShuttingDown,
    TooLarge,
)

log = logging.getLogger(__name__)

# A text that is tokenized sooner than a place for it would be kept and given up.
BRIEF_CHARS = 128
# What a busy-wait works on: hashlib lets go of the GIL above 2 KiB, as an engine does, and this
# takes some 10 µs.
_CHORE = bytes(4096)


@dataclass(frozen=True, slots=True)
class Batch:
    """What became of a batch, for whoever counts."""

    model: str
    queue_ns: list[int]
    inference_ns: int
    tokens: int
    padding_tokens: int
    background: bool = False


@dataclass(slots=True, eq=False)
class _Running:
    batch: list[Entry]
    rows: int
    length: int
    started_ns: int
    full: bool
    """Whether texts that might have been in it had to wait."""
    finish: Callable[[], Collection[Any]]


class Place:
    """Room in the queue for a call whose texts are tokenized, until it is submitted or given up:
    the end of the block.
    """

    def __init__(self, batcher: Batcher, flow: Flow | None) -> None:
        self.flow = flow
        self._batcher = batcher

    def __enter__(self) -> Place:
        return self

    def __exit__(self, *_: object) -> None:
        if self.flow is not None and self.flow.texts:
            self._batcher.drop(self.flow)


@dataclass
class Batcher:
    """Batches for all models on one device.

    Limits: `max_batch_size` items and `max_batch_tokens` tokens a batch, padding counted (a single
    item may exceed it), `max_waiting` items in the queue, and in it no more than can be answered in
    time and within `max_queue_s`. `batch_size` rounds a batch down to one the engine likes, `rows`
    says how many rows the engine makes of it, where items do not share rows. `in_flight` batches
    may run at once.

    What is submitted in the background waits beside the queue, at most `max_background` items, and
    a batch of it begins only when nothing else waits.
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
    max_queue_s: float = math.inf

    queue: Queue = field(init=False)
    broken: bool = field(default=False, init=False)
    """Whether a model's engine can do nothing any more, which nothing in this process mends."""
    _changed: threading.Condition = field(default_factory=threading.Condition, init=False)
    _running: deque[_Running] = field(default_factory=deque, init=False)
    _alone: deque[Entry] = field(default_factory=deque, init=False)
    """What a failed batch held and is to be run alone; the first of them is running."""
    _called: bool = field(default=False, init=False)
    _runs: bool = field(default=False, init=False)
    _closing: bool = field(default=False, init=False)
    _finished_ns: int = field(default=0, init=False)
    _woken_ns: int = field(default=0, init=False)
    """When the thread last had something to do after it had had nothing."""
    _starting_ns: int | None = field(default=None, init=False)
    _thread: threading.Thread | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.queue = Queue(self.max_waiting, self.max_background, self.max_queue_s)

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="batcher", daemon=True)
        self._runs = True
        self._thread.start()

    @property
    def waiting(self) -> int:
        """How many items wait, those of the background left out."""
        return len(self.queue)

    @property
    def queue_s(self) -> float:
        """How many seconds of the engine wait, by the pace that was measured; texts that are being
        tokenized count.
        """
        with self._changed:
            return self.queue.capacity.queue_s

    def check_room(self, deadline: float = math.inf) -> None:
        """Overloaded if even a short text would be refused just now: whoever asks first need not
        read what was sent for nothing.
        """
        if self.queue.capacity.calm and self.queue.capacity.texts < self.max_waiting:
            return  # It is so nearly always, and this is asked for every request.
        with self._changed:
            if not self._closing:
                self.queue.capacity.check_room(deadline)

    def reserve(
        self,
        model: str,
        chars: Sequence[int],
        max_tokens: int | None = None,
        deadline: float = math.inf,
    ) -> Place:
        """Room for a call whose texts, of so many characters each, are about to be tokenized;
        raises what `submit` would.

        `max_tokens` is what the model reads of a text. The place is kept for the block that it is
        used in. A short text has none while there is plenty of room: it is tokenized at once.
        """
        if len(chars) == 1 and chars[0] <= BRIEF_CHARS and self.queue.capacity.calm:
            return Place(self, None)
        tokens = sum([estimated_tokens(count, max_tokens) for count in chars])
        with self._changed:
            self._check_open(len(chars))
            capacity = self.queue.capacity
            flow = capacity.flow(model, len(chars), tokens, deadline)
            capacity.admit(flow)
        return Place(self, flow)

    async def submit(
        self,
        model: str,
        items: Sequence[Item],
        timeout_s: float = math.inf,
        busy_wait: float = 0.0,
        background: bool = False,
        place: Place | None = None,
    ) -> list[Row]:
        """Returns the items' rows in order, or raises what became of them.

        Items are admitted together or not at all. Raises Overloaded when the queue has no room for
        all or they would be late, TooLarge when it never could have, ShuttingDown while draining,
        DeadlineExceeded if an item could not be answered within `timeout_s`, and what the model
        raised for a batch of that item alone.

        `busy_wait` makes their batches longer by that share of their own duration, for a proof that
        must show it would see a slower model. Only items with one `busy_wait` share a batch.
        `background` is for work that nobody waits for: it takes no room of the queue, and is
        refused when there is too much of its kind. `place` is what was reserved for them; if they
        have no more tokens than that, they are admitted.
        """
        if not items:
            return []
        loop = asyncio.get_running_loop()
        deadline = time.monotonic() + timeout_s
        own = self.models[model]
        padded = [own.padded_length(item.tokens) for item in items]
        flow = self._flow(model, padded, deadline, place)
        call = Call(loop, loop.create_future(), deadline, [None] * len(items), len(items), flow)
        now = time.monotonic_ns()
        entries = [
            Entry(call, number, item, model, own, length, now, busy_wait, background)
            for number, (item, length) in enumerate(zip(items, padded, strict=True))
        ]
        with self._changed:
            self._check_open(len(items))
            if background:
                self.queue.append_background(entries)
            else:
                self._admit(flow, padded, place)
                self.queue.append(entries)
            if not self._called:
                # Once for all that the loop has at hand: called for the first of them, the thread
                # would take it alone.
                self._called = True
                loop.call_soon(self._call_the_thread)
        # Leaving, by the deadline or because the caller is cancelled, settles the answer: what
        # still waits of it is dropped.
        late = None if math.isinf(timeout_s) else loop.call_later(timeout_s, expire, call)
        try:
            return await call.answer
        finally:
            if late is not None:
                late.cancel()
            if flow.waiting:
                self.drop(flow)

    def drop(self, flow: Flow) -> None:
        """Drops what waits of a call, or the place that is kept for it."""
        with self._changed:
            self.queue.drop(flow)

    def _check_open(self, texts: int) -> None:
        if self._closing:
            raise ShuttingDown("This replica is draining; another one answers.")
        if texts > self.max_waiting:
            raise TooLarge(
                f"The request makes {texts} items, and the queue holds {self.max_waiting}; send"
                " several requests."
            )

    def _flow(
        self, model: str, padded: Sequence[int], deadline: float, place: Place | None
    ) -> Flow:
        """The place that was kept for items of so many tokens each if it is large enough, else one
        that is not admitted yet.
        """
        tokens, kept = sum(padded), None if place is None else place.flow
        if (
            kept is not None
            and len(padded) <= kept.texts
            and tokens + TEXT_COST * len(padded) <= kept.tokens
        ):
            return kept
        return self.queue.capacity.flow(model, len(padded), tokens, deadline)

    def _admit(self, flow: Flow, padded: Sequence[int], place: Place | None) -> None:
        """Admits a call, if it is not admitted already."""
        capacity, kept = self.queue.capacity, None if place is None else place.flow
        if flow is kept:
            capacity.remove(
                flow, flow.texts - len(padded), flow.tokens - sum(padded) - TEXT_COST * len(padded)
            )
            return
        if kept is not None:
            self.queue.drop(kept)
        capacity.admit(flow)

    def _call_the_thread(self) -> None:
        with self._changed:
            self._called = False
            self._changed.notify()

    @property
    def alive(self) -> bool:
        """Whether the submitting thread runs; it outlives whatever a model does."""
        return self._runs

    @property
    def died(self) -> bool:
        """Whether that thread has ended by itself, as only a bug can make it."""
        return self._thread is not None and not self._runs and not self._closing

    @property
    def stuck_s(self) -> float:
        """For how long the oldest batch that the model was given has been with it; 0 if there is
        none.
        """
        # First what is being started: a batch moves from there to what runs.
        starting_ns = self._starting_ns
        starts_ns = [run.started_ns for run in list(self._running)]
        if starting_ns is not None:
            starts_ns.append(starting_ns)
        return (time.monotonic_ns() - min(starts_ns)) / 1e9 if starts_ns else 0.0

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
        for entry in self._abandoned():
            fail(entry.call, ShuttingDown("This replica stopped before it had answered this text."))
        return False

    def _abandoned(self) -> list[Entry]:
        """Whatever was accepted and is not answered; taken from the queue, for whoever gives up on
        it.
        """
        with self._changed:
            return [
                *self.queue.take_all(),
                *(entry for run in list(self._running) for entry in run.batch),
                *list(self._alone),
            ]

    # The submitting thread, in the order a batch goes through it.

    def _run(self) -> None:
        try:
            self._work()
        except (
            BaseException
        ):  # A bug: it ends this thread and, by whoever watches `died`, the process.
            log.critical("the thread that runs the models has ended", exc_info=True)
        finally:
            self._runs = False
            for entry in self._abandoned():
                fail(
                    entry.call,
                    ModelFailed(
                        "The thread that runs the models has ended; this replica will end."
                    ),
                )

    def _work(self) -> None:
        while True:
            batch = self._next_batch(wait=not self._running)
            if batch:
                self._start(batch)
            elif batch is None and not self._running:
                return
            if self._running and (not batch or len(self._running) >= self.in_flight):
                self._finish(self._running[0])

    def _next_batch(self, wait: bool) -> list[Entry] | None:
        """What to run next: [] if nothing waits just now, None if nothing ever will."""
        with self._changed:
            while True:
                if self._closing:
                    self.queue.drop_the_background()
                limits = BatchLimits(
                    self.max_batch_size, self.max_batch_tokens, self.batch_size, self.rows
                )
                if batch := self.queue.take(limits):
                    return batch
                if self._closing:
                    return None
                if not wait:
                    return []
                self._changed.wait()
                self._woken_ns = time.monotonic_ns()

    def _start(self, batch: list[Entry]) -> _Running | None:
        """Hands a batch to its model; None if that failed, and what was to be done about it is
        done.
        """
        self._starting_ns = started = time.monotonic_ns()
        try:
            rows, length = self._shape(batch)
            finish = batch[0].model.start([entry.item for entry in batch])
        except Exception as error:  # The worker outlives whatever a model does.
            self._starting_ns = None
            self._failed(batch, error)
            return None
        run = _Running(batch, rows, length, started, self.queue.left_behind, finish)
        self._running.append(run)
        self._starting_ns = None
        return run

    def _shape(self, batch: list[Entry]) -> tuple[int, int]:
        """(rows, tokens of each) that the engine makes of a batch."""
        packing = batch[0].model.packing
        if packing is None:
            return self.rows(len(batch)), max(entry.length for entry in batch)
        layout = packing.lay_out([entry.item.tokens for entry in batch])
        return len(layout.rows), layout.length

    def _finish(self, run: _Running) -> None:
        try:
            values = run.finish()
            if len(values) != len(run.batch):
                raise ModelOutputInvalid(
                    f"The model answered {len(values)} rows for {len(run.batch)} texts."
                )
        except Exception as error:  # The worker outlives whatever a model does.
            self._running.remove(run)
            self._failed(run.batch, error)
            return
        # Handed over while the one before was computed, it waited for that.
        begun_ns = max(run.started_ns, self._finished_ns)
        if run.batch[0].busy_wait:
            _keep_busy(begun_ns, run.batch[0].busy_wait)
        now = time.monotonic_ns()
        rows = [
            Row(value, begun_ns - entry.since_ns, now - begun_ns, len(run.batch), run.length)
            for value, entry in zip(values, run.batch, strict=True)
        ]
        # Counted first: the loop's thread and this one would get in each other's way once the
        # answers are there.
        self._count(run, [row.queue_ns for row in rows], now - begun_ns, now)
        self._finished_ns = now
        deliver(run.batch, rows)
        self._running.remove(run)

    def _failed(self, batch: list[Entry], error: Exception) -> None:
        """Runs the items of a failed batch alone, once, so that a poisonous text hurts
        nobody else.
        """
        if isinstance(error, EngineBroken):
            self.broken = True
            log.critical(
                "the engine is broken",
                extra={"model": batch[0].name, "why": error.message},
                exc_info=error.__cause__,
            )
            for entry in batch:
                fail(entry.call, error)
            return
        if len(batch) == 1:
            if isinstance(error, ServiceError):
                log.error(
                    "model answered no answer", extra={"model": batch[0].name, "why": error.message}
                )
                fail(batch[0].call, error)
            else:
                log.error("model raised", extra={"model": batch[0].name}, exc_info=error)
                fail(
                    batch[0].call,
                    ModelFailed("The model failed on this text; the failure is in the log."),
                )
            return
        self._alone.extend(batch)
        while self._alone:
            entry = self._alone[0]
            if not entry.call.gone and (run := self._start([entry])):
                self._finish(run)
            self._alone.popleft()

    def _count(self, run: _Running, queue_ns: list[int], inference_ns: int, now_ns: int) -> None:
        tokens = sum(entry.item.tokens for entry in run.batch)
        # From one batch's end to the next one's: what happens between them takes the queue's time
        # as well.
        busy_s = (now_ns - max(self._woken_ns, self._finished_ns or run.started_ns)) / 1e9
        self.queue.capacity.note(
            run.batch[0].name,
            sum([entry.length for entry in run.batch]) + TEXT_COST * len(run.batch),
            busy_s,
            run.full,
        )
        try:
            self.on_batch(
                Batch(
                    run.batch[0].name,
                    queue_ns,
                    inference_ns,
                    tokens,
                    run.rows * run.length - tokens,
                    run.batch[0].background,
                )
            )
        except Exception:  # Nor does counting end the worker.
            log.exception("a batch could not be counted")


def _keep_busy(started_ns: int, share: float) -> None:
    """Computes until what began at `started_ns` has taken `share` longer. A sleep would leave the
    processor to others.
    """
    now = time.monotonic_ns()
    due = now + int(share * (now - started_ns))
    while (now := time.monotonic_ns()) < due:
        if (
            due - now > 20_000
        ):  # the last bit on the clock alone, or a short batch would be late by half a chore
            hashlib.sha256(_CHORE)
