"""POST /tokens, by a toy model; tests/export/test_token_labels.py has real ones."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from command import BadInput
from service.artifact import Artifact
from service.http.info import service_info
from service.plain.__main__ import load_plain
from tests.factories import write_tagger
from tests.service.http.test_routes import client_of


@pytest.fixture
def tagger(tmp_path: Path) -> Artifact:
    """Return a model that labels the word `good` B-GOOD, and every other one O."""
    return write_tagger(tmp_path / "tagger")


async def test_a_word_is_found_in_the_text(tagger: Artifact) -> None:
    async with client_of(tagger) as (client, service):
        answer = await client.post("/tokens", json={"input": ["bad good film", "Good good"]})
        [model] = service_info(service)["models"].values()
        listed = (await client.get("/v1/models")).json()
    first, second = answer.json()["data"]
    [entity] = first["entities"]
    assert entity.pop("score") == pytest.approx(0.731, abs=1e-3)
    assert entity == {"label": "GOOD", "text": "good", "start": 4, "end": 8}
    assert [each["text"] for each in second["entities"]] == ["Good", "good"]
    assert model["task"] == "token_labels"
    assert listed["data"][0]["tasks"] == ["token-classification"]


async def test_a_token_without_a_number_fails_only_its_text(tagger: Artifact) -> None:
    async with client_of(tagger) as (client, _):
        failed, right = await asyncio.gather(
            *(client.post("/tokens", json={"input": text}) for text in ("poison", "good"))
        )
    assert failed.status_code == 500
    assert "NaN or infinity" in failed.json()["error"]["message"]
    assert [each["text"] for each in right.json()["data"][0]["entities"]] == ["good"]


async def test_an_equal_text_is_answered_from_memory(tagger: Artifact) -> None:
    async with client_of(tagger, cache_mib=1) as (client, _):
        answers = [
            (await client.post("/tokens", json={"input": "a good film"})).json()["data"][0]
            for _ in range(2)
        ]
    assert answers[1].pop("cached")
    assert answers[0] == answers[1]


@pytest.mark.parametrize("more", [{}, {"window": {}}, {"aggregation": "max"}])
async def test_a_text_without_tokens_has_no_entity(more: dict[str, Any], tagger: Artifact) -> None:
    async with client_of(tagger) as (client, _):
        answer = await client.post("/tokens", json={"input": "\u200b", "ignore_labels": []} | more)
        pooled = await client.post("/pooling", json={"input": "\u200b"})
    assert answer.json()["data"][0]["entities"] == []
    assert len(pooled.json()["data"][0]["data"]) == 2  # the two special tokens


async def test_tokens_have_the_same_index_with_windows_and_without(tagger: Artifact) -> None:
    body = {"input": "a good film", "aggregation": "none", "ignore_labels": []}
    async with client_of(tagger) as (client, _):
        answers = [
            (await client.post("/tokens", json=body | more)).json()
            for more in ({}, {"window": {"stride": 1}})
        ]
    assert [each["index"] for each in answers[0]["data"][0]["entities"]] == [1, 2, 3]
    assert answers[0]["data"][0]["entities"] == answers[1]["data"][0]["entities"]
    assert answers[0]["usage"] == answers[1]["usage"]


async def test_tokens_of_windows_are_counted_as_the_model_reads_them(tagger: Artifact) -> None:
    async with client_of(tagger) as (client, _):
        answer = await client.post("/tokens", json={"input": "good " * 20, "window": {"stride": 4}})
    [item] = answer.json()["data"]
    # Windows of 14 tokens of the text and 2 special ones; the second one begins at the 11th.
    assert (item["windows"], item["tokens"]) == (2, 16 + 12)
    assert len(item["entities"]) == 20


@pytest.mark.parametrize("window", [False, 0, "", []])
async def test_a_window_that_is_no_object_is_refused(window: Any, tagger: Artifact) -> None:
    async with client_of(tagger) as (client, _):
        answer = await client.post("/tokens", json={"input": "good", "window": window})
    assert answer.status_code == 422
    assert answer.json()["error"]["message"] == "window must be an object."


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"stride": -1}, "parameters.stride must be a number of tokens"),
        ({"stride": "8"}, "parameters.stride must be a number of tokens"),
        ({"stride": 99}, "parameters.stride: A window holds 14 tokens"),
        ({"stride": 2, "max_length": 8}, "parameters.stride and parameters.max_length"),
        ({"stride": 2, "truncation": False}, "leave out parameters.truncation"),
        ({"stride": 2, "candidate_labels": ["a"]}, "parameters.stride and parameters.candidate"),
        ({"aggregation_strategy": "last"}, "parameters.aggregation_strategy must be one of"),
        ({"ignore_labels": "O"}, "parameters.ignore_labels must be a list"),
        ({"function_to_apply": "none"}, "parameters.function_to_apply has no meaning here"),
    ],
)
async def test_hugging_faces_parameters_are_refused_by_their_names(
    parameters: dict[str, Any], words: str, tagger: Artifact
) -> None:
    async with client_of(tagger) as (client, _):
        answer = await client.post("/", json={"inputs": "good", "parameters": parameters})
    assert answer.status_code == 422
    assert words in answer.json()["error"]


@pytest.mark.parametrize("parameters", [{}, {"stride": 2}])
async def test_a_pair_is_refused(parameters: dict[str, Any], tagger: Artifact) -> None:
    body = {"inputs": [{"text": "good", "text_pair": "film"}], "parameters": parameters}
    async with client_of(tagger) as (client, _):
        answer = await client.post("/", json=body)
    assert answer.status_code == 422
    assert "this model takes single texts only" in answer.json()["error"]


async def test_a_text_far_too_long_is_refused_without_reading_all_of_it(
    tagger: Artifact,
) -> None:
    async with client_of(tagger, max_windows=2) as (client, _):
        answer = await client.post("/tokens", json={"input": "good " * 20_000, "window": {}})
        cut = await client.post("/tokens", json={"input": "good " * 20_000})
        left = await client.post("/tokens", json={"input": "good " * 20_000, "truncate": "left"})
    assert answer.status_code == 413
    assert "the limit is 2" in answer.json()["error"]["message"]
    [entities] = [each["entities"] for each in cut.json()["data"]]
    assert (entities[0]["start"], entities[-1]["end"], len(entities)) == (0, 14 * 5 - 1, 14)
    [entities] = [each["entities"] for each in left.json()["data"]]
    assert (entities[0]["start"], entities[-1]["end"]) == (100_000 - 14 * 5, 100_000 - 1)


async def test_other_protocols_list_no_outputs(tagger: Artifact) -> None:
    async with client_of(tagger) as (client, _):
        described = (await client.get("/v2/models/tagger")).json()
        refused = await client.post("/v1/models/tagger:predict", json={"instances": ["good"]})
    assert described["outputs"] == []
    assert refused.status_code == 422
    async with client_of(tagger, classify_dialect="infinity") as (client, _):
        [model] = (await client.get("/models")).json()["data"]
    assert model["capabilities"] == []


def test_a_proof_does_not_time_models_that_label_tokens(tagger: Artifact) -> None:
    with pytest.raises(BadInput, match="labels tokens; a proof compares models that classify"):
        load_plain(tagger.directory)


async def test_a_model_whose_answers_depend_on_padding_is_served_too(tmp_path: Path) -> None:
    tagger = write_tagger(tmp_path / "tagger", padding_safe=False)
    async with client_of(tagger) as (client, _):
        answer = await client.post("/tokens", json={"input": ["good", "a good film", "bad"]})
    assert [len(each["entities"]) for each in answer.json()["data"]] == [1, 1, 0]
