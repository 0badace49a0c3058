"""The simulation of many pods agrees with what queueing theory knows."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.fleet.simulation import (
    Engine,
    at_random,
    kept_connections,
    least_in_flight,
    least_of_two,
    round_robin,
    simulate,
)

PAIRS_AT_ONCE = Engine(fixed_s=0.007, each_s=0.008, most=32)


def test_an_engine_is_fitted_to_a_request_alone_and_to_a_full_batch() -> None:
    engine = Engine.fitted(alone_s=0.015, texts_per_s=125.0, most=32)
    assert engine.fixed_s + engine.each_s == pytest.approx(0.015)
    assert engine.capacity_per_s == pytest.approx(125.0)
    with pytest.raises(ValueError, match="no faster"):
        Engine.fitted(alone_s=0.008, texts_per_s=125.0, most=32)


def test_one_text_at_a_time_waits_as_long_as_pollaczek_and_khinchine_say() -> None:
    engine, load = Engine(fixed_s=0.0, each_s=0.01, most=1), 0.5
    outcome = simulate(engine, 1, load, at_random, seconds=4000)
    expected_s = 0.01 + 0.01 * load / (2 * (1 - load))
    assert outcome.latencies_s.mean() == pytest.approx(expected_s, rel=0.02)
    assert outcome.in_flight == pytest.approx(load + load**2 / (2 * (1 - load)), rel=0.03)


def test_a_request_in_an_empty_fleet_takes_one_batch() -> None:
    outcome = simulate(PAIRS_AT_ONCE, 4, 0.001, round_robin, seconds=2000)
    assert np.median(outcome.latencies_s) == pytest.approx(0.015)


def test_the_more_a_balancer_knows_the_shorter_is_the_tail() -> None:
    tails = [
        simulate(PAIRS_AT_ONCE, 10, 0.7, policy, seconds=60).percentile_ms(99)
        for policy in (kept_connections(4), at_random, least_of_two, least_in_flight)
    ]
    assert tails == sorted(tails, reverse=True)


def test_connections_that_are_opened_anew_spread_over_all_pods() -> None:
    kept, renewed = (
        simulate(PAIRS_AT_ONCE, 10, 0.5, kept_connections(4, age_s), seconds=60).busiest
        for age_s in (float("inf"), 2.0)
    )
    assert renewed < kept
