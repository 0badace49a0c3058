"""
A request's items on their way through the batcher, and their results on the way back.

Results come from the thread that runs the models. A caller is woken in its own event loop, once,
when all of its results are there.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, TypeVar

from service.batching.packing import Layout, Packing
from service.errors import DeadlineExceeded

log = logging.getLogger(__name__)


class Item(Protocol):
    """What a model computes one result for: an encoded text."""

    @property
    def tokens(self) -> int:
        """Token count, special tokens included."""
        ...


AnyItem = TypeVar("AnyItem", contravariant=True)


class Model(Protocol[AnyItem]):
    """What the batcher needs of a model."""

    @property
    def padding_invariant(self) -> bool:
        """Whether padding changes no result; if it does, only equal lengths share a batch."""
        ...

    @property
    def packing(self) -> Packing | None:
        """How several items are packed into a row; None if each has a row of its own."""
        ...

    def start(
        self, batch: Sequence[AnyItem], layout: Layout | None, /
    ) -> Callable[[], Collection[Any]]:
        """Begin a batch; the function returned waits for its results, one per item.

        `layout` says where a packed batch's items are; None if each has a row of its own.
        """
        ...

    def padded_length(self, tokens: int) -> int:
        """Return the length in tokens that an item is padded to when it runs alone."""
        ...

    def has_run(self, rows: int, length: int, texts: int, /) -> bool:
        """Return whether it has run a batch of that shape before.

        `texts` is the largest number of items in a row.
        """
        ...


@dataclass(slots=True)  # not frozen: several are made per request, and that costs more
class Result:
    """The result of one item, and where its time went."""

    value: Any
    queue_ns: int
    inference_ns: int
    inference_cpu_ns: int
    """CPU time of its batch, from its start to its end, in all threads of the engine."""
    batch_size: int
    length: int
    """Tokens of each row of its batch, padding included."""
    batch_number: int = 0
    """Counts the batches of a process from 1."""
    is_first_of_shape: bool = False
    """Whether the model had not run a batch of this shape before, which takes longer."""
    cached: bool = False
    """Whether it was computed for another text, equal to this one."""


@dataclass(slots=True, eq=False)
class Flow:
    """The items of a request that wait, in their order.

    While a request's texts are tokenized, it has a flow without items that holds their place.
    """

    model: str
    """The model's key in the batcher."""
    texts: int
    """Texts that wait, or for which the place is held."""
    tokens: int
    """Tokens of these, with padding and TEXT_COST; an estimate while they are tokenized."""
    due: float
    """When it is planned to be answered, in seconds of time.monotonic().

    That is its deadline, or earlier where the queue is bounded in time.
    """
    is_light: bool
    """Whether it is one text, or little work: then it goes before lists."""
    arrived: float
    """When the request arrived, in seconds of time.monotonic()."""
    arrival_number: int = 0
    credit_s: float = 0.0
    """Engine seconds left of a list's turn; negative if it had more than its turn."""
    waiting: list[QueuedItem] = field(default_factory=list)


@dataclass(slots=True)
class PendingRequest:
    """A caller and the results it waits for."""

    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[list[Result]]
    deadline: float
    """In seconds of time.monotonic()."""
    results: list[Result | None]
    missing: int
    """How many results are not there yet."""
    flow: Flow

    @property
    def is_done(self) -> bool:
        """Whether it is answered or cancelled, so that nothing more need be done for it."""
        return self.future.done()


@dataclass(slots=True)
class QueuedItem:
    """One item of a request, as it waits in the queue."""

    request: PendingRequest
    index: int
    """Its index among the request's items."""
    item: Item
    model_key: str
    """The model's key in the batcher."""
    model: Model[Any]
    """The model itself; it may be unloaded while an abandoned item is still in the queue."""
    length: int
    """Tokens that it is padded to when it runs alone."""
    enqueued_ns: int
    injected_delay: float
    """Share of a batch's duration by which the batch is made longer, for a positive control."""
    is_background: bool = False


@dataclass(slots=True)  # not frozen: several are made per request, and that costs more
class Batch:
    """Items of one model that run together."""

    items: list[QueuedItem]
    layout: Layout | None = None
    """Where the items are, if they are packed; None if each has a row of its own."""

    @property
    def first(self) -> QueuedItem:
        """The item whose turn it was; the model is the same for all."""
        return self.items[0]

    @property
    def injected_delay(self) -> float:
        """The largest share by which one of its items makes it longer."""
        return max([queued.injected_delay for queued in self.items])


def deliver(items: Sequence[QueuedItem], results: Sequence[Result]) -> None:
    """Hand results to their requests, and wake the callers that have all of theirs.

    Each event loop is called into once.
    """
    complete: dict[asyncio.AbstractEventLoop, list[PendingRequest]] = {}
    for queued, result in zip(items, results, strict=True):
        request = queued.request
        request.results[queued.index] = result
        request.missing -= 1
        if request.missing == 0:
            complete.setdefault(request.loop, []).append(request)
    for loop, requests in complete.items():
        _call_in_loop(loop, partial(_resolve, requests))


def fail(request: PendingRequest, error: Exception) -> None:
    """Raise `error` in the caller, from any thread, unless the request is done."""
    _call_in_loop(request.loop, partial(_reject, request, error))


def expire(request: PendingRequest) -> None:
    """End a request whose deadline has passed; called in its own event loop."""
    _reject(request, DeadlineExceeded("The answer was not there within the request's time limit."))


def _resolve(requests: list[PendingRequest]) -> None:
    for request in requests:
        # The caller may have left, or another of its items may have failed, in the meantime.
        if not request.future.done():
            request.future.set_result(request.results)  # type: ignore[arg-type]


def _reject(request: PendingRequest, error: Exception) -> None:
    if not request.future.done():
        request.future.set_exception(error)


def _call_in_loop(loop: asyncio.AbstractEventLoop, settle: Callable[[], object]) -> None:
    try:
        loop.call_soon_threadsafe(settle)
    except RuntimeError:
        log.debug("the event loop of a caller has closed")
