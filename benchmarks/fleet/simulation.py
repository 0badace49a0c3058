"""
A simulation of many pods that answer requests in batches, as this service does.

A pod runs one batch at a time. A batch takes its texts from the queue when the one before it is
done, at most `most` of them, and lasts `fixed_s` and `each_s` times the texts' lengths, in
multiples of the mean length. Requests of one text arrive at random times (Poisson).
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Engine:
    """How long a batch takes."""

    fixed_s: float
    """Seconds of a batch, whatever is in it."""
    each_s: float
    """Seconds that a text of mean length adds."""
    most: int
    """Texts in a batch, at most."""

    @classmethod
    def fitted(cls, alone_s: float, texts_per_s: float, most: int) -> Engine:
        """Return the engine that answers one text alone in `alone_s`, and so many per second.

        Raises ValueError if a full batch is no faster than its texts one by one.
        """
        full_s = most / texts_per_s
        each_s = (full_s - alone_s) / (most - 1)
        if each_s <= 0 or alone_s <= each_s:
            raise ValueError("a full batch is no faster than its texts one by one")
        return cls(alone_s - each_s, each_s, most)

    @property
    def capacity_per_s(self) -> float:
        """Texts per second in full batches."""
        return self.most / (self.fixed_s + self.most * self.each_s)


@dataclass
class Pod:
    """A pod and the requests that are in it."""

    queue: deque[tuple[float, float]] = field(default_factory=deque)
    """Arrival and length of each request that waits."""
    running: list[tuple[float, float]] = field(default_factory=list)
    answered: int = 0

    @property
    def in_flight(self) -> int:
        """Requests that wait or are computed."""
        return len(self.queue) + len(self.running)


Choose = Callable[[Sequence[Pod], random.Random, int, float], int]
"""Chooses the pod of a request, given its number and its time in seconds."""


def at_random(pods: Sequence[Pod], rng: random.Random, number: int, now: float) -> int:
    """Choose any pod: a Kubernetes Service with a new connection for each request."""
    return rng.randrange(len(pods))


def round_robin(pods: Sequence[Pod], rng: random.Random, number: int, now: float) -> int:
    """Choose the pods in turn: one proxy without knowledge of them."""
    return number % len(pods)


def least_of_two(pods: Sequence[Pod], rng: random.Random, number: int, now: float) -> int:
    """Choose the emptier of two random pods: Envoy's LEAST_REQUEST."""
    first, second = rng.randrange(len(pods)), rng.randrange(len(pods))
    return first if pods[first].in_flight <= pods[second].in_flight else second


def least_in_flight(pods: Sequence[Pod], rng: random.Random, number: int, now: float) -> int:
    """Choose the emptiest pod, any of those that are equally so."""
    fewest = min(pod.in_flight for pod in pods)
    return rng.choice([place for place, pod in enumerate(pods) if pod.in_flight == fewest])


def kept_connections(per_pod: int, age_s: float = float("inf")) -> Choose:
    """Return a choice by kept connections, each of which leads to one pod.

    A caller takes any of its `per_pod` times as many connections as there are pods. A connection is
    opened anew, to any pod, after `age_s` seconds, more or less by up to a tenth.
    """
    places: dict[int, int] = {}
    ends: dict[int, float] = {}

    def choose(pods: Sequence[Pod], rng: random.Random, number: int, now: float) -> int:
        connection = rng.randrange(per_pod * len(pods))
        if now >= ends.get(connection, 0.0):
            places[connection] = rng.randrange(len(pods))
            ends[connection] = now + age_s * rng.uniform(0.9, 1.1)
        return places[connection]

    return choose


@dataclass(frozen=True)
class Outcome:
    """What callers saw."""

    latencies_s: np.ndarray
    """Of every request that arrived after the first tenth of the time."""
    in_flight: float
    """Requests in flight in a pod, on average."""
    busiest: float
    """Requests of the busiest pod by those of a pod on average."""

    def percentile_ms(self, q: float) -> float:
        """Return the q-th percentile of the latencies in milliseconds."""
        return float(np.percentile(self.latencies_s, q) * 1000)


def simulate(
    engine: Engine,
    pods: int,
    load: float,
    choose: Choose,
    seconds: float,
    lengths: Sequence[float] = (1.0,),
    seed: int = 0,
) -> Outcome:
    """Return what `pods` pods answer at a share `load` of their capacity."""
    rng = random.Random(seed)
    fleet = [Pod() for _ in range(pods)]
    rate = load * pods * engine.capacity_per_s
    events: list[tuple[float, int, int]] = [(rng.expovariate(rate), 0, -1)]
    order = itertools.count(1)
    latencies: list[float] = []
    warm, number = seconds / 10, 0

    def start(place: int, now: float) -> None:
        pod = fleet[place]
        pod.running = [pod.queue.popleft() for _ in range(min(engine.most, len(pod.queue)))]
        if pod.running:
            took = engine.fixed_s + engine.each_s * sum(length for _, length in pod.running)
            heapq.heappush(events, (now + took, next(order), place))

    while events:
        now, _, place = heapq.heappop(events)
        if place >= 0:
            pod = fleet[place]
            latencies += [now - arrived for arrived, _ in pod.running if arrived > warm]
            start(place, now)
            continue
        chosen = choose(fleet, rng, number, now)
        number += 1
        pod = fleet[chosen]
        pod.answered += 1
        pod.queue.append((now, rng.choice(lengths)))
        if not pod.running:
            start(chosen, now)
        following = now + rng.expovariate(rate)
        if following < seconds:
            heapq.heappush(events, (following, next(order), -1))
    times = np.array(latencies)
    # Little's law: requests in flight are their rate times their mean time.
    return Outcome(
        times,
        float(len(times) / (seconds - warm) * times.mean() / pods),
        max(pod.answered for pod in fleet) / (number / pods),
    )
