"""The page at /metrics is written seldom, by one thread, and sent to all scrapers."""

from __future__ import annotations

import asyncio
import gzip
import threading
from collections.abc import Iterator

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from service.artifact import Artifact
from service.http import metrics_page
from service.http.metrics_page import accepts_gzip
from service.telemetry.metrics import Metrics
from tests.service.http.test_routes import classify, client_of, until


def lines(page: bytes) -> list[str]:
    # The process metrics change between two reads.
    return sorted(line for line in page.decode().splitlines() if not line.startswith("process_"))


def test_the_page_equals_that_of_prometheus_client() -> None:
    metrics = Metrics(CollectorRegistry())
    for model in ("reviews", 'odd "name"\\ of\nlines', "unused"):
        metrics.add_model(model, "d" * 64, "e" * 64, "openvino", "cpu-fp32")
    for number in range(1, 60):
        metrics.request.labels("reviews").observe(number**3 / 1000)
        metrics.batch_size.labels('odd "name"\\ of\nlines').observe(number)
    metrics.tokenize.labels("reviews").counts[3] = 12_345_678  # as Go writes large numbers
    metrics.count_request("reviews", 200)
    assert lines(metrics.page()) == lines(generate_latest(metrics.registry))
    assert b"process_resident_memory_bytes" in metrics.page()


async def test_the_page_is_written_once_for_all_scrapers_in_a_thread(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[threading.Thread] = []
    go_on, page = threading.Event(), Metrics.page

    def slow(self: Metrics) -> bytes:
        written.append(threading.current_thread())
        assert go_on.wait(30)
        return page(self)

    monkeypatch.setattr(Metrics, "page", slow)
    monkeypatch.setattr(metrics_page, "MAX_AGE_S", 1e9)
    async with client_of(artifact) as (client, _):
        tasks = [asyncio.create_task(client.get("/metrics")) for _ in range(64)]
        await until(lambda: bool(written))
        tasks[0].cancel()  # the first scraper disconnects, and the others get their page
        assert (await classify(client, {"input": "good"})).status_code == 200
        go_on.set()
        pages = [await task for task in tasks[1:]]
        again = await client.get("/metrics")
    assert len(written) == 1
    assert written[0] is not threading.current_thread()
    assert {page.content for page in pages} == {again.content}
    assert again.headers["content-type"] == "text/plain; version=1.0.0; charset=utf-8"


async def test_a_page_that_is_too_old_or_failed_is_written_again(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages: Iterator[bytes | Exception] = iter([b"first", ZeroDivisionError(), b"second", b"third"])

    def write(self: Metrics) -> bytes:
        page = next(pages)
        if isinstance(page, Exception):
            raise page
        return page

    monkeypatch.setattr(Metrics, "page", write)
    monkeypatch.setattr(metrics_page, "MAX_AGE_S", -1.0)
    async with client_of(artifact) as (client, _):
        assert (await client.get("/metrics")).text == "first"
        with pytest.raises(ZeroDivisionError):
            await client.get("/metrics")
        assert (await client.get("/metrics")).text == "second"
        monkeypatch.setattr(metrics_page, "MAX_AGE_S", 1e9)
        assert (await client.get("/metrics")).text == "second"


async def test_the_page_is_compressed_for_scrapers_that_accept_it(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics_page, "MAX_AGE_S", 1e9)
    async with client_of(artifact) as (client, service):
        plain = await client.get("/metrics", headers={"Accept-Encoding": "identity"})
        async with client.stream(
            "GET", "/metrics", headers={"Accept-Encoding": "gzip"}
        ) as response:
            raw = b"".join([piece async for piece in response.aiter_raw()])
        service.metrics.remove_model("reviews")
    assert response.headers["content-encoding"] == "gzip"
    assert response.headers["vary"] == "accept-encoding"
    assert int(response.headers["content-length"]) == len(raw) < len(plain.content) / 4
    assert gzip.decompress(raw) == plain.content
    assert "content-encoding" not in plain.headers


@pytest.mark.parametrize(
    ("accepted", "takes"),
    [
        ("gzip", True),
        ("deflate, gzip;q=1.0, *;q=0.5", True),
        ("GZIP", True),
        ("gzip; q=0.001", True),
        ("br,gzip ", True),
        ("", False),
        ("identity", False),
        ("gzip;q=0", False),
        ("gzip; q=0.000", False),
        ("xgzip", False),
    ],
)
def test_gzip_is_sent_only_to_clients_that_accept_it(accepted: str, takes: bool) -> None:
    assert accepts_gzip(accepted) == takes
