"""
Turns concurrent requests into batches, and the results of a batch into answers.

One queue, one thread that runs the models, no timer: a batch is what waits when the engine is free.
So batches grow under load, and an idle service adds no delay.

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
from service.batching.packing import most_texts
from service.batching.queue import BatchLimits, Queue
from service.batching.requests import (
    Batch,
    Flow,
    Item,
    Model,
    PendingRequest,
    QueuedItem,
    Result,
    deliver,
    expire,
    fail,
)
from service.errors import (
    EngineBroken,
    ModelFailed,
    ModelOutputInvalid,
    ServiceError,
    ShuttingDown,
    TooLarge,
)

log = logging.getLogger(__name__)

# To tokenize such a short text is quicker than to reserve a place for it and release it.
SHORT_TEXT_CHARS = 128
# hashlib releases the GIL above 2 KiB, as an engine does; hashing this takes some 10 µs.
_SPIN_WORK = bytes(4096)


@dataclass(frozen=True, slots=True)
class BatchStats:
    """What a batch took, for metrics."""

    model: str
    """The model's key in the batcher."""
    queue_ns: list[int]
    """For each item, the time from its arrival to the start of the batch."""
    inference_ns: int
    tokens: int
    padding_tokens: int
    is_background: bool = False


@dataclass(slots=True, eq=False)
class _RunningBatch:
    batch: Batch
    rows: int
    length: int
    started_ns: int
    started_cpu_ns: int
    is_full: bool
    """Whether candidates for it were left in the queue."""
    is_first_of_shape: bool
    finish: Callable[[], Collection[Any]]


class Reservation:
    """A place in the queue for a request whose texts are being tokenized.

    It is held until the request is submitted, or until the end of the `with` block.
    """

    def __init__(self, batcher: Batcher, flow: Flow | None) -> None:
        self.flow = flow
        self._batcher = batcher

    def __enter__(self) -> Reservation:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Give the place back, unless it was given back or used already."""
        if self.flow is not None and self.flow.texts:
            self._batcher.drop(self.flow)

    def withdraw(self) -> None:
        """Give the place back for a request that needs no engine after all."""
        if self.flow is not None and self.flow.texts:
            self._batcher.withdraw(self.flow)

    def handed_over(self) -> Reservation:
        """Return the place as a reservation of its own, which outlives this one."""
        handed, self.flow = Reservation(self._batcher, self.flow), None
        return handed


@dataclass
class Batcher:
    """Batches for all models on one device.

    At most `max_queue_size` items wait, and no more than can be answered in time and within
    `max_queue_s`. Background items wait apart, at most `max_background` of them, and a batch of
    them begins only when nothing else waits.
    """

    models: Mapping[str, Model[Any]]
    """By key. Models may be added and removed at any time."""
    limits: BatchLimits = field(default_factory=BatchLimits)
    """What a batch may hold, and how many may run at once; replaced as a whole."""
    max_queue_size: int = 2048
    max_background: int = 256
    on_batch: Callable[[BatchStats], None] = lambda batch: None
    """Called after each batch, in the thread that runs the models."""
    max_queue_s: float = math.inf
    cpu_clock: Callable[[], int] = time.process_time_ns
    """Returns the CPU time of the engine so far, in nanoseconds."""

    queue: Queue = field(init=False)
    is_broken: bool = field(default=False, init=False)
    """Whether the engine of a model cannot be used any more; only a new process repairs that."""
    _changed: threading.Condition = field(default_factory=threading.Condition, init=False)
    _running: deque[_RunningBatch] = field(default_factory=deque, init=False)
    _isolated_retries: deque[QueuedItem] = field(default_factory=deque, init=False)
    """Items of a failed batch, each to be run alone; the first of them is running."""
    _wakeup_scheduled: bool = field(default=False, init=False)
    _alive: bool = field(default=False, init=False)
    _closing: bool = field(default=False, init=False)
    _finished_ns: int = field(default=0, init=False)
    _finished_cpu_ns: int = field(default=0, init=False)
    _batches: int = field(default=0, init=False)
    """Batches that have finished."""
    _woken_ns: int = field(default=0, init=False)
    """When the thread last woke from waiting, by time.monotonic_ns()."""
    _starting_ns: int | None = field(default=None, init=False)
    """When the batch that is being handed to its model was taken; None if there is none."""
    _thread: threading.Thread | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.queue = Queue(self.max_queue_size, self.max_background, self.max_queue_s)

    def start(self) -> None:
        """Start the thread that runs the models."""
        self._thread = threading.Thread(target=self._run, name="batcher", daemon=True)
        self._alive = True
        self._thread.start()

    @property
    def waiting(self) -> int:
        """How many items wait, without those in the background."""
        return len(self.queue)

    @property
    def queue_s(self) -> float:
        """Engine seconds of everything that waits, by the pace measured so far.

        Texts that are being tokenized count.
        """
        with self._changed:
            return self.queue.capacity.queue_s

    def check_capacity(self, deadline: float = math.inf) -> None:
        """Raise Overloaded if even a short text would be refused now.

        Asked before a body is parsed, so that a refusal costs little. It admits nothing.
        """
        if self.queue.capacity.is_calm and self.queue.capacity.texts < self.max_queue_size:
            return  # Nearly always, and this is asked for every request.
        with self._changed:
            if not self._closing:
                self.queue.capacity.check_capacity(deadline)

    def reserve(
        self,
        model: str,
        chars: Sequence[int],
        max_tokens: int | None = None,
        deadline: float = math.inf,
    ) -> Reservation:
        """Admit a request whose texts are about to be tokenized.

        `chars` holds each text's length in characters, `max_tokens` is what the model reads of a
        text. A short text gets no reservation while there is plenty of room: it is tokenized at
        once. Raises Overloaded, TooLarge or ShuttingDown, as `submit` does.
        """
        if len(chars) == 1 and chars[0] <= SHORT_TEXT_CHARS and self.queue.capacity.is_calm:
            return Reservation(self, None)
        tokens = sum([estimated_tokens(count, max_tokens) for count in chars])
        with self._changed:
            self._check_open(len(chars))
            capacity = self.queue.capacity
            flow = capacity.flow(model, len(chars), tokens, deadline)
            capacity.admit(flow)
        return Reservation(self, flow)

    async def submit(
        self,
        model: str,
        items: Sequence[Item],
        timeout_s: float = math.inf,
        injected_delay: float = 0.0,
        background: bool = False,
        reservation: Reservation | None = None,
        expires: bool = True,
    ) -> list[Result]:
        """Return the items' results in their order.

        All items are admitted, or none. Raises Overloaded if the queue has no room for all of them
        or they would be late, TooLarge if they never fit, ShuttingDown while draining,
        DeadlineExceeded if an item was not answered within `timeout_s`, and for an item that fails
        alone what its model raised.

        `injected_delay` makes a batch longer by that share of its duration, for a proof that must
        show that it detects a slower model. Items share batches whatever their delays are, or the
        delayed ones would be in smaller batches than the others; the largest delay counts.
        `background` items take no room in the queue, and are refused when there are too many.
        A `reservation` that is large enough has admitted the items already; otherwise they are
        admitted anew. Without `expires`, `timeout_s` is only planned with: the items wait until
        they are computed or the call is cancelled.
        """
        if not items:
            return []
        loop = asyncio.get_running_loop()
        deadline = time.monotonic() + timeout_s
        target = self.models[model]
        lengths = [target.padded_length(item.tokens) for item in items]
        flow = self._flow(model, lengths, deadline, reservation)
        latest = deadline if expires else math.inf
        request = PendingRequest(
            loop, loop.create_future(), latest, [None] * len(items), len(items), flow
        )
        now = time.monotonic_ns()
        queued = [
            QueuedItem(request, index, item, model, target, length, now, injected_delay, background)
            for index, (item, length) in enumerate(zip(items, lengths, strict=True))
        ]
        with self._changed:
            self._check_open(len(items))
            if background:
                self.queue.append_background(queued)
            else:
                self._admit(flow, lengths, reservation)
                self.queue.append(queued)
            if not self._wakeup_scheduled:
                # One wake-up per turn of the event loop: woken by the first item, the thread would
                # run it alone.
                self._wakeup_scheduled = True
                loop.call_soon(self._wake_worker)
        # The deadline, or a caller that is cancelled, settles the future. Items of the request that
        # are still in the queue are dropped then.
        expiry = None if math.isinf(latest) else loop.call_later(timeout_s, expire, request)
        try:
            return await request.future
        finally:
            if expiry is not None:
                expiry.cancel()
            if flow.waiting:
                self.drop(flow)

    def drop(self, flow: Flow) -> None:
        """Drop what waits of a request, or the place that is held for it."""
        with self._changed:
            self.queue.drop(flow)

    def withdraw(self, flow: Flow) -> None:
        """Drop a place that needs no engine, and do not count it as load either."""
        with self._changed:
            self.queue.capacity.forgive(flow)
            self.queue.drop(flow)

    def _check_open(self, texts: int) -> None:
        if self._closing:
            raise ShuttingDown("This replica is draining; another one answers.")
        if texts > self.max_queue_size:
            raise TooLarge(
                f"The request makes {texts} items, and the queue holds {self.max_queue_size}; send"
                " several requests."
            )

    def _flow(
        self, model: str, lengths: Sequence[int], deadline: float, reservation: Reservation | None
    ) -> Flow:
        """Return the reserved flow if it is large enough, else one that is not admitted yet."""
        reserved = None if reservation is None else reservation.flow
        tokens, texts = sum(lengths), len(lengths)
        if (
            reserved is not None
            and texts <= reserved.texts
            and tokens + TEXT_COST * texts <= reserved.tokens
        ):
            return reserved
        return self.queue.capacity.flow(model, texts, tokens, deadline)

    def _admit(self, flow: Flow, lengths: Sequence[int], reservation: Reservation | None) -> None:
        """Admit a request, unless its reservation has admitted it already."""
        capacity = self.queue.capacity
        reserved = None if reservation is None else reservation.flow
        if flow is reserved:
            tokens = sum(lengths) + TEXT_COST * len(lengths)
            capacity.remove(flow, flow.texts - len(lengths), flow.tokens - tokens)
            return
        if reserved is not None:
            self.queue.drop(reserved)
        capacity.admit(flow)

    def _wake_worker(self) -> None:
        with self._changed:
            self._wakeup_scheduled = False
            self._changed.notify()

    @property
    def is_alive(self) -> bool:
        """Whether the thread that runs the models is alive; no failure of a model ends it."""
        return self._alive

    @property
    def crashed(self) -> bool:
        """Whether that thread has ended by itself, which only a bug can cause."""
        return self._thread is not None and not self._alive and not self._closing

    @property
    def stalled_for_s(self) -> float:
        """For how long the oldest running batch has been with its model; 0 if none runs."""
        # `_starting_ns` is read first: a batch moves from there to `_running`.
        starting_ns = self._starting_ns
        starts_ns = [running.started_ns for running in list(self._running)]
        if starting_ns is not None:
            starts_ns.append(starting_ns)
        return (time.monotonic_ns() - min(starts_ns)) / 1e9 if starts_ns else 0.0

    async def close(self, timeout_s: float) -> bool:
        """Refuse new items, finish the accepted ones, and return whether that was in time.

        Items that are not finished, running or waiting, are answered with ShuttingDown.
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
        for queued in self._abandon():
            fail(
                queued.request,
                ShuttingDown("This replica stopped before it had answered this text."),
            )
        return False

    def _abandon(self) -> list[QueuedItem]:
        """Empty the queue, and return every item that was accepted and is not answered."""
        with self._changed:
            items = self.queue.take_all()
            for running in list(self._running):
                items += running.batch.items
            return [*items, *self._isolated_retries]

    # The thread that runs the models, in the order in which a batch passes through it.

    def _run(self) -> None:
        try:
            self._work()
        except BaseException:
            # A bug. It ends this thread and, through whoever watches `crashed`, the process.
            log.critical("the thread that runs the models has ended", exc_info=True)
        finally:
            self._alive = False
            for queued in self._abandon():
                fail(
                    queued.request,
                    ModelFailed(
                        "The thread that runs the models has ended; this replica will end."
                    ),
                )

    def _work(self) -> None:
        while True:
            batch = self._next_batch(wait=not self._running)
            if batch is not None:
                self._start(batch)
            elif self._closing and not self._running:
                return
            if self._running and (batch is None or len(self._running) >= self.limits.in_flight):
                self._finish(self._running[0])

    def _next_batch(self, wait: bool) -> Batch | None:
        """Return what to run next, or None if nothing waits.

        With `wait`, None means that the batcher is closing.
        """
        with self._changed:
            while True:
                if self._closing:
                    self.queue.drop_background()
                batch = self.queue.take(self.limits)
                if batch is not None or self._closing or not wait:
                    return batch
                self._changed.wait()
                self._woken_ns = time.monotonic_ns()

    def _start(self, batch: Batch) -> _RunningBatch | None:
        """Hand a batch to its model; return None if that failed and the failure was handled."""
        self._starting_ns = started_ns = time.monotonic_ns()
        started_cpu_ns = self.cpu_clock()
        try:
            rows, length = self._shape(batch)
            texts = 1 if batch.layout is None else most_texts(batch.layout)
            is_first = not batch.first.model.has_run(rows, length, texts)
            items = [queued.item for queued in batch.items]
            finish = batch.first.model.start(items, batch.layout)
        except Exception as error:  # No failure of a model ends this thread.
            self._starting_ns = None
            self._handle_failure(batch, error)
            return None
        running = _RunningBatch(
            batch,
            rows,
            length,
            started_ns,
            started_cpu_ns,
            self.queue.left_behind,
            is_first,
            finish,
        )
        self._running.append(running)
        self._starting_ns = None
        return running

    def _shape(self, batch: Batch) -> tuple[int, int]:
        """Return the rows that the engine makes of a batch, and the tokens of each."""
        if batch.layout is None:
            return self.limits.rows(len(batch.items)), max(each.length for each in batch.items)
        return len(batch.layout.rows), batch.layout.length

    def _finish(self, running: _RunningBatch) -> None:
        batch = running.batch
        try:
            values = running.finish()
            if len(values) != len(batch.items):
                raise ModelOutputInvalid(
                    f"The model answered {len(values)} rows for {len(batch.items)} texts."
                )
        except Exception as error:  # No failure of a model ends this thread.
            self._running.remove(running)
            self._handle_failure(batch, error)
            return
        # Its time starts when the batch before it has finished, if that was still running.
        begun_ns = max(running.started_ns, self._finished_ns)
        begun_cpu_ns = max(running.started_cpu_ns, self._finished_cpu_ns)
        if delay := batch.injected_delay:
            # What it takes to find out how long to compute is a part of it.
            spin_from_ns = time.thread_time_ns()
            wall_ns = time.monotonic_ns() - begun_ns
            computed_ns = _computed_ns(wall_ns, self.cpu_clock() - begun_cpu_ns)
            _spin(spin_from_ns + int(delay * computed_ns))
        now, cpu_now = time.monotonic_ns(), self.cpu_clock()
        inference_ns = now - begun_ns
        self._batches += 1
        results = [
            Result(
                value,
                begun_ns - queued.enqueued_ns,
                inference_ns,
                cpu_now - begun_cpu_ns,
                len(batch.items),
                running.length,
                self._batches,
                running.is_first_of_shape,
            )
            for value, queued in zip(values, batch.items, strict=True)
        ]
        # Counted before the answers are delivered: afterwards the event loop's thread and this one
        # compete for the interpreter.
        self._count(running, [result.queue_ns for result in results], inference_ns, now)
        self._finished_ns, self._finished_cpu_ns = now, cpu_now
        deliver(batch.items, results)
        self._running.remove(running)

    def _handle_failure(self, batch: Batch, error: Exception) -> None:
        """Fail a batch whose engine is broken; run the items of another one alone, once.

        So a bad text fails only itself.
        """
        model = batch.first.model_key
        if isinstance(error, EngineBroken):
            self.is_broken = True
            log.critical(
                "the engine is broken",
                extra={"model": model, "why": error.message},
                exc_info=error.__cause__,
            )
            for queued in batch.items:
                fail(queued.request, error)
            return
        if len(batch.items) == 1:
            if isinstance(error, ServiceError):
                log.error(
                    "the output of a model is invalid", extra={"model": model, "why": error.message}
                )
            else:
                log.error("model raised", extra={"model": model}, exc_info=error)
                error = ModelFailed("The model failed on this text; the failure is in the log.")
            fail(batch.first.request, error)
            return
        self._isolated_retries.extend(batch.items)
        while self._isolated_retries:
            queued = self._isolated_retries[0]
            if not queued.request.is_done:
                running = self._start(Batch([queued]))
                if running is not None:
                    self._finish(running)
            self._isolated_retries.popleft()

    def _count(
        self, running: _RunningBatch, queue_ns: list[int], inference_ns: int, now_ns: int
    ) -> None:
        items, first = running.batch.items, running.batch.first
        tokens = sum([queued.item.tokens for queued in items])
        # Measured from the end of one batch to the end of the next, because the time between them
        # delays the queue as well.
        busy_s = (now_ns - max(self._woken_ns, self._finished_ns or running.started_ns)) / 1e9
        cost = sum([queued.length for queued in items]) + TEXT_COST * len(items)
        self.queue.capacity.note(first.model_key, cost, busy_s, running.is_full)
        padding = running.rows * running.length - tokens
        stats = BatchStats(
            first.model_key, queue_ns, inference_ns, tokens, padding, first.is_background
        )
        try:
            self.on_batch(stats)
        except Exception:  # Counting does not end this thread either.
            log.exception("a batch could not be counted")


def _computed_ns(wall_ns: int, cpu_ns: int) -> int:
    """Return how long a batch was computed, without the time when others had the processor.

    An engine with several threads has more CPU time than wall time. One that hardly uses the
    processor waits for a GPU, and its wall time counts.
    """
    return min(wall_ns, cpu_ns) if cpu_ns > wall_ns / 4 else wall_ns


def _spin(end_ns: int) -> None:
    """Compute in this thread until that time of its CPU clock, as a slower model would.

    A sleep would leave the processor to others. By the wall clock, time in which others have the
    processor would count as computed.
    """
    while (now := time.thread_time_ns()) < end_ns:
        if end_ns - now > 20_000:
            # The last 20 µs only read the clock: a hash could overshoot.
            hashlib.sha256(_SPIN_WORK)
