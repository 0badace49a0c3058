"""
The queue in front of the engine: what waits, and what of it makes the next batch.

It locks nothing: its caller holds the batcher's lock. `service.batching.capacity` relies on this
order when it admits a request:

* Light requests go first, in order of arrival, in batches of their own. They wait for the batch
  that runs and for each other.
* Lists take turns in what remains: deficit round robin over requests (Shreedhar and Varghese,
  "Efficient fair queueing using deficit round robin", SIGCOMM 1995), in engine seconds, so that a
  list for a slow model gets no more of the engine.
* Lists get at least the share that they need, or FLOOR if that is less, and at most CEILING while
  light requests wait. As much of it as they need goes to the list that is due first (EDF), so an
  admitted list is done in time whatever arrives later.
* While there are both, a batch takes no longer than a turn. A light request waits for half a turn
  on average.
"""

from __future__ import annotations

import heapq
import math
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from service.batching.capacity import TEXT_COST, TURN_S, Capacity
from service.batching.requests import Batch, Flow, QueuedItem, fail
from service.errors import DeadlineExceeded, Overloaded, ShuttingDown

# Texts share a batch if the shorter one has at least this share of the longer one's tokens, or
# nearly as many.
MIN_LENGTH_RATIO = 0.75
NEAR_TOKENS = 4

LIGHT_SEEN_S = 1.0
"""For so long after a light request, the batches of lists are short."""
WINDOW_TEXTS = 1024
"""Texts that are considered for a batch.

1,000 texts of 5 to 500 tokens are computed with 4.9 % of padding, and with 5.1 % among 512.
"""
WINDOW_BATCHES = 64
"""The same in tokens, as a multiple of a batch's: with 4 the padding was 9.2 %."""
MAX_DEBT_S = 1.0
"""Engine seconds that a share may be behind, at most."""


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """What a batch may hold if each item has a row of its own, and how many batches may run.

    Packed batches follow the limits of `Packing`.
    """

    size: int = 16
    """Items."""
    tokens: int = 4096
    """Tokens of all rows, padding included; a single item may have more."""
    round_down: Callable[[int], int] = lambda items: items
    """Rounds a number of items down to one that the engine likes."""
    rows: Callable[[int], int] = lambda items: items
    """Returns how many rows the engine makes of a number of items."""
    in_flight: int = 1
    """Batches that may run at once."""


Lane = int
"""What may share a batch: the id of one model object."""


@dataclass
class Queue:
    """Light requests, lists, and background items, which run only when nothing else waits."""

    max_size: int
    max_background: int
    max_queue_s: float = math.inf
    clock: Callable[[], float] = time.monotonic
    capacity: Capacity = field(init=False)
    background: deque[QueuedItem] = field(default_factory=deque, init=False)
    left_behind: bool = field(default=False, init=False)
    """Whether the last batch left texts behind that might have been in it."""
    _lanes: dict[Lane, OrderedDict[Flow, None]] = field(default_factory=dict, init=False)
    """Light requests, oldest first."""
    _ring: OrderedDict[Flow, None] = field(default_factory=OrderedDict, init=False)
    """Lists; it is the first one's turn."""
    _size: int = field(default=0, init=False)
    _arrivals: int = field(default=0, init=False)
    _list_debt_s: float = field(default=0.0, init=False)
    """Engine seconds by which lists are behind their share."""
    _urgent_debt_s: float = field(default=0.0, init=False)
    """The same for the lists that decide what all of them need."""

    def __post_init__(self) -> None:
        self.capacity = Capacity(self.max_size, self.max_queue_s, self.clock)

    def __len__(self) -> int:
        return self._size

    @property
    def full_for_s(self) -> float:
        """Seconds since a request was refused, until half of the queue is free again; else 0."""
        return self.capacity.full_for_s

    def append(self, items: Sequence[QueuedItem]) -> None:
        """Add all items of a request that capacity has admitted."""
        flow = items[0].request.flow
        self._arrivals += 1
        flow.arrival_number = self._arrivals
        flow.waiting.extend(items)
        self._size += len(items)
        if flow.is_light:
            self._lanes.setdefault(_lane(items[0]), OrderedDict())[flow] = None
        else:
            flow.credit_s = TURN_S
            self._ring[flow] = None

    def append_background(self, items: Sequence[QueuedItem]) -> None:
        """Add background items; raises Overloaded if there are too many of them."""
        if len(self.background) + len(items) > self.max_background:
            raise Overloaded(f"{len(self.background)} items wait in the background already.")
        self.background.extend(items)

    def drop(self, flow: Flow) -> None:
        """Remove what waits of a request that nobody waits for any more."""
        if flow.waiting:
            self._forget(flow, flow.waiting[0])
            self._size -= len(flow.waiting)
            flow.waiting.clear()
        if flow.texts:
            self.capacity.remove(flow, flow.texts, flow.tokens)

    def drop_background(self) -> None:
        """Refuse all background items with ShuttingDown."""
        for queued in self.background:
            fail(
                queued.request,
                ShuttingDown("This replica is draining; nothing is done in the background."),
            )
        self.background.clear()

    def take_all(self) -> list[QueuedItem]:
        """Empty the queue and return its items, for a caller that gives up on them."""
        flows = list(self._ring)
        for lane in self._lanes.values():
            flows += lane
        items = [queued for flow in flows for queued in flow.waiting]
        items += self.background
        for flow in flows:
            self.drop(flow)
        self.background.clear()
        return items

    def take(self, limits: BatchLimits) -> Batch | None:
        """Return the next batch, of one model; None if nothing waits.

        Its first item belongs to the request whose turn it is, so no request starves. The others
        are of the requests after it: those that fit, if texts are packed, else those nearest in
        length, and only of equal length if padding would change the model's answers.
        """
        now = self.clock()
        light, listed = self._first_light(now), self._first_list(now)
        need, decides = self.capacity.need() if listed else (0.0, 0.0)
        candidates, limits = self._candidates(light, listed, limits, now)
        if not candidates:
            return None
        batch = self._choose(candidates, limits)
        self.left_behind = len(batch.items) < len(candidates)
        if batch.first.is_background:
            taken = set(map(id, batch.items))
            self.background = deque(each for each in self.background if id(each) not in taken)
        else:
            if self.capacity.lists:
                self._charge(batch.items, need, decides)
            self._remove(batch.items)
        return batch

    # Whose turn it is.

    def _candidates(
        self, light: Flow | None, listed: Flow | None, limits: BatchLimits, now: float
    ) -> tuple[list[QueuedItem], BatchLimits]:
        """Return the items that may be in the next batch, and its limits."""
        urgent = listed is not None and self._urgent_debt_s > 0
        if urgent:
            listed = self._most_urgent_list(now) or listed
        if light and (not listed or self._list_debt_s <= 0):
            limits = self._short(light, limits) if listed else limits
            return self._oldest_light(light, limits, now), limits
        if listed:
            if light or now - self.capacity.light_seen < LIGHT_SEEN_S:
                limits = self._short(listed, limits)
            return self._by_turns(listed, urgent, limits, now), limits
        return self._oldest_background(now), limits

    def _is_awaited(self, flow: Flow, now: float) -> bool:
        """Return whether a caller still waits for it. If not, drop it; a late one is failed."""
        request = flow.waiting[0].request
        if not request.is_done and now <= request.deadline:
            return True
        fail(request, DeadlineExceeded("The text waited longer than the request's time limit."))
        self.drop(flow)
        return False

    def _first_light(self, now: float) -> Flow | None:
        """Return the light request that arrived first."""
        first: Flow | None = None
        for lane in list(self._lanes.values()):
            flow = self._first_awaited(lane, now)
            if flow and (first is None or flow.arrival_number < first.arrival_number):
                first = flow
        return first

    def _first_awaited(self, lane: OrderedDict[Flow, None], now: float) -> Flow | None:
        while lane:
            flow = next(iter(lane))
            if self._is_awaited(flow, now):
                return flow
        return None

    def _first_list(self, now: float) -> Flow | None:
        """Return the list whose turn it is."""
        while self._ring:
            flow = next(iter(self._ring))
            if self._is_awaited(flow, now):
                if flow.credit_s > 0:
                    return flow
                flow.credit_s += TURN_S
                self._ring.move_to_end(flow)
        return None

    def _most_urgent_list(self, now: float) -> Flow | None:
        """Return the list that is due first."""
        for flow in list(self.capacity.lists):
            if flow.waiting and self._is_awaited(flow, now):
                return flow
        return None

    def _charge(self, items: Sequence[QueuedItem], need: float, decides: float) -> None:
        """Note who had how much of the engine by a batch."""
        total_s = lists_s = urgent_s = 0.0
        for queued in items:
            flow = queued.request.flow
            item_s = self.capacity.turn_seconds(queued.model_key, queued.length + TEXT_COST)
            total_s += item_s
            flow.credit_s -= item_s
            if not flow.is_light:
                lists_s += item_s
                urgent_s += item_s if flow.due <= decides else 0.0
        list_share = self.capacity.share_of_lists(need)
        self._list_debt_s = _debt(self._list_debt_s, total_s, list_share, lists_s)
        self._urgent_debt_s = _debt(self._urgent_debt_s, total_s, min(1.0, need), urgent_s)

    # What may be in the batch.

    def _oldest_light(self, first: Flow, limits: BatchLimits, now: float) -> list[QueuedItem]:
        """Return a window of the light requests that go with the first, in order of arrival."""
        window: list[QueuedItem] = []
        room = WINDOW_BATCHES * limits.tokens
        for flow in self._lanes[_lane(first.waiting[0])]:
            request = flow.waiting[0].request
            if request.is_done or now > request.deadline:
                continue  # Dropped when its turn comes.
            window += flow.waiting
            room -= flow.tokens
            if room <= 0 or len(window) >= WINDOW_TEXTS:
                break
        return window

    def _short(self, flow: Flow, limits: BatchLimits) -> BatchLimits:
        """Return limits for a batch no longer than a turn, because others wait for its end."""
        return replace(limits, tokens=min(limits.tokens, self.capacity.turn_tokens(flow.model)))

    def _by_turns(
        self, first: Flow, urgent: bool, limits: BatchLimits, now: float
    ) -> list[QueuedItem]:
        """Return a window of `first` and the lists after it, a turn of each and round by round.

        An urgent list takes all turns that it can use.
        """
        lane = _lane(first.waiting[0])
        turn = limits.tokens * WINDOW_BATCHES if urgent else self.capacity.turn_tokens(first.model)
        others = (
            flow
            for flow in list(self._ring)
            if flow is not first and _lane(flow.waiting[0]) == lane and self._is_awaited(flow, now)
        )
        later: deque[Iterator[QueuedItem]] = deque()
        window: list[QueuedItem] = []
        room = WINDOW_BATCHES * limits.tokens
        flow: Flow | None = first
        while room > 0 and len(window) < WINDOW_TEXTS:
            if flow:
                items = iter(flow.waiting)
            elif later:
                items = later.popleft()
            else:
                break
            tokens, before = 0, len(window)
            for queued in items:
                window.append(queued)
                tokens += queued.length
                if tokens >= min(turn, room):
                    break
            room -= tokens
            if len(window) > before:
                later.append(items)
            flow = next(others, None) if flow else None
        return window

    def _oldest_background(self, now: float) -> list[QueuedItem]:
        """Return the background items that go with the oldest one."""
        awaited: deque[QueuedItem] = deque()
        for queued in self.background:
            if now > queued.request.deadline:
                fail(
                    queued.request,
                    DeadlineExceeded("The text waited longer than the request's time limit."),
                )
            elif not queued.request.is_done:
                awaited.append(queued)
        self.background = awaited
        if not awaited:
            return []
        lane = _lane(awaited[0])
        return [queued for queued in awaited if _lane(queued) == lane]

    # What is in it.

    def _choose(self, candidates: Sequence[QueuedItem], limits: BatchLimits) -> Batch:
        packing = candidates[0].model.packing
        if packing is None:
            return Batch(self._nearest(candidates, limits))
        tokens = [queued.item.tokens for queued in candidates]
        if len(candidates) == 1:
            return Batch([candidates[0]], packing.lay_out(tokens))
        chosen, layout = packing.choose(tokens, limits.tokens)
        return Batch([candidates[index] for index in chosen], layout)

    @staticmethod
    def _nearest(candidates: Sequence[QueuedItem], limits: BatchLimits) -> list[QueuedItem]:
        """Return the first item and those nearest to it in length, each with a row of its own."""
        first = candidates[0]
        if len(candidates) == 1:
            return [first]
        mixes_lengths = first.model.padding_invariant
        chosen = [first]
        shortest = longest = first.length
        for queued in heapq.nsmallest(
            limits.size - 1, candidates[1:], key=lambda each: abs(each.length - first.length)
        ):
            low, high = min(shortest, queued.length), max(longest, queued.length)
            fits = low == high or (mixes_lengths and _are_near(low, high))
            if fits and high * limits.rows(len(chosen) + 1) <= limits.tokens:
                chosen.append(queued)
                shortest, longest = low, high
        del chosen[limits.round_down(len(chosen)) :]
        return chosen

    def _remove(self, items: Sequence[QueuedItem]) -> None:
        """Take a batch out of what waits."""
        self._size -= len(items)
        by_flow: dict[Flow, list[QueuedItem]] = {}
        for queued in items:
            flow = queued.request.flow
            if len(flow.waiting) == 1:
                flow.waiting.clear()
                self._forget(flow, queued)
                self.capacity.remove(flow, 1, queued.length + TEXT_COST)
            else:
                by_flow.setdefault(flow, []).append(queued)
        for flow, taken in by_flow.items():
            _take_out(flow.waiting, taken)
            if not flow.waiting:
                self._forget(flow, taken[0])
            self.capacity.remove(flow, len(taken), _cost(taken))

    def _forget(self, flow: Flow, queued: QueuedItem) -> None:
        """Take a request out of those that wait; `queued` is or was one of its items."""
        if not flow.is_light:
            del self._ring[flow]
            return
        lane = self._lanes[_lane(queued)]
        del lane[flow]
        if not lane:
            del self._lanes[_lane(queued)]


def _lane(queued: QueuedItem) -> Lane:
    return id(queued.model)


def _take_out(waiting: list[QueuedItem], taken: Sequence[QueuedItem]) -> None:
    """Remove items from those that wait; the others keep their order."""
    missing, passed, end = set(map(id, taken)), [], 0
    while missing:
        queued = waiting[end]
        end += 1
        if id(queued) in missing:
            missing.remove(id(queued))
        else:
            passed.append(queued)
    waiting[:end] = passed


def _cost(items: Sequence[QueuedItem]) -> int:
    return sum([queued.length for queued in items]) + TEXT_COST * len(items)


def _debt(before_s: float, total_s: float, share: float, had_s: float) -> float:
    """Return what is owed after a batch to those with a share of the engine, who had `had_s`.

    Nobody saves up more than a batch.
    """
    return max(-total_s, min(MAX_DEBT_S, before_s + share * total_s - had_s))


def _are_near(shorter: int, longer: int) -> bool:
    return shorter >= MIN_LENGTH_RATIO * longer or longer - shorter <= NEAR_TOKENS
