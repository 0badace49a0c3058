"""
Answers texts that were answered before from memory, and computes equal texts in flight only once.

Off unless DRBERT_CACHE_MIB is set. An answer is found by the artifact's digest, the variant and the
engine, and the text's tokens, so it is the answer of the same model to the same input. Logits are
kept, so requests may differ in their activations, thresholds and dialects.

A text joins an equal one that is being computed only if that is a request of its own: the texts of
a list wait for the whole list, and a single text must not. The computation goes on as long as
anybody waits for it, whoever began it.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import math
import time
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from service.batching.batcher import Batcher, Reservation
from service.batching.requests import Item, Result
from service.errors import DeadlineExceeded

KEY_BYTES = 16
"""Bytes of a key. Two different texts have one key with a probability of 2^-128."""
ENTRY_BYTES = 320
"""Memory of an entry besides its logits, in bytes: key, array and links (CPython 3.11)."""

Logits = npt.NDArray[np.float32]
Key = bytes
Outcome = Callable[[str, str, int], None]
"""Counts texts by model and outcome: hit, joined or computed."""


class Text(Item, Protocol):
    """A text as a model reads it."""

    @property
    def ids(self) -> Sequence[int]:
        """Its token ids, special tokens included."""
        ...

    @property
    def type_ids(self) -> Sequence[int]:
        """The type of each token."""
        ...


class CachedModel(Protocol):
    """What the cache needs of a model."""

    name: str
    """What metrics call it."""
    key: str
    """What the batcher calls it."""

    @property
    def identity(self) -> str:
        """What decides its answers: the artifact's digest, the variant and the engine."""
        ...

    def __enter__(self) -> Any:
        """Keep the model loaded until the end of the block."""
        ...

    def __exit__(self, *_: object) -> None: ...


@dataclass(eq=False)
class _Computation:
    """A text that is being computed, for everybody who waits for it."""

    task: asyncio.Task[list[Result]]
    on_abandoned: Callable[[], None]
    """Called when nobody waits any more, so that nobody joins a task that is being cancelled."""
    waiting: int = 0
    """How many requests wait for it."""

    @contextlib.contextmanager
    def wanted(self) -> Iterator[None]:
        """Count a request as one that waits; when nobody waits any more, the task ends."""
        self.waiting += 1
        try:
            yield
        finally:
            self.waiting -= 1
            if not self.waiting and not self.task.done():
                self.on_abandoned()
                self.task.cancel()

    async def result(self, deadline: float) -> Result:
        """Return the result, or raise DeadlineExceeded; when nobody waits any more, it ends."""
        with self.wanted():
            try:
                left_s = None if math.isinf(deadline) else max(0.0, deadline - time.monotonic())
                async with asyncio.timeout(left_s):
                    [result] = await asyncio.shield(self.task)
                    return result
            except TimeoutError:
                raise DeadlineExceeded(
                    "The answer was not there within the request's time limit."
                ) from None


class AnswerCache:
    """The cache of one process. All methods are called on the event loop."""

    def __init__(
        self, batcher: Batcher, max_bytes: int, count: Outcome = lambda model, outcome, texts: None
    ) -> None:
        self._batcher = batcher
        self._max_bytes = max_bytes
        self._count = count
        self._logits: OrderedDict[Key, Logits] = OrderedDict()
        """Logits, (labels,), least recently used first."""
        self._computing: dict[Key, _Computation] = {}
        """Texts that others may join."""
        self.bytes = 0
        """Memory of all entries, in bytes."""

    def __len__(self) -> int:
        return len(self._logits)

    async def submit(
        self,
        model: CachedModel,
        items: Sequence[Text],
        timeout_s: float = math.inf,
        reservation: Reservation | None = None,
    ) -> list[Result]:
        """Return the items' results in their order; raises what Batcher.submit does.

        A result that was not computed for its text is marked as cached. It has no times of the
        engine, and its time in the queue is the time that it waited for another request.
        """
        deadline = time.monotonic() + timeout_s
        keys = item_keys(model, items)
        if len(items) == 1:
            results = [await self._single(model, keys[0], items[0], deadline, reservation)]
        else:
            results = await self._list(model, keys, items, deadline, reservation)
        self._count_outcomes(model.name, results)
        return results

    async def _single(
        self,
        model: CachedModel,
        key: Key,
        item: Text,
        deadline: float,
        reservation: Reservation | None,
    ) -> Result:
        """Return the result of a request of one text, which others may join."""
        cached = self._found(key)
        computation = self._computing.get(key)
        if cached is None and computation is None:
            return await self._begin(model, key, item, deadline, reservation).result(deadline)
        if reservation is not None:
            reservation.withdraw()
        return cached or await _joined(computation, deadline)

    async def _list(
        self,
        model: CachedModel,
        keys: Sequence[Key],
        items: Sequence[Text],
        deadline: float,
        reservation: Reservation | None,
    ) -> list[Result]:
        """Return the results of a list, whose equal texts are computed once."""
        results: dict[Key, Result] = {}
        joined: dict[Key, _Computation] = {}
        uncached: dict[Key, Text] = {}
        for key, item in zip(keys, items, strict=True):
            if (cached := self._found(key)) is not None:
                results[key] = cached
            elif (computation := self._computing.get(key)) is not None:
                joined[key] = computation
            else:
                uncached[key] = item
        with contextlib.ExitStack() as wanted:
            # From now on: who began them may leave before this list gets to them.
            for computation in joined.values():
                wanted.enter_context(computation.wanted())
            if uncached:
                timeout_s = max(0.0, deadline - time.monotonic())
                computed = await self._batcher.submit(
                    model.key, list(uncached.values()), timeout_s, reservation=reservation
                )
                for key, result in zip(uncached, computed, strict=True):
                    results[key] = result
                    self._keep(key, result.value)
            elif reservation is not None:
                reservation.withdraw()
            for key, computation in joined.items():
                results[key] = await _joined(computation, deadline)
        return _marked(keys, results)

    def _begin(
        self,
        model: CachedModel,
        key: Key,
        item: Text,
        deadline: float,
        reservation: Reservation | None,
    ) -> _Computation:
        """Have the batcher compute a text in a task, which does not end with who began it."""
        # The place goes with the task: the request may leave, and others wait for it.
        place = None if reservation is None else reservation.handed_over()

        async def compute() -> list[Result]:
            with model:  # It is not let go while it computes.
                # Everybody who waits has a limit of their own; the first one's is the plan.
                return await self._batcher.submit(
                    model.key,
                    [item],
                    max(0.0, deadline - time.monotonic()),
                    reservation=place,
                    expires=False,
                )

        def forget() -> None:
            if self._computing.get(key) is computation:
                del self._computing[key]

        def finish(task: asyncio.Task[list[Result]]) -> None:
            forget()
            if place is not None:
                place.release()  # A task that was cancelled before its first step has not used it.
            if not task.cancelled() and task.exception() is None:
                self._keep(key, task.result()[0].value)

        computation = _Computation(asyncio.create_task(compute()), forget)
        self._computing[key] = computation
        computation.task.add_done_callback(finish)
        return computation

    def _found(self, key: Key) -> Result | None:
        """Return the result whose logits are kept; None if there are none."""
        logits = self._logits.get(key)
        if logits is None:
            return None
        self._logits.move_to_end(key)
        return Result(logits, 0, 0, 0, 0, 0, cached=True)

    def _keep(self, key: Key, logits: Logits) -> None:
        """Keep logits, and let go of those that were not used for longest."""
        size = ENTRY_BYTES + logits.nbytes
        if size > self._max_bytes or key in self._logits:
            return
        # A copy: a row of a batch would keep the whole batch.
        self._logits[key] = logits.copy()
        self.bytes += size
        while self.bytes > self._max_bytes:
            _, oldest = self._logits.popitem(last=False)
            self.bytes -= ENTRY_BYTES + oldest.nbytes

    def _count_outcomes(self, model: str, results: Sequence[Result]) -> None:
        hits = sum([result.cached and result.batch_number == 0 for result in results])
        joined = sum([result.cached for result in results]) - hits
        outcomes = {"hit": hits, "joined": joined, "computed": len(results) - hits - joined}
        for outcome, texts in outcomes.items():
            if texts:
                self._count(model, outcome, texts)


def item_keys(model: CachedModel, items: Sequence[Text]) -> list[Key]:
    """Return for each text what identifies the model's answer to it."""
    prefix = hashlib.blake2b(f"{model.identity} ".encode(), digest_size=KEY_BYTES)
    keys = []
    for item in items:
        digest = prefix.copy()
        digest.update(_bytes_of("i", item.ids))
        digest.update(_bytes_of("b", item.type_ids))
        keys.append(digest.digest())
    return keys


def _bytes_of(kind: str, numbers: Sequence[int]) -> bytes:
    """Return numbers as bytes; those of a long text are an array of that kind already."""
    if not isinstance(numbers, array) or numbers.typecode != kind:
        numbers = array(kind, numbers)
    return numbers.tobytes()


async def _joined(computation: _Computation | None, deadline: float) -> Result:
    """Return the result of a text that was begun for another request."""
    assert computation is not None
    started_ns = time.monotonic_ns()
    result = await computation.result(deadline)
    waited_ns = time.monotonic_ns() - started_ns
    return replace(result, queue_ns=waited_ns, inference_ns=0, inference_cpu_ns=0, cached=True)


def _marked(keys: Sequence[Key], results: Mapping[Key, Result]) -> list[Result]:
    """Return the result of each text; of equal ones, all but the first are marked as cached."""
    seen: set[Key] = set()
    marked = []
    for key in keys:
        result = results[key]
        marked.append(replace(result, cached=True) if key in seen else result)
        seen.add(key)
    return marked
