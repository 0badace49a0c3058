"""The queue and its admission, with a simulated clock and engine."""

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
    """A request of `texts` texts of `tokens` tokens each, which arrives at `at` seconds."""

    at: float
    texts: int
    tokens: int
    timeout_s: float = TIMEOUT_S
    model: str = "m"


@dataclass
class Outcome:
    arrival: Arrival
    took_s: float | None = None
    """Seconds from arrival to answer; None if the request was refused."""
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
        """Admit a request; raises what the queue raises if it refuses."""
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
    created: list[Engine] = []

    def make(**options: object) -> Engine:
        created.append(Engine(**options))  # type: ignore[arg-type]
        return created[-1]

    yield make
    for engine in created:
        engine.loop.close()


def every(seconds: float, arrival: Arrival, until: float, begin: float = 0.0) -> list[Arrival]:
    count = int((until - begin) / seconds)
    return [
        Arrival(
            begin + i * seconds, arrival.texts, arrival.tokens, arrival.timeout_s, arrival.model
        )
        for i in range(count)
    ]


def refused_at_last(ask: Callable[[], object]) -> Overloaded:
    """Return the error of the queue once it has become too full."""
    while True:
        try:
            ask()
        except Overloaded as refused:
            return refused


def late(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Return the outcomes of admitted requests that were not answered in time."""
    return [
        outcome
        for outcome in outcomes
        if outcome.error is None
        and (outcome.took_s is None or outcome.took_s > outcome.arrival.timeout_s)
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
def test_admitted_requests_are_done_in_time_under_any_load(
    some: list[Arrival], crowd_at: float, crowd_every: float, crowd_tokens: int
) -> None:
    engine = Engine(token_s={"m": 1e-3, "quick": 2e-5}, off_by=0.1)
    crowd = every(crowd_every, Arrival(0, 1, crowd_tokens), crowd_at + 20, crowd_at)
    outcomes = engine.serve([*some, *crowd])
    engine.loop.close()
    assert len(outcomes) == len(some) + len(crowd)
    assert not late(outcomes)
    assert {type(outcome.error) for outcome in outcomes if outcome.error} <= {Overloaded, TooLarge}
    served = [id(entry) for batch in engine.batches for entry in batch]
    assert (
        len(served)
        == len(set(served))
        == sum(outcome.arrival.texts for outcome in outcomes if not outcome.error)
    )


def test_light_requests_during_a_list_wait_at_most_for_one_turn_of_it(
    engine: Callable[..., Engine],
) -> None:
    for heavy in (LIST, Arrival(0, 1000, 4), *(Arrival(0, 64, 128) for _ in range(8))):
        outcomes = engine().serve([heavy, *every(0.05, LIGHT, until=10)])
        assert max(outcome.took_s or 0 for outcome in outcomes if outcome.is_light) < 0.02
        assert not late(outcomes)
        assert all(outcome.error is None for outcome in outcomes)


def test_a_list_among_light_requests_gets_the_rest_of_the_engine(
    engine: Callable[..., Engine],
) -> None:
    [alone] = engine().serve([LIST])
    list_outcome, *light_outcomes = engine().serve([LIST, *every(0.05, LIGHT, until=3)])
    light_s = len(light_outcomes) * (LIGHT.tokens + TEXT_COST) * 26e-6
    assert alone.took_s is not None
    assert list_outcome.took_s is not None
    assert list_outcome.took_s <= alone.took_s + light_s + 0.01


def test_lists_are_done_in_time_under_light_requests_of_twice_the_capacity(
    engine: Callable[..., Engine],
) -> None:
    outcomes = engine(token_s=SLOW, off_by=0.3).serve(
        [*every(1, Arrival(0, 60, 128), 60), *every(0.0045, LIGHT, 60)]
    )
    assert not late(outcomes)
    assert sum(outcome.error is None for outcome in outcomes if not outcome.is_light) >= 2
    assert (
        sum(outcome.error is None for outcome in outcomes if outcome.is_light)
        * (LIGHT.tokens + TEXT_COST)
        * 1e-3
        >= 0.5 * 60
    )


def test_light_requests_keep_a_fifth_of_the_engine_under_any_lists(
    engine: Callable[..., Engine],
) -> None:
    outcomes = engine(token_s=SLOW).serve(
        [*every(0.5, Arrival(0, 60, 128), 60), *every(0.06, LIGHT, 60)]
    )
    assert not late(outcomes)
    light_s = sorted(outcome.took_s or 0 for outcome in outcomes if outcome.is_light)
    assert light_s[len(light_s) // 2] < 0.5  # two batches of a list, 256 tokens each


def test_under_ten_times_the_capacity_admitted_requests_are_answered_in_time(
    engine: Callable[..., Engine],
) -> None:
    outcomes = engine(token_s=SLOW).serve(every(0.0129, Arrival(0, 1, 128), 60))
    assert not late(outcomes)
    took = [outcome.took_s for outcome in outcomes if outcome.took_s is not None]
    assert 12 < max(took) < TIMEOUT_S
    assert len(took) * 0.129 >= 60  # the engine never waited


def test_a_request_with_less_time_than_the_queue_is_long_is_refused(
    engine: Callable[..., Engine],
) -> None:
    busy = engine(token_s=SLOW)
    for _ in range(100):
        busy.ask(Arrival(0, 1, 128))
    with pytest.raises(Overloaded, match=r"would wait 13 s and may wait 0\.5 s") as refused:
        busy.ask(Arrival(0, 1, 8, timeout_s=1.0))
    assert refused.value.retry_after_s == 13
    busy.ask(Arrival(0, 1, 8))


def test_a_request_is_admitted_after_its_retry_after(engine: Callable[..., Engine]) -> None:
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


def test_retry_after_depends_on_tokens_also_after_short_texts(
    engine: Callable[..., Engine],
) -> None:
    busy = engine(token_s=SLOW, max_size=100)
    busy.serve(every(0.01, Arrival(0, 1, 4), 2))
    for _ in range(100):
        busy.ask(Arrival(0, 1, 128))
    with pytest.raises(Overloaded, match="limit of 100") as refused:
        busy.ask(Arrival(0, 50, 128))
    assert refused.value.retry_after_s == 7  # of 12.9 s half


def test_a_list_that_can_never_be_done_in_time_is_refused_with_the_possible_size(
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


def test_nothing_is_refused_by_time_before_anything_is_measured(
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


def test_a_speed_measured_on_a_busy_machine_refuses_lists_only_for_a_while(
    engine: Callable[..., Engine],
) -> None:
    simulation = engine()
    simulation.queue.capacity.expect("m", 500, 500 * 200e-6)  # at start; nothing has run since
    arrival = Arrival(0, 1000, 128, timeout_s=30)
    [outcome] = simulation.serve([arrival])
    assert outcome.took_s == pytest.approx(1000 * 129 * 26e-6)
    for _ in range(400):
        simulation.queue.capacity.note("m", 500, 500 * 200e-6, full=True)
    with pytest.raises(TooLarge):
        simulation.ask(arrival)
    simulation.now += 600
    [outcome] = simulation.serve([Arrival(simulation.now, 1000, 128, timeout_s=30)])
    assert not outcome.error


def test_a_stall_makes_the_queue_refuse_only_for_a_short_time(
    engine: Callable[..., Engine],
) -> None:
    stalled = engine()
    capacity = stalled.queue.capacity
    for _ in range(20):
        capacity.note("m", 500, 0.013, full=True)
    capacity.note("m", 500, 5.0, full=True)  # the processor was taken away
    assert capacity.seconds("m", 500) < 0.02
    for _ in range(60):
        capacity.note("m", 500, 0.13, full=True)  # it has become slower
    assert capacity.seconds("m", 500) > 0.1


def test_lists_of_models_of_very_different_speed_share_the_engine_by_time(
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
    took = [outcome.took_s or 0 for outcome in outcomes]
    assert max(took[1:]) < took[0] * 0.6
    shared = [batch for batch in for_all.batches if len({id(entry.request) for entry in batch}) > 1]
    assert len(shared) < len(for_all.batches) / 2  # a turn fills a batch


def test_a_cancelled_request_leaves_the_queue_at_once(engine: Callable[..., Engine]) -> None:
    simulation = engine()
    cancelled = [simulation.ask(arrival) for arrival in (LIST, LIGHT, LIST, LIGHT)]
    stays = simulation.ask(LIGHT)
    for request in cancelled:
        simulation.queue.drop(request.flow)
        simulation.queue.drop(request.flow)  # again does nothing
    assert len(simulation.queue) == 1
    assert simulation.queue.capacity.queue_s == pytest.approx(9 * 26e-6)
    assert [entry.request for entry in simulation.run_batch()] == [stays]
    assert not simulation.run_batch()


def test_cancelled_and_expired_requests_are_never_in_a_batch(
    engine: Callable[..., Engine],
) -> None:
    simulation = engine()
    for arrival in (LIGHT, Arrival(0, 100, 128)):
        cancelled = simulation.ask(arrival)
        cancelled.future.cancel()
        over = (
            simulation.ask(Arrival(0, arrival.texts, arrival.tokens, timeout_s=1.0))
            if arrival is LIGHT
            else simulation.ask(arrival)
        )
        over.deadline = simulation.now - 1
        stays = simulation.ask(arrival)
        assert {id(entry.request) for entry in simulation.run_batch()} == {id(stays)}
        simulation.loop.run_until_complete(asyncio.sleep(0))
        assert isinstance(over.future.exception(), DeadlineExceeded)
        while simulation.run_batch():
            pass
        assert len(simulation.queue) == 0
        assert simulation.queue.capacity.queue_s == 0


def test_a_queue_that_refuses_is_full_until_half_of_its_seconds_are_free(
    engine: Callable[..., Engine],
) -> None:
    busy = engine(token_s=SLOW)
    busy.queue.capacity.max_queue_s = 10.0
    arrival = Arrival(0, 1, 128)
    for _ in range(10):
        busy.ask(arrival)
    with pytest.raises(Overloaded):
        busy.ask(Arrival(0, 1, 128, timeout_s=0.5))  # hasty, while there is room for others
    assert busy.queue.full_for_s == 0
    refused_at_last(lambda: busy.ask(arrival))
    began = busy.now
    busy.run_batch()
    assert busy.queue.full_for_s == pytest.approx(busy.now - began)
    while busy.queue.capacity.queue_s > 2.5:
        busy.run_batch()
    assert busy.queue.full_for_s == 0
