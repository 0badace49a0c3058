"""
Who waits for what: a caller in its event loop, the items it gave, and how their rows find the way
back.

Rows come from the thread that runs the models; a caller is woken in its own loop, once, when all of
its rows are there.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, TypeVar

from service.batching.packing import Packing
from service.errors import DeadlineExceeded

log = logging.getLogger(__name__)


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

    @property
    def packing(self) -> Packing | None:
        """How several items share a row; None: each has one of its own."""
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
    """Tokens that each row of its batch was padded to."""


@dataclass(slots=True, eq=False)
class Flow:
    """What waits of a call, in its order; while its texts are tokenized, a place that is kept for
    them.
    """

    model: str
    """What the batcher calls the model."""
    texts: int
    """Texts that wait, or for which the place is kept."""
    tokens: int
    """Of these, padding and TEXT_COST counted; an estimate while they are tokenized."""
    due: float
    """By when its answer is planned, by time.monotonic(): its deadline, or sooner where the queue
    is bounded so.
    """
    light: bool
    """One text, or little work: it goes before lists."""
    since: float
    """When it came, by time.monotonic()."""
    arrival: int = 0
    credit_s: float = 0.0
    """Seconds of the engine that are left of a list's turn; below zero it has had more."""
    waiting: list[Entry] = field(default_factory=list)


@dataclass(slots=True)
class Call:
    """A caller and the rows it waits for."""

    loop: asyncio.AbstractEventLoop
    answer: asyncio.Future[list[Row]]
    deadline: float
    """By time.monotonic()."""
    rows: list[Row | None]
    missing: int
    flow: Flow

    @property
    def gone(self) -> bool:
        """Answered, or left: nothing more is done for it."""
        return self.answer.done()


@dataclass(slots=True)
class Entry:
    """One item of a call, as it waits."""

    call: Call
    place: int
    item: Item
    name: str
    """What the batcher calls its model."""
    model: Model[Any]
    """The model itself: it may be let go of while what nobody waits for any more is still in the
    queue.
    """
    length: int
    """Tokens it is padded to when it runs alone."""
    since_ns: int
    busy_wait: float
    background: bool = False


def deliver(batch: Sequence[Entry], rows: Sequence[Row]) -> None:
    """Puts rows in their calls' places and wakes the callers that have all of theirs, with one call
    into each loop.
    """
    whole: dict[asyncio.AbstractEventLoop, list[Call]] = {}
    for entry, row in zip(batch, rows, strict=True):
        call = entry.call
        call.rows[entry.place] = row
        call.missing -= 1
        if call.missing == 0:
            whole.setdefault(call.loop, []).append(call)
    for loop, calls in whole.items():
        _in_loop(loop, partial(_answer, calls))


def fail(call: Call, error: Exception) -> None:
    """Raises `error` in the caller, from any thread, unless it is gone."""
    _in_loop(call.loop, partial(_refuse, call, error))


def expire(call: Call) -> None:
    """Ends a call whose time is over; in its own loop."""
    _refuse(call, DeadlineExceeded("The answer was not there within the request's time limit."))


def _answer(calls: list[Call]) -> None:
    for call in calls:
        # The caller may have left, or another of its items may have failed, in the meantime.
        if not call.answer.done():
            call.answer.set_result(call.rows)  # type: ignore[arg-type]


def _refuse(call: Call, error: Exception) -> None:
    if not call.answer.done():
        call.answer.set_exception(error)


def _in_loop(loop: asyncio.AbstractEventLoop, settle: Callable[[], object]) -> None:
    try:
        loop.call_soon_threadsafe(settle)
    except RuntimeError:
        log.debug("a caller's event loop has closed")
