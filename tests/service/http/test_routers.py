"""Routers of LLM requests ask one text at a time, each in its own format."""

from __future__ import annotations

from math import exp
from pathlib import Path
from typing import Any

import pytest

from service.artifact import Artifact
from tests.factories import write_artifact
from tests.service.http.test_routes import client_of

POSITIVE = 1 / (1 + exp(-1))


async def test_the_semantic_router_gets_a_bare_list_of_all_labels(artifact: Artifact) -> None:
    async with client_of(artifact, classify_dialect="semantic-router") as (client, _):
        response = await client.post("/classify", json={"inputs": "good"})
        assert response.json() == [
            {"label": "POSITIVE", "score": pytest.approx(POSITIVE)},
            {"label": "NEGATIVE", "score": pytest.approx(1 - POSITIVE)},
        ]
        assert sum(each["score"] for each in response.json()) == pytest.approx(1)
        native = await client.post("/v1/classify", json={"input": "good"})
        assert native.json()["data"][0]["label"] == "POSITIVE"
        assert (await client.get("/health")).status_code == 200


async def test_a_model_whose_scores_do_not_add_up_to_1_is_refused(tmp_path: Path) -> None:
    several = write_artifact(tmp_path / "several", task="multi_label")
    async with client_of(several, classify_dialect="semantic-router") as (client, _):
        response = await client.post("/classify", json={"inputs": "good"})
    assert response.status_code == 422
    assert "needs scores that add up to 1" in response.json()["error"]["message"]


async def test_ort_server_answers_with_scores_by_label(artifact: Artifact) -> None:
    async with client_of(artifact, classify_dialect="ort-server") as (client, _):
        every = {"POSITIVE": pytest.approx(POSITIVE), "NEGATIVE": pytest.approx(1 - POSITIVE)}
        for body in ({"text": "good"}, {"text": "good", "top_k": 0}, {"text": "good", "top_k": 9}):
            response = await client.post("/classify", json=body)
            assert response.json() == {"labels": every}
            assert next(iter(response.json()["labels"])) == "POSITIVE"
        response = await client.post("/classify", json={"text": "good", "top_k": 1})
        assert response.json() == {"labels": {"POSITIVE": pytest.approx(POSITIVE)}}


async def test_ort_server_gets_the_largest_score_of_a_token_for_each_label(tmp_path: Path) -> None:
    tagger = write_artifact(tmp_path / "tagger", task="token_labels", takes_pairs=False)
    async with client_of(tagger, classify_dialect="ort-server") as (client, _):
        tokens = {"input": "good bad film", "aggregation": "none", "ignore_labels": []}
        shown = (await client.post("/pooling", json={"input": "good bad film"})).json()
        [data] = shown["data"]
        expected = [max(scores) for scores in zip(*data["data"][1:-1], strict=True)]
        response = await client.post("/classify", json={"text": "good bad film"})
        labels = response.json()["labels"]
        assert set(labels) == {"NEGATIVE", "POSITIVE"}
        assert [labels["NEGATIVE"], labels["POSITIVE"]] == pytest.approx(expected)
        assert list(labels.values()) == sorted(labels.values(), reverse=True)
        assert (await client.post("/tokens", json=tokens)).status_code == 200
        best = await client.post("/classify", json={"text": "good bad film", "top_k": 1})
        assert len(best.json()["labels"]) == 1


@pytest.mark.parametrize(
    ("dialect", "body", "param"),
    [
        ("semantic-router", {"inputs": ["good"]}, "inputs"),
        ("semantic-router", {"inputs": " "}, "inputs"),
        ("semantic-router", {"text": "good"}, "text"),
        ("ort-server", {}, "text"),
        ("ort-server", {"text": {"text": "good"}}, "text"),
        ("ort-server", {"text": "good", "top_k": -1}, "top_k"),
        ("ort-server", {"text": "good", "top_k": False}, "top_k"),
    ],
)
async def test_wrong_requests_are_refused_with_the_field(
    artifact: Artifact, dialect: str, body: dict[str, Any], param: str
) -> None:
    async with client_of(artifact, classify_dialect=dialect) as (client, _):
        response = await client.post("/classify", json=body)
    assert response.status_code == 422
    assert response.json()["error"]["param"] == param
