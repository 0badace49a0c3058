"""Our histogram exposes the same page as prometheus_client's own."""

from __future__ import annotations

import random

import prometheus_client
from prometheus_client import CollectorRegistry, generate_latest

from service.telemetry.histogram import Histogram
from service.telemetry.metrics import SECONDS


def exposition(registry: CollectorRegistry) -> list[str]:
    # prometheus_client adds a series with the time of creation, which depends on no observation.
    lines = generate_latest(registry).decode().splitlines()
    return [line for line in lines if "_created" not in line]


def test_the_page_is_that_of_prometheus_clients_own_histogram() -> None:
    draw = random.Random(0)
    observed = [draw.lognormvariate(-6, 2) for _ in range(500)] + [
        0.0,
        SECONDS[0],
        SECONDS[7],
        SECONDS[-1],
        99.0,
    ]
    registry, reference_registry = CollectorRegistry(), CollectorRegistry()
    histogram = Histogram("drbert_wait_seconds", "A wait.", SECONDS, registry)
    reference = prometheus_client.Histogram(
        "drbert_wait_seconds", "A wait.", ["model"], buckets=SECONDS, registry=reference_registry
    )
    for i, value in enumerate(observed):
        for each in (histogram, reference):
            each.labels(("reviews", "topics")[i % 2]).observe(value)
    assert exposition(registry) == exposition(reference_registry)


def test_a_series_is_there_before_anything_is_observed() -> None:
    registry = CollectorRegistry()
    Histogram("drbert_batch_size", "Texts.", (1, 2), registry).labels("reviews")
    assert registry.get_sample_value("drbert_batch_size_count", {"model": "reviews"}) == 0
    assert (
        registry.get_sample_value("drbert_batch_size_bucket", {"model": "reviews", "le": "+Inf"})
        == 0
    )
