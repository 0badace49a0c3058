"""
What waits for the engine, and which of it makes the next batch. Whoever holds the batcher's lock
uses it; it locks nothing itself.

The order, which `service.batching.capacity` relies on when it admits a call:

* Light calls go first, in order of arrival, in batches of their own: they wait for the batch that
  runs and for each other.
* Lists take turns in what is left: deficit round robin over calls (Shreedhar and Varghese,
  "Efficient fair queueing using deficit round robin", SIGCOMM 1995), in seconds of the engine, so
  that a list for a slow model gets no more of it.
* Lists get at least the share that they need, or FLOOR if that is less; never more than CEILING
  while light calls wait. As much of it as they need goes to the one that is due first (EDF), so
  what is admitted is done in time whatever comes later.
* While there are both, a batch takes no longer than a turn: half of one is what a light call waits
  for beside lists.
"""

from __future__ import annotations

import heapq
import math
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from service.batching.capacity import TEXT_COST, TURN_S, Capacity
from service.batching.requests import Entry, Flow, fail
from service.errors import DeadlineExceeded, Overloaded, ShuttingDown

# Texts share a batch if the shorter is at least this share of the longer, or nearly as long in
# tokens.
SHARED_LENGTH = 0.75
NEAR_TOKENS = 4

LIGHT_SEEN_S = 1.0
"""For how long after a light call lists' batches are short."""
WINDOW_TEXTS = 1024
"""Texts that are looked at for a batch: 1,000 texts of 5 to 500 tokens are computed with 4.9 % of
padding, and with 5.1 % among 512.
"""
WINDOW_BATCHES = 64
"""The same in tokens, as a multiple of those that a batch may have: with 4 the padding was 9.2 %.
"""
MOST_OWED_S = 1.0


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """What a batch may hold in which each item has a row of its own; where items share rows,
    `Packing` says it.
    """

    size: int
    """Items."""
    tokens: int
    """Padding counted, of texts and of whole rows; a single item may have more."""
    rounded: Callable[[int], int]
    """Rounds a number of items down to one that the engine likes."""
    rows: Callable[[int], int]
    """How many rows the engine makes of a number of items."""


Lane = tuple[int, float]
"""What may share a batch: one model object and one busy-wait."""


@dataclass
class Queue:
    """Light calls and lists, and beside them what is done in the background: a batch of that begins
    only when nothing else waits.
    """

    max_waiting: int
    max_background: int
    max_queue_s: float = math.inf
    clock: Callable[[], float] = time.monotonic
    capacity: Capacity = field(init=False)
    background: deque[Entry] = field(default_factory=deque, init=False)
    left_behind: bool = field(default=False, init=False)
    """Whether the batch taken last left texts behind that might have been in it."""
    _lanes: dict[Lane, OrderedDict[Flow, None]] = field(default_factory=dict, init=False)
    """Light calls, oldest first."""
    _ring: OrderedDict[Flow, None] = field(default_factory=OrderedDict, init=False)
    """Lists; the first one's turn it is."""
    _waiting: int = field(default=0, init=False)
    _arrivals: int = field(default=0, init=False)
    _owed_to_lists_s: float = field(default=0.0, init=False)
    """Seconds of the engine that lists are behind the share that is theirs."""
    _owed_to_due_s: float = field(default=0.0, init=False)
    """The same, of the lists that decide what all of them need."""

    def __post_init__(self) -> None:
        self.capacity = Capacity(self.max_waiting, self.max_queue_s, self.clock)

    def __len__(self) -> int:
        return self._waiting

    @property
    def full_s(self) -> float:
        """For how long there has been no room: since a call was refused, until half of the queue is
        free again.
        """
        return self.capacity.full_s

    def append(self, entries: Sequence[Entry]) -> None:
        """Lets all entries of a call wait that capacity has admitted."""
        flow = entries[0].call.flow
        self._arrivals += 1
        flow.arrival = self._arrivals
        flow.waiting.extend(entries)
        self._waiting += len(entries)
        if flow.light:
            lane = self._lanes.get(key := _lane(entries[0]))
            if lane is None:
                lane = self._lanes[key] = OrderedDict()
            lane[flow] = None
        else:
            flow.credit_s = TURN_S
            self._ring[flow] = None

    def append_background(self, entries: Sequence[Entry]) -> None:
        """The same for the background, which has a limit of its own."""
        if len(self.background) + len(entries) > self.max_background:
            raise Overloaded(f"{len(self.background)} items wait in the background already.")
        self.background.extend(entries)

    def drop(self, flow: Flow) -> None:
        """Drops what waits of a call: nobody waits for it any more."""
        if flow.waiting:
            self._forget(flow, flow.waiting[0])
            self._waiting -= len(flow.waiting)
            flow.waiting.clear()
        if flow.texts:
            self.capacity.remove(flow, flow.texts, flow.tokens)

    def drop_the_background(self) -> None:
        for entry in self.background:
            fail(
                entry.call,
                ShuttingDown("This replica is draining; nothing is done in the background."),
            )
        self.background.clear()

    def take_all(self) -> list[Entry]:
        """Everything, for whoever gives up on it."""
        flows = [*self._ring, *(flow for lane in self._lanes.values() for flow in lane)]
        found = [*(entry for flow in flows for entry in flow.waiting), *self.background]
        for flow in flows:
            self.drop(flow)
        self.background.clear()
        return found

    def take(self, limits: BatchLimits) -> list[Entry]:
        """The next batch, of entries of one model and one busy-wait; empty if nothing waits.

        Its first entry is that of the call whose turn it is, so nobody starves; others are those
        that go well with it, of the calls that follow: whoever fits, where texts share rows; else
        those nearest in length, and only of one length where the model is not padding-safe.
        """
        now = self.clock()
        light, listed = self._first_light(now), self._first_list(now)
        need, decides = self.capacity.need() if listed else (0.0, 0.0)
        urgent = listed is not None and self._owed_to_due_s > 0
        if urgent:
            listed = next(
                (
                    flow
                    for flow in list(self.capacity.lists)
                    if flow.waiting and self._awaited(flow, now)
                ),
                listed,
            )
        if light and (not listed or self._owed_to_lists_s <= 0):
            limits = self._short(light, limits) if listed else limits
            candidates = self._oldest_light(light, limits, now)
        elif listed:
            limits = (
                self._short(listed, limits)
                if light or now - self.capacity.light_seen < LIGHT_SEEN_S
                else limits
            )
            candidates = self._by_turns(listed, urgent, limits, now)
        else:
            candidates = self._oldest_background(now)
        if not candidates:
            return []
        chosen = candidates if len(candidates) == 1 else self._choose(candidates, limits)
        self.left_behind = len(chosen) < len(candidates)
        if chosen[0].background:
            taken = set(map(id, chosen))
            self.background = deque(entry for entry in self.background if id(entry) not in taken)
            return chosen
        if self.capacity.lists:
            self._charge(chosen, need, decides)
        self._remove(chosen)
        return chosen

    # Whose turn it is.

    def _awaited(self, flow: Flow, now: float) -> bool:
        """Whether somebody waits for it still; if not it is dropped, and who comes too late is
        told.
        """
        call = flow.waiting[0].call
        if not call.gone and now <= call.deadline:
            return True
        fail(call, DeadlineExceeded("The text waited longer than the request's time limit."))
        self.drop(flow)
        return False

    def _first_light(self, now: float) -> Flow | None:
        """The light call that came first."""
        firsts = [
            flow for lane in list(self._lanes.values()) if (flow := self._first_awaited(lane, now))
        ]
        if len(firsts) < 2:
            return firsts[0] if firsts else None
        return min(firsts, key=lambda flow: flow.arrival)

    def _first_awaited(self, lane: OrderedDict[Flow, None], now: float) -> Flow | None:
        while lane:
            flow = next(iter(lane))
            if self._awaited(flow, now):
                return flow
        return None

    def _first_list(self, now: float) -> Flow | None:
        """The list whose turn it is."""
        while self._ring:
            flow = next(iter(self._ring))
            if self._awaited(flow, now):
                if flow.credit_s > 0:
                    return flow
                flow.credit_s += TURN_S
                self._ring.move_to_end(flow)
        return None

    def _charge(self, chosen: Sequence[Entry], need: float, decides: float) -> None:
        """Notes who had what of the engine by a batch."""
        took_s = to_lists_s = to_due_s = 0.0
        for entry in chosen:
            flow = entry.call.flow
            entry_s = self.capacity.turn_seconds(entry.name, entry.length + TEXT_COST)
            took_s += entry_s
            flow.credit_s -= entry_s
            if not flow.light:
                to_lists_s += entry_s
                to_due_s += entry_s if flow.due <= decides else 0.0
        self._owed_to_lists_s = _owed(
            self._owed_to_lists_s, took_s, self.capacity.share_of_lists(need), to_lists_s
        )
        self._owed_to_due_s = _owed(self._owed_to_due_s, took_s, min(1.0, need), to_due_s)

    # What may be in the batch.

    def _oldest_light(self, first: Flow, limits: BatchLimits, now: float) -> list[Entry]:
        """Entries of light calls that go with the first, in order of arrival: a window of them."""
        found: list[Entry] = []
        room = WINDOW_BATCHES * limits.tokens
        for flow in self._lanes[_lane(first.waiting[0])]:
            call = flow.waiting[0].call
            if call.gone or now > call.deadline:
                continue  # Dropped when its turn comes.
            found += flow.waiting
            room -= flow.tokens
            if room <= 0 or len(found) >= WINDOW_TEXTS:
                break
        return found

    def _short(self, flow: Flow, limits: BatchLimits) -> BatchLimits:
        """Limits of a batch that takes no longer than a turn, because others wait for its end."""
        return replace(limits, tokens=min(limits.tokens, self.capacity.turn_tokens(flow.model)))

    def _by_turns(self, first: Flow, urgent: bool, limits: BatchLimits, now: float) -> list[Entry]:
        """Entries of `first` and of the lists after it that go with it, a turn each and round by
        round: a window of them.

        What is urgent takes all turns that it can use.
        """
        lane = _lane(first.waiting[0])
        turn = limits.tokens * WINDOW_BATCHES if urgent else self.capacity.turn_tokens(first.model)
        others = (
            flow
            for flow in list(self._ring)
            if flow is not first and _lane(flow.waiting[0]) == lane and self._awaited(flow, now)
        )
        later: deque[Iterator[Entry]] = deque()
        found: list[Entry] = []
        room = WINDOW_BATCHES * limits.tokens
        flow: Flow | None = first
        while room > 0 and len(found) < WINDOW_TEXTS:
            entries = iter(flow.waiting) if flow else later.popleft() if later else None
            if entries is None:
                break
            had, before = 0, len(found)
            for entry in entries:
                found.append(entry)
                had += entry.length
                if had >= min(turn, room):
                    break
            room -= had
            if len(found) > before:
                later.append(entries)
            flow = next(others, None) if flow else None
        return found

    def _oldest_background(self, now: float) -> list[Entry]:
        """Entries of the background that go with the oldest."""
        for entry in self.background:
            if now > entry.call.deadline:
                fail(
                    entry.call,
                    DeadlineExceeded("The text waited longer than the request's time limit."),
                )
        self.background = deque(
            entry for entry in self.background if not entry.call.gone and now <= entry.call.deadline
        )
        if not self.background:
            return []
        lane = _lane(self.background[0])
        return [entry for entry in self.background if _lane(entry) == lane]

    # What is in it.

    def _choose(self, candidates: Sequence[Entry], limits: BatchLimits) -> list[Entry]:
        packing = candidates[0].model.packing
        if packing is None:
            return self._nearest(candidates, limits)
        lengths = [entry.item.tokens for entry in candidates]
        return [candidates[place] for place in packing.choose(lengths, limits.tokens)]

    @staticmethod
    def _nearest(alike: Sequence[Entry], limits: BatchLimits) -> list[Entry]:
        """The first entry and those nearest to it in length, each in a row of its own."""
        first = alike[0]
        mixes = first.model.padding_safe
        chosen = [first]
        shortest = longest = first.length
        for entry in heapq.nsmallest(
            limits.size - 1, alike[1:], key=lambda e: abs(e.length - first.length)
        ):
            low, high = min(shortest, entry.length), max(longest, entry.length)
            fits = low == high or (mixes and _share_a_batch(low, high))
            if fits and high * limits.rows(len(chosen) + 1) <= limits.tokens:
                chosen.append(entry)
                shortest, longest = low, high
        del chosen[limits.rounded(len(chosen)) :]
        return chosen

    def _remove(self, chosen: Sequence[Entry]) -> None:
        """Takes a batch out of what waits."""
        self._waiting -= len(chosen)
        by_flow: dict[Flow, list[Entry]] = {}
        for entry in chosen:
            flow = entry.call.flow
            if len(flow.waiting) == 1:
                flow.waiting.clear()
                self._forget(flow, entry)
                self.capacity.remove(flow, 1, entry.length + TEXT_COST)
            else:
                by_flow.setdefault(flow, []).append(entry)
        for flow, entries in by_flow.items():
            _take_out(flow.waiting, entries)
            if not flow.waiting:
                self._forget(flow, entries[0])
            self.capacity.remove(flow, len(entries), _cost(entries))

    def _forget(self, flow: Flow, entry: Entry) -> None:
        """Takes a call of which `entry` is or was one from those that wait."""
        if not flow.light:
            del self._ring[flow]
            return
        lane = self._lanes[_lane(entry)]
        del lane[flow]
        if not lane:
            del self._lanes[_lane(entry)]


def _lane(entry: Entry) -> Lane:
    return id(entry.model), entry.busy_wait


def _take_out(waiting: list[Entry], chosen: Sequence[Entry]) -> None:
    """Takes entries out of those that wait; the others keep their order."""
    taken, passed, end = set(map(id, chosen)), [], 0
    while taken:
        entry = waiting[end]
        end += 1
        if id(entry) in taken:
            taken.remove(id(entry))
        else:
            passed.append(entry)
    waiting[:end] = passed


def _cost(entries: Sequence[Entry]) -> int:
    return sum([entry.length for entry in entries]) + TEXT_COST * len(entries)


def _owed(before_s: float, took_s: float, share: float, had_s: float) -> float:
    """What is owed after a batch to who has a share of the engine and had so much of it. Nobody
    saves up more than a batch.
    """
    return max(-took_s, min(MOST_OWED_S, before_s + share * took_s - had_s))


def _share_a_batch(shorter: int, longer: int) -> bool:
    return shorter >= SHARED_LENGTH * longer or longer - shorter <= NEAR_TOKENS
