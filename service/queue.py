"""
What waits for a device, and which of it makes the next batch. Whoever holds the batcher's lock uses it; it locks nothing itself.
"""

from __future__ import annotations

import heapq
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from service.calls import Entry, fail
from service.errors import DeadlineExceeded, Overloaded, ShuttingDown

# Texts share a batch if the shorter is at least this share of the longer, or nearly as long in tokens.
SHARED_LENGTH = 0.75
NEAR_TOKENS = 4


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """What a batch may hold in which each item has a row of its own; where items share rows, `Packing` says it."""

    size: int
    """Items."""
    tokens: int
    """Padding counted, of texts and of whole rows; a single item may have more."""
    rounded: Callable[[int], int]
    """Rounds a number of items down to one that the engine likes."""
    rows: Callable[[int], int]
    """How many rows the engine makes of a number of items."""


@dataclass
class Queue:
    """Entries, oldest first; beside them those of the background, of which a batch is taken only when nothing else waits."""

    max_waiting: int
    max_background: int
    waiting: deque[Entry] = field(default_factory=deque, init=False)
    background: deque[Entry] = field(default_factory=deque, init=False)
    _full_since: float | None = field(default=None, init=False)

    def __len__(self) -> int:
        return len(self.waiting)

    @property
    def full_s(self) -> float:
        """For how long there has been no room: since an entry was refused, until half of the queue is free again."""
        since = self._full_since
        return 0.0 if since is None else time.monotonic() - since

    def admit(self, entries: Sequence[Entry], seconds_to_clear: Callable[[], int]) -> None:
        """Takes entries of one call all together; Overloaded if there is no room for all."""
        if entries[0].background:
            if len(self.background) + len(entries) > self.max_background:
                raise Overloaded(f"{len(self.background)} items wait in the background already.")
            self.background.extend(entries)
            return
        self.check_room(len(entries), seconds_to_clear)
        self.waiting.extend(entries)

    def check_room(self, count: int, seconds_to_clear: Callable[[], int]) -> None:
        """Overloaded if there is no room for so many entries."""
        if len(self.waiting) + count > self.max_waiting:
            self.drop_the_gone_and_the_late()
        if len(self.waiting) + count > self.max_waiting:
            if self._full_since is None:
                self._full_since = time.monotonic()
            raise Overloaded(
                f"{len(self.waiting)} texts wait and {count} more would pass the limit of {self.max_waiting}; retry later.",
                retry_after_s=seconds_to_clear(),
            )

    def drop_the_gone_and_the_late(self) -> None:
        now = time.monotonic()
        for entries in (self.waiting, self.background):
            kept = []
            for entry in entries:
                if entry.call.gone:
                    continue
                if now > entry.call.deadline:
                    fail(entry.call, DeadlineExceeded("The text waited longer than the request's time limit."))
                    continue
                kept.append(entry)
            if len(kept) < len(entries):
                entries.clear()
                entries.extend(kept)
        self._note_room()

    def drop_the_background(self) -> None:
        for entry in self.background:
            fail(entry.call, ShuttingDown("This replica is draining; nothing is done in the background."))
        self.background.clear()

    def take_all(self) -> list[Entry]:
        """Everything, for whoever gives up on it."""
        found = [*self.waiting, *self.background]
        self.waiting.clear()
        self.background.clear()
        self._note_room()
        return found

    def take(self, limits: BatchLimits) -> list[Entry]:
        """The oldest entry and what goes well with it: nobody starves, and under backlog next to nothing is padding.

        Only entries of one model and one busy-wait share a batch. Where they share rows too, that is whoever fits, in order of arrival;
        else those nearest in length, and only of one length where the model is not padding-safe. Empty if nothing waits.
        """
        entries = self.waiting or self.background
        if not entries:
            return []
        first = entries[0]
        alike = [e for e in entries if e.model is first.model and e.busy_wait == first.busy_wait]
        packing = first.model.packing
        if packing is not None:
            chosen = [alike[place] for place in packing.choose([e.item.tokens for e in alike])]
        else:
            chosen = self._nearest(alike, limits)
        self._remove(entries, chosen)
        self._note_room()
        return chosen

    @staticmethod
    def _nearest(alike: Sequence[Entry], limits: BatchLimits) -> list[Entry]:
        """The first entry and those nearest to it in length, each in a row of its own."""
        first = alike[0]
        mixes = first.model.padding_safe
        chosen = [first]
        shortest = longest = first.length
        for entry in heapq.nsmallest(limits.size - 1, alike[1:], key=lambda e: abs(e.length - first.length)):
            low, high = min(shortest, entry.length), max(longest, entry.length)
            fits = low == high or (mixes and _share_a_batch(low, high))
            if fits and high * limits.rows(len(chosen) + 1) <= limits.tokens:
                chosen.append(entry)
                shortest, longest = low, high
        del chosen[limits.rounded(len(chosen)) :]
        return chosen

    def _note_room(self) -> None:
        if self._full_since is not None and len(self.waiting) <= self.max_waiting // 2:
            self._full_since = None

    @staticmethod
    def _remove(entries: deque[Entry], chosen: list[Entry]) -> None:
        if len(chosen) == len(entries):
            entries.clear()
            return
        taken = set(map(id, chosen))
        kept = [entry for entry in entries if id(entry) not in taken]
        entries.clear()
        entries.extend(kept)


def _share_a_batch(shorter: int, longer: int) -> bool:
    return shorter >= SHARED_LENGTH * longer or longer - shorter <= NEAR_TOKENS
