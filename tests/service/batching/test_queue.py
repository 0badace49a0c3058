"""The queue and what it admits, with a clock and an engine that are counted instead of
waited for.
"""

from __future__ import annotations

import asyncio
import heapq
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.batching.capacity import TEXT_COST
from service.batching.queue import BatchLimits, Queue
from service.batching.requests import PendingRequest, QueuedItem
from service.batching.shapes import PACKED, Shapes
from service.errors import DeadlineExceeded, Overloaded, ServiceError, TooLarge
from tests.service.batching.test_batching_properties import Noting, Text

TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Arrival:
    """A request that comes at `at`: `texts` of `tokens` each."""

    at: float
    texts: int
    tokens: int
    timeout_s: float = TIMEOUT_S
    model: str = "m"


@dataclass
class Outcome:
    arrival: Arrival
    took_s: float | None = None
    """None: refused."""
    error: ServiceError | None = None

    @property
    def is_light(self) -> bool:
        return self.arrival.texts == 1


@dataclass
class Engine:
    """A queue in front of an engine that takes `token_s` for a token, and as much more or less as
    `draw` says.
    """

    token_s: dict[str, float] = field(default_factory=lambda: {"m": 26e-6})
    off_by: float = 0.0
    max_size: int = 2048
    packed: bool = True
    now: float = 0.0
    batches: list[list[QueuedItem]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.shapes = Shapes(512, grid=PACKED) if self.packed else Shapes(512)
        self.models = {name: Noting(shapes=self.shapes) for name in self.token_s}
        self.queue = Queue(self.max_size, 256, clock=lambda: self.now)
        self.limits = BatchLimits(
            self.shapes.max_batch_size,
            self.shapes.max_batch_tokens,
            self.shapes.batch_size,
            self.shapes.rows,
        )
        self.draw = random.Random(0)
        for name, token_s in self.token_s.items():
            self.queue.capacity.note(name, 1000, 1000 * token_s, full=True)

    def ask(self, arrival: Arrival) -> PendingRequest:
        """Admits a request; what the queue raises if it does not."""
        deadline = self.now + arrival.timeout_s
        flow = self.queue.capacity.flow(
            arrival.model, arrival.texts, arrival.texts * arrival.tokens, deadline
        )
        request = PendingRequest(
            self.loop,
            self.loop.create_future(),
            deadline,
            [None] * arrival.texts,
            arrival.texts,
            flow,
        )
        self.queue.capacity.admit(flow)
        model = self.models[arrival.model]
        self.queue.append(
            [
                QueuedItem(
                    request,
                    i,
                    Text(i, arrival.tokens),
                    arrival.model,
                    model,
                    arrival.tokens,
                    0,
                    0.0,
                )
                for i in range(arrival.texts)
            ]
        )
        return request

    def run_batch(self) -> list[QueuedItem]:
        batch = self.queue.take(self.limits)
        if batch is None:
            return []
        [model] = {queued.model_key for queued in batch.items}
        self.batches.append(batch.items)
        tokens = sum(queued.length + TEXT_COST for queued in batch.items)
        error = self.draw.uniform(1 - self.off_by, 1 + self.off_by)
        seconds = tokens * self.token_s[model] * error
        self.now += seconds
        self.queue.capacity.note(model, tokens, seconds, self.queue.left_behind)
        return batch.items

    def serve(self, arrivals: Sequence[Arrival]) -> list[Outcome]:
        """What becomes of calls that come when they come; the engine never idles while something
        waits.
        """
        outcomes: list[Outcome] = []
        by_call: dict[int, Outcome] = {}
        coming = [(arrival.at, number, arrival) for number, arrival in enumerate(arrivals)]
        heapq.heapify(coming)
        while coming or len(self.queue):
            if not len(self.queue) and coming[0][0] > self.now:
                self.now = coming[0][0]
            while coming and coming[0][0] <= self.now:
                arrival = heapq.heappop(coming)[2]
                outcomes.append(outcome := Outcome(arrival))
                try:
                    by_call[id(self.ask(arrival).flow)] = outcome
                except ServiceError as error:
                    outcome.error = error
            waited = len(self.queue)
            batch = self.run_batch()
            assert batch or not waited or not len(self.queue)
            for entry in batch:
                entry.request.missing -= 1
                if not entry.request.missing:
                    outcome = by_call[id(entry.request.flow)]
                    outcome.took_s = self.now - outcome.arrival.at
        assert self.queue.capacity.queue_s == 0
        assert not self.queue.capacity.lists
        return outcomes


@pytest.fixture
def engine() -> Iterator[Callable[..., Engine]]:
    made: list[Engine] = []

    def make(**given: object) -> Engine:
        made.append(Engine(**given))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for one in made:
        one.loop.close()


def every(seconds: float, arrival: Arrival, until: float, begin: float = 0.0) -> list[Arrival]:
    count = int((until - begin) / seconds)
    return [
        Arrival(
            begin + i * seconds, arrival.texts, arrival.tokens, arrival.timeout_s, arrival.model
        )
        for i in range(count)
    ]


def refused_at_last(ask: Callable[[], object]) -> Overloaded:
    """What the queue says when it has become too full."""
    while True:
        try:
            ask()
        except Overloaded as refused:
            return refused


def late(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Admitted, and not answered in time."""
    return [
        one
        for one in outcomes
        if one.error is None and (one.took_s is None or one.took_s > one.arrival.timeout_s)
    ]


LIGHT = Arrival(0, 1, 8)
LIST = Arrival(0, 1000, 128)
SLOW = {"m": 1e-3}
"""A base model on one core of a small machine."""

calls = st.builds(
    Arrival,
    st.floats(0, 60),
    st.integers(1, 150) | st.just(1),
    st.integers(2, 300),
    st.just(TIMEOUT_S),
    st.sampled_from(("m", "quick")),
)


@given(st.lists(calls, max_size=150), st.floats(0, 50), st.floats(0.003, 0.2), st.integers(2, 128))
@settings(max_examples=40, deadline=None)
def test_whatever_comes_the_admitted_are_done_in_time(
    some: list[Arrival], crowd_at: float, crowd_every: float, crowd_tokens: int
) -> None:
    engine = Engine(token_s={"m": 1e-3, "quick": 2e-5}, off_by=0.1)
    crowd = every(crowd_every, Arrival(0, 1, crowd_tokens), crowd_at + 20, crowd_at)
    outcomes = engine.serve([*some, *crowd])
    engine.loop.close()
    assert len(outcomes) == len(some) + len(crowd)
    assert not late(outcomes)
    assert {type(one.error) for one in outcomes if one.error} <= {Overloaded, TooLarge}
    served = [id(entry) for batch in engine.batches for entry in batch]
    assert (
        len(served)
        == len(set(served))
        == sum(one.arrival.texts for one in outcomes if not one.error)
    )


def test_light_callers_beside_a_list_wait_for_a_turn_of_it_at_most(
    engine: Callable[..., Engine],
) -> None:
    for heavy in (LIST, Arrival(0, 1000, 4), *(Arrival(0, 64, 128) for _ in range(8))):
        outcomes = engine().serve([heavy, *every(0.05, LIGHT, until=10)])
        assert max(one.took_s or 0 for one in outcomes if one.is_light) < 0.02
        assert not late(outcomes)
        assert all(one.error is None for one in outcomes)


def test_a_list_beside_light_callers_is_as_fast_as_what_they_leave(
    engine: Callable[..., Engine],
) -> None:
    [alone] = engine().serve([LIST])
    beside, *is_light = engine().serve([LIST, *every(0.05, LIGHT, until=3)])
    asked = len(is_light) * (LIGHT.tokens + TEXT_COST) * 26e-6
    assert alone.took_s is not None
    assert beside.took_s is not None
    assert beside.took_s <= alone.took_s + asked + 0.01


def test_lists_are_done_in_time_though_light_calls_ask_for_twice_what_there_is(
    engine: Callable[..., Engine],
) -> None:
    outcomes = engine(token_s=SLOW, off_by=0.3).serve(
        [*every(1, Arrival(0, 60, 128), 60), *every(0.0045, LIGHT, 60)]
    )
    assert not late(outcomes)
    assert sum(one.error is None for one in outcomes if not one.is_light) >= 2
    assert (
        sum(one.error is None for one in outcomes if one.is_light)
        * (LIGHT.tokens + TEXT_COST)
        * 1e-3
        >= 0.5 * 60
    )


def test_light_calls_keep_a_fifth_of_the_engine_whatever_lists_come(
    engine: Callable[..., Engine],
) -> None:
    outcomes = engine(token_s=SLOW).serve(
        [*every(0.5, Arrival(0, 60, 128), 60), *every(0.06, LIGHT, 60)]
    )
    assert not late(outcomes)
    is_light = sorted(one.took_s or 0 for one in outcomes if one.is_light)
    assert is_light[len(is_light) // 2] < 0.5  # two batches of a list, 256 tokens each


def test_ten_times_too_much_is_refused_and_the_rest_answered_in_time(
    engine: Callable[..., Engine],
) -> None:
    outcomes = engine(token_s=SLOW).serve(every(0.0129, Arrival(0, 1, 128), 60))
    assert not late(outcomes)
    took = [one.took_s for one in outcomes if one.took_s is not None]
    assert 12 < max(took) < TIMEOUT_S
    assert len(took) * 0.129 >= 60  # the engine never waited


def test_who_has_little_time_is_refused_where_the_queue_is_longer_than_that(
    engine: Callable[..., Engine],
) -> None:
    busy = engine(token_s=SLOW)
    for _ in range(100):
        busy.ask(Arrival(0, 1, 128))
    with pytest.raises(Overloaded, match=r"would wait 13 s and may wait 0\.5 s") as refused:
        busy.ask(Arrival(0, 1, 8, timeout_s=1.0))
    assert refused.value.retry_after_s == 13
    busy.ask(Arrival(0, 1, 8))


def test_retry_after_says_when_there_is_room(engine: Callable[..., Engine]) -> None:
    busy = engine(token_s=SLOW)
    refused = refused_at_last(lambda: busy.ask(Arrival(0, 1, 64, timeout_s=20.0)))
    assert refused.retry_after_s == 1  # for a text as long; for a hasty one it is the queue:
    with pytest.raises(Overloaded) as hasty:
        busy.ask(Arrival(0, 1, 64, timeout_s=2.0))
    wait_s = hasty.value.retry_after_s
    assert wait_s is not None
    assert wait_s == pytest.approx(9, abs=1)
    while busy.now < wait_s and busy.run_batch():
        pass
    busy.ask(Arrival(0, 1, 64, timeout_s=2.0))


def test_retry_after_follows_tokens_after_short_texts_too(engine: Callable[..., Engine]) -> None:
    busy = engine(token_s=SLOW, max_size=100)
    busy.serve(every(0.01, Arrival(0, 1, 4), 2))
    for _ in range(100):
        busy.ask(Arrival(0, 1, 128))
    with pytest.raises(Overloaded, match="limit of 100") as refused:
        busy.ask(Arrival(0, 50, 128))
    assert refused.value.retry_after_s == 7  # of 12.9 s half


def test_a_list_that_is_never_done_in_time_is_told_so_and_how_many_are(
    engine: Callable[..., Engine],
) -> None:
    slow = engine(token_s=SLOW)
    with pytest.raises(
        TooLarge,
        match=(
            r"200 texts have about 25800 tokens, which take 26 s; a list may take 18 s, 60% of the"
            r" time that it has left\. Send at most 139 "
        ),
    ):
        slow.ask(Arrival(0, 200, 128))
    slow.ask(Arrival(0, 139, 128))
    with pytest.raises(
        Overloaded,
        match=(
            r"17 texts have about 2193 tokens, which take 2\.2 s, and with the lists before them 20"
            r" s; lists may take 18 s"
        ),
    ) as refused:
        slow.ask(Arrival(0, 17, 128))
    assert refused.value.retry_after_s == 3


def test_while_nothing_is_measured_nothing_is_refused_by_seconds(
    engine: Callable[..., Engine],
) -> None:
    cold = engine()
    cold.queue.capacity.forget("m")
    for _ in range(200):
        cold.ask(Arrival(0, 8, 128, timeout_s=0.1))
    assert cold.queue.capacity.queue_s == 0
    cold.run_batch()
    assert cold.queue.capacity.queue_s > 1
    with pytest.raises(Overloaded):
        cold.ask(Arrival(0, 8, 128, timeout_s=0.1))


def test_a_pace_measured_on_a_busy_machine_refuses_no_list_for_good(
    engine: Callable[..., Engine],
) -> None:
    one = engine()
    one.queue.capacity.expect("m", 500, 500 * 200e-6)  # at start; nothing has run since
    asked = Arrival(0, 1000, 128, timeout_s=30)
    [outcome] = one.serve([asked])
    assert outcome.took_s == pytest.approx(1000 * 129 * 26e-6)
    for _ in range(400):
        one.queue.capacity.note("m", 500, 500 * 200e-6, full=True)
    with pytest.raises(TooLarge):
        one.ask(asked)
    one.now += 600
    [outcome] = one.serve([Arrival(one.now, 1000, 128, timeout_s=30)])
    assert not outcome.error


def test_a_stall_does_not_make_the_queue_refuse_for_long(engine: Callable[..., Engine]) -> None:
    stalled = engine()
    capacity = stalled.queue.capacity
    for _ in range(20):
        capacity.note("m", 500, 0.013, full=True)
    capacity.note("m", 500, 5.0, full=True)  # the processor was taken away
    assert capacity.seconds("m", 500) < 0.02
    for _ in range(60):
        capacity.note("m", 500, 0.13, full=True)  # it has become slower
    assert capacity.seconds("m", 500) > 0.1


def test_lists_of_models_that_differ_a_hundredfold_share_the_engine_by_time(
    engine: Callable[..., Engine],
) -> None:
    both = engine(token_s={"m": 26e-6, "slow": 2.6e-3})
    quick, slow = both.serve([Arrival(0, 1000, 128), Arrival(0, 40, 128, model="slow")])
    assert quick.took_s is not None
    assert slow.took_s is not None
    assert (
        quick.took_s < 2 * 1000 * 129 * 26e-6 + 2 * 0.7
    )  # it takes every other second, and a batch more or less
    assert slow.took_s < TIMEOUT_S


def test_lists_take_turns(engine: Callable[..., Engine]) -> None:
    for_all = engine()
    outcomes = for_all.serve([Arrival(0, 1000, 128), *(Arrival(0.1, 64, 128) for _ in range(7))])
    took = [one.took_s or 0 for one in outcomes]
    assert max(took[1:]) < took[0] * 0.6
    shared = [batch for batch in for_all.batches if len({id(entry.request) for entry in batch}) > 1]
    assert len(shared) < len(for_all.batches) / 2  # a turn fills a batch


def test_what_is_cancelled_leaves_at_once(engine: Callable[..., Engine]) -> None:
    one = engine()
    is_done = [one.ask(arrival) for arrival in (LIST, LIGHT, LIST, LIGHT)]
    stays = one.ask(LIGHT)
    for request in is_done:
        one.queue.drop(request.flow)
        one.queue.drop(request.flow)  # again does nothing
    assert len(one.queue) == 1
    assert one.queue.capacity.queue_s == pytest.approx(9 * 26e-6)
    assert [entry.request for entry in one.run_batch()] == [stays]
    assert not one.run_batch()


def test_who_has_left_and_whose_time_is_over_is_never_in_a_batch(
    engine: Callable[..., Engine],
) -> None:
    one = engine()
    for arrival in (LIGHT, Arrival(0, 100, 128)):
        left = one.ask(arrival)
        left.future.cancel()
        over = (
            one.ask(Arrival(0, arrival.texts, arrival.tokens, timeout_s=1.0))
            if arrival is LIGHT
            else one.ask(arrival)
        )
        over.deadline = one.now - 1
        stays = one.ask(arrival)
        assert {id(entry.request) for entry in one.run_batch()} == {id(stays)}
        one.loop.run_until_complete(asyncio.sleep(0))
        assert isinstance(over.future.exception(), DeadlineExceeded)
        while one.run_batch():
            pass
        assert len(one.queue) == 0
        assert one.queue.capacity.queue_s == 0


def test_a_queue_is_full_when_it_refuses_until_half_of_its_seconds_are_free(
    engine: Callable[..., Engine],
) -> None:
    busy = engine(token_s=SLOW)
    busy.queue.capacity.max_queue_s = 10.0
    asked = Arrival(0, 1, 128)
    for _ in range(10):
        busy.ask(asked)
    with pytest.raises(Overloaded):
        busy.ask(Arrival(0, 1, 128, timeout_s=0.5))  # hasty, while there is room for others
    assert busy.queue.full_for_s == 0
    refused_at_last(lambda: busy.ask(asked))
    began = busy.now
    busy.run_batch()
    assert busy.queue.full_for_s == pytest.approx(busy.now - began)
    while busy.queue.capacity.queue_s > 2.5:
        busy.run_batch()
    assert busy.queue.full_for_s == 0
