"""With DRBERT_CACHE_MIB equal texts are computed once, and every answer is the model's own."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import httpx
import pytest

from service.artifact import Artifact, read_artifact
from service.batching.answer_cache import ENTRY_BYTES, AnswerCache
from service.registry import LoadedModel
from service.state import ServiceState
from tests.service.http.test_routes import classify, client_of, stuck, until


def only_model(service: ServiceState) -> LoadedModel:
    return next(iter(service.registry.loaded.values()))


def batches(service: ServiceState) -> float:
    """Return how many texts the model has computed."""
    value = service.metrics.registry.get_sample_value(
        "drbert_batch_size_sum", {"model": only_model(service).name}
    )
    return value or 0


def texts(service: ServiceState, outcome: str) -> float:
    """Return how many texts were answered in this way."""
    value = service.metrics.registry.get_sample_value(
        "drbert_cache_texts_total", {"model": only_model(service).name, "outcome": outcome}
    )
    return value or 0


async def test_a_text_is_computed_once_and_answered_as_before(artifact: Artifact) -> None:
    async with client_of(artifact, cache_mib=1) as (client, service):
        first = (await classify(client, {"input": "good film"})).json()["data"][0]
        second = await classify(client, {"input": "good film"})
        again = second.json()["data"][0]
        assert batches(service) == 1
        assert "cached" not in first
        assert again.pop("cached") is True
        assert again == first
        assert "inference;dur=0.0" in second.headers["Server-Timing"]
        other = (await classify(client, {"input": "bad film"})).json()["data"][0]
        assert other["label"] != first["label"]
        assert (texts(service, "hit"), texts(service, "computed")) == (1, 2)
        assert (service.metrics.registry.get_sample_value("drbert_cache_bytes") or 0) > ENTRY_BYTES


async def test_without_the_setting_every_text_is_computed(artifact: Artifact) -> None:
    async with client_of(artifact) as (client, service):
        for _ in range(2):
            answer = (await classify(client, {"input": ["good", "good"]})).json()
            assert all("cached" not in item for item in answer["data"])
        assert batches(service) == 4
        assert service.answer_cache is None


async def test_requests_may_differ_in_everything_that_comes_after_the_model(
    artifact: Artifact,
) -> None:
    async with client_of(artifact, cache_mib=1) as (client, service):
        await classify(client, {"input": "good"})
        raw = (await classify(client, {"input": "good", "activation": "none"})).json()["data"][0]
        hugging_face = (await client.post("/", json={"inputs": "good"})).json()
        assert batches(service) == 1
        assert raw["scores"][0]["score"] == 1.0  # the logit that WEIGHTS gives
        assert hugging_face[0][0]["score"] < 1


async def test_equal_texts_of_a_list_are_computed_once(artifact: Artifact) -> None:
    async with client_of(artifact, cache_mib=1) as (client, service):
        answer = (await classify(client, {"input": ["good", "bad", "good"]})).json()["data"]
        assert batches(service) == 2
        assert [item.get("cached") for item in answer] == [None, None, True]
        assert answer[0]["scores"] == answer[2]["scores"]


async def test_a_text_and_its_pair_are_not_the_text_that_both_make(artifact: Artifact) -> None:
    async with client_of(artifact, cache_mib=1) as (client, service):
        for text in ("good [SEP] bad", {"text": "good", "text_pair": "bad"}):
            assert (await classify(client, {"input": text})).status_code == 200
        assert (texts(service, "hit"), texts(service, "computed")) == (0, 2)


async def test_an_equal_text_in_flight_is_joined(artifact: Artifact) -> None:
    async with client_of(artifact, cache_mib=1) as (client, service):
        async with stuck(service):
            tasks = [asyncio.create_task(classify(client, {"input": "good"})) for _ in range(3)]
            await until(lambda: service.lifecycle.active_requests == 3)
        answers = [response.json()["data"][0] for response in await asyncio.gather(*tasks)]
        assert batches(service) == 1
        assert sorted(answer.get("cached", False) for answer in answers) == [False, True, True]
        assert texts(service, "joined") == 2


async def test_who_joined_a_request_that_left_is_answered_all_the_same(
    artifact: Artifact,
) -> None:
    async with client_of(artifact, cache_mib=1) as (client, service):
        async with stuck(service):
            leader = asyncio.create_task(classify(client, {"input": "good"}))
            await until(lambda: service.lifecycle.active_requests == 1)
            followers = [asyncio.create_task(classify(client, {"input": "good"})) for _ in range(2)]
            await until(lambda: service.lifecycle.active_requests == 3)
            leader.cancel()
            await until(lambda: service.lifecycle.active_requests == 2)
        for response in await asyncio.gather(*followers):
            assert response.json()["data"][0]["label"] == "POSITIVE"


async def test_a_list_that_joined_a_request_that_left_is_answered_all_the_same(
    artifact: Artifact,
) -> None:
    async with client_of(artifact, cache_mib=1) as (client, service):
        async with stuck(service):
            leader = asyncio.create_task(classify(client, {"input": "good"}))
            await until(lambda: service.lifecycle.active_requests == 1)
            # It waits for its other text first.
            follower = asyncio.create_task(classify(client, {"input": ["bad", "good"]}))
            await until(lambda: service.lifecycle.active_requests == 2)
            leader.cancel()
            await until(lambda: service.lifecycle.active_requests == 1)
        answers = (await follower).json()["data"]
        assert [each["label"] for each in answers] == ["NEGATIVE", "POSITIVE"]


async def test_who_joined_is_answered_while_draining_though_the_first_one_left(
    artifact: Artifact,
) -> None:
    async with client_of(artifact, cache_mib=1) as (client, service):
        async with stuck(service):
            leader = asyncio.create_task(classify(client, {"input": "good"}))
            await until(lambda: service.lifecycle.active_requests == 1)
            follower = asyncio.create_task(classify(client, {"input": "good"}))
            await until(lambda: service.lifecycle.active_requests == 2)
            draining = asyncio.create_task(service.lifecycle.drain())
            await until(lambda: service.lifecycle.state == "draining")
            leader.cancel()
            await until(lambda: service.lifecycle.active_requests == 1)
        assert (await follower).status_code == 200
        await draining
        assert batches(service) == 1


async def test_a_text_that_nobody_waits_for_any_more_is_dropped(artifact: Artifact) -> None:
    async with client_of(artifact, cache_mib=1) as (client, service):
        async with stuck(service):
            first = asyncio.create_task(classify(client, {"input": "bad"}))
            await until(lambda: service.lifecycle.active_requests == 1)
            await until(lambda: service.batcher.waiting == 0)
            tasks = [asyncio.create_task(classify(client, {"input": "good"})) for _ in range(2)]
            await until(lambda: service.lifecycle.active_requests == 3)
            assert service.batcher.waiting == 1
            for task in tasks:
                task.cancel()
            await until(lambda: service.batcher.waiting == 0)
        await first
        assert batches(service) == 1
        assert service.batcher.queue.capacity.texts == 0


async def test_a_request_just_after_the_last_one_left_is_computed(artifact: Artifact) -> None:
    async with client_of(artifact, cache_mib=1) as (_, service):
        model, cache = only_model(service), service.answer_cache
        assert cache is not None
        item = model.classifier.encode("good")
        async with stuck(service):
            first = asyncio.create_task(cache.submit(model, [item]))
            await asyncio.sleep(0.05)
            first.cancel()
            await asyncio.sleep(0)  # It has left, and its computation is being cancelled.
            second = asyncio.create_task(cache.submit(model, [item]))
        [result] = await second
        assert not result.cached


async def test_who_joins_or_hits_takes_no_place_in_the_queue(artifact: Artifact) -> None:
    long = "good " * 60  # too long to be admitted without a reservation
    async with client_of(artifact, cache_mib=1) as (client, service):
        capacity = service.batcher.queue.capacity
        async with stuck(service):
            first = asyncio.create_task(classify(client, {"input": "bad"}))
            await until(lambda: service.lifecycle.active_requests == 1)
            await until(lambda: service.batcher.waiting == 0)
            tasks = [asyncio.create_task(classify(client, {"input": long})) for _ in range(5)]
            await until(lambda: service.lifecycle.active_requests == 6)
            await until(lambda: service.batcher.waiting == 1)
            await until(lambda: capacity.texts == 1)
        await asyncio.gather(first, *tasks)
        capacity.note(only_model(service).key, 1000, 10.0, full=True)
        load = capacity.light_load(capacity.clock())
        for _ in range(20):
            assert (await classify(client, {"input": long})).status_code == 200
        assert capacity.light_load(capacity.clock()) <= load * 1.01
        assert capacity.texts == 0


async def test_who_joined_a_request_with_a_shorter_limit_keeps_its_own(artifact: Artifact) -> None:
    async with client_of(artifact, cache_mib=1) as (client, service):
        async with stuck(service):
            hasty = asyncio.create_task(
                client.post(
                    "/classify", json={"input": "good"}, headers={"X-Request-Timeout-Ms": "200"}
                )
            )
            await until(lambda: service.lifecycle.active_requests == 1)
            patient = asyncio.create_task(classify(client, {"input": "good"}))
            assert (await hasty).status_code == 504
        assert (await patient).status_code == 200


async def test_who_joins_and_is_too_late_is_answered_with_504(artifact: Artifact) -> None:
    async with client_of(artifact, cache_mib=1) as (client, service):
        async with stuck(service):
            patient = asyncio.create_task(classify(client, {"input": "good"}))
            await until(lambda: service.lifecycle.active_requests == 1)
            hasty = await client.post(
                "/classify", json={"input": "good"}, headers={"X-Request-Timeout-Ms": "200"}
            )
            assert hasty.status_code == 504
        assert (await patient).status_code == 200


async def test_a_text_that_fails_is_not_kept_and_fails_for_everybody(artifact: Artifact) -> None:
    async with client_of(artifact, cache_mib=1) as (client, service):
        async with stuck(service):
            tasks = [asyncio.create_task(classify(client, {"input": "poison"})) for _ in range(3)]
            await until(lambda: service.lifecycle.active_requests == 3)
        assert {response.status_code for response in await asyncio.gather(*tasks)} == {500}
        assert service.answer_cache is not None
        assert len(service.answer_cache) == 0


async def test_a_single_text_does_not_wait_for_a_list_that_has_it(artifact: Artifact) -> None:
    async with client_of(artifact, cache_mib=1) as (client, service):
        async with stuck(service):
            many = asyncio.create_task(classify(client, {"input": ["a", "good"]}))
            await until(lambda: service.lifecycle.active_requests == 1)
            single = asyncio.create_task(classify(client, {"input": "good"}))
            await until(lambda: service.lifecycle.active_requests == 2)
        await asyncio.gather(many, single)
        assert texts(service, "joined") == 0


async def test_another_model_of_the_same_name_has_answers_of_its_own(
    artifact: Artifact, tmp_path: Path
) -> None:
    other = other_labels(artifact, tmp_path)
    async with client_of(artifact, cache_mib=1) as (client, service):
        name = only_model(service).name
        before = (await classify(client, {"input": "good"})).json()["data"][0]["label"]
        new, old = service.registry.add(name, other)
        assert old is not None
        await service.registry.release_when_idle(old)
        after = (await classify(client, {"input": "good"})).json()["data"][0]
        assert after["label"] != before
        assert "cached" not in after
        assert new.artifact.digest != old.artifact.digest


def other_labels(artifact: Artifact, folder: Path) -> Artifact:
    """Return a copy of an artifact whose labels are exchanged."""
    from service.artifact import MANIFEST, with_checksum

    copy = folder / "other"
    shutil.copytree(artifact.directory, copy)
    manifest = artifact.manifest.model_copy(
        update={"labels": list(reversed(artifact.manifest.labels))}
    )
    (copy / MANIFEST).write_text(with_checksum(manifest).model_dump_json())
    return read_artifact(copy)


@pytest.mark.parametrize("entries", [1, 3])
async def test_the_memory_is_bounded_and_the_least_recently_used_goes_first(
    artifact: Artifact, entries: int
) -> None:
    async with client_of(artifact) as (_, service):
        model = only_model(service)
        cache = AnswerCache(service.batcher, entries * (ENTRY_BYTES + 8))
        words = ["good", "bad", "film", "a"]
        for word in words:
            await cache.submit(model, [model.classifier.encode(word)])
        assert len(cache) == entries
        assert cache.bytes == entries * (ENTRY_BYTES + 8)
        [kept] = await cache.submit(model, [model.classifier.encode("a")])
        [gone] = await cache.submit(model, [model.classifier.encode("good")])
        assert (kept.cached, gone.cached) == (True, False)


async def test_no_answer_is_lost_or_wrong_while_requests_come_and_go(artifact: Artifact) -> None:
    async with client_of(artifact, cache_mib=1) as (client, _):
        expected = {"good": "POSITIVE", "bad": "NEGATIVE"}

        async def ask(number: int) -> httpx.Response | None:
            word = ("good", "bad")[number % 2]
            request = asyncio.create_task(
                classify(client, {"input": f"{word} a" if number % 3 else word})
            )
            if number % 5 == 0:
                await asyncio.sleep(0)
                request.cancel()
                return None
            response = await request
            assert response.json()["data"][0]["label"] == expected[word]
            return response

        answered = await asyncio.gather(*map(ask, range(100)))
        assert sum(response is not None for response in answered) == 80
