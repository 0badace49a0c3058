"""A model of natural language inference judges texts by the labels of a request."""

from __future__ import annotations

from collections.abc import AsyncIterator
from math import exp
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.artifact import Artifact
from tests.factories import write_artifact
from tests.service.http.test_routes import client_of

INFERENCE = ("contradiction", "entailment", "neutral")
"""The toy model adds 1 to entailment for each `good`, and to the other two for each `bad`."""
LABELS = ["bad", "a", "good"]
JOINT = [1 / (2 + exp(1)), 1 / (2 + exp(1)), exp(1) / (2 + exp(1))]
"""Softmax of the labels' logits of entailment, which are 0, 0 and 1."""
EACH = [1 / (1 + exp(1)), 0.5, 1 / (1 + exp(-1))]
"""Softmax of entailment against contradiction, whose logits are 1, 0 and 0."""


@pytest.fixture
def inference(tmp_path: Path) -> Artifact:
    return write_artifact(tmp_path / "inference", labels=INFERENCE)


@pytest.fixture
async def client(inference: Artifact) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(inference) as (client, _):
        yield client


async def answer(client: httpx.AsyncClient, path: str = "/classify", **body: Any) -> Any:
    response = await client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


async def test_the_labels_of_a_request_share_one_probability(client: httpx.AsyncClient) -> None:
    found = await answer(client, input=["film", "film b"], labels=LABELS)
    for index, item in enumerate(found["data"]):
        assert item["index"] == index
        assert item["label"] == "good"
        assert item["probs"] == pytest.approx(JOINT)
        assert item["score"] == item["probs"][2]
        assert [each["label"] for each in item["scores"]] == ["good", "bad", "a"]
        assert item["num_classes"] == 3
        assert "labels" not in item
    # [CLS] film [SEP] this example is good . [SEP]
    assert [item["tokens"] for item in found["data"]] == [3 * 9, 3 * 10]
    assert found["usage"]["total_tokens"] == 3 * 9 + 3 * 10


async def test_several_labels_may_apply(client: httpx.AsyncClient) -> None:
    body: dict[str, Any] = {"input": "film", "labels": LABELS, "multi_label": True}
    [item] = (await answer(client, **body))["data"]
    assert item["probs"] == pytest.approx(EACH)
    assert item["labels"] == ["good", "a"]
    [item] = (await answer(client, **body, threshold=0.6, top_k=1, probs=False))["data"]
    assert item["labels"] == ["good"]
    assert [each["label"] for each in item["scores"]] == ["good"]
    assert "probs" not in item


async def test_one_label_is_weighed_against_contradiction(client: httpx.AsyncClient) -> None:
    [item] = (await answer(client, input="film", labels=["bad"]))["data"]
    assert item["score"] == pytest.approx(EACH[0])


async def test_the_template_makes_the_hypothesis(client: httpx.AsyncClient) -> None:
    body: dict[str, Any] = {
        "input": "film",
        "labels": LABELS,
        "hypothesis_template": "good {0} {{",
    }
    [item] = (await answer(client, **body))["data"]
    assert item["probs"] == pytest.approx(JOINT)  # each has one `good` more
    assert item["tokens"] == 3 * 7  # [CLS] film [SEP] good bad { [SEP], as str.format reads it


async def test_a_request_may_say_which_labels_mean_inference(tmp_path: Path) -> None:
    renamed = write_artifact(tmp_path / "renamed", labels=("no", "yes", "maybe"))
    async with client_of(renamed) as (client, _):
        body: dict[str, Any] = {"input": "film", "labels": LABELS, "multi_label": True}
        told = {"entailment_label": "yes", "contradiction_label": "no"}
        [item] = (await answer(client, **body, **told))["data"]
        assert item["probs"] == pytest.approx(EACH)
        # As in transformers: without a contradiction it is the first label.
        [item] = (await answer(client, **body, entailment_label="yes"))["data"]
        assert item["probs"] == pytest.approx(EACH)
        [item] = (await answer(client, **body, entailment_label="no"))["data"]
        assert item["probs"] == pytest.approx([0.5, 0.5, 0.5])  # the last one has equal logits


async def test_a_long_text_is_cut_and_the_hypothesis_is_not(client: httpx.AsyncClient) -> None:
    text = " ".join(["b"] * 40)
    body: dict[str, Any] = {
        "input": text,
        "labels": LABELS,
        "hypothesis_template": "a b c a b c {}",
    }
    [item] = (await answer(client, **body))["data"]
    assert item["probs"] == pytest.approx(JOINT)
    assert item["truncated"]
    assert item["tokens"] == 3 * 16
    refused = await client.post("/classify", json=body | {"truncate": "none"})
    assert refused.status_code == 422
    assert refused.json()["error"]["param"] == "input"
    too_long = body | {"hypothesis_template": " ".join(["b"] * 20) + " {}"}
    refused = await client.post("/classify", json=too_long)
    assert refused.status_code == 422
    assert (
        "a sentence of 21 tokens, and a text and its sentence may have 13"
        in refused.json()["error"]["message"]
    )


@pytest.mark.parametrize("path", ["/", "/models/inference"])
async def test_hugging_faces_clients_ask_and_read_in_their_format(
    client: httpx.AsyncClient, path: str
) -> None:
    parameters = {"candidate_labels": LABELS, "multi_label": None, "hypothesis_template": None}
    found = await answer(client, path, inputs="film", parameters=parameters)
    assert [each["label"] for each in found] == ["good", "bad", "a"]
    assert [each["score"] for each in found] == pytest.approx([JOINT[2], JOINT[0], JOINT[1]])
    listed = await answer(client, path, inputs=["film", "film"], parameters=parameters)
    assert listed == [found, found]
    text = {"candidate_labels": "bad, a ,good", "multi_label": True}
    [best, *_] = await answer(client, path, inputs="film", parameters=text)
    assert best == {"label": "good", "score": pytest.approx(EACH[2])}


@pytest.mark.parametrize("release", ["0.36.0", "1.0.1", "1.1.4"])
async def test_earlier_releases_of_huggingface_hub_get_the_former_answer(
    client: httpx.AsyncClient, release: str
) -> None:
    response = await client.post(
        "/",
        json={"inputs": "film", "parameters": {"candidate_labels": LABELS}},
        headers={"User-Agent": f"unknown/None; hf_hub/{release}; python/3.11.7"},
    )
    assert response.json() == {
        "sequence": "film",
        "labels": ["good", "bad", "a"],
        "scores": pytest.approx([JOINT[2], JOINT[0], JOINT[1]]),
    }


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"labels": []}, "labels", "give at least one label"),
        ({"labels": "a"}, "labels", "labels is a string; it must be a list"),
        ({"labels": ["a", 3]}, "labels[1]", "labels[1] is a number"),
        ({"labels": ["a", " "]}, "labels[1]", "labels[1] is empty"),
        ({"labels": ["a", "b", "a"]}, "labels[2]", "labels[2] repeats an earlier label"),
        ({"labels": ["a" * 990]}, "labels[0]", "has 1007 characters in its template"),
        ({"hypothesis_template": "a {}"}, "hypothesis_template", "only with labels"),
        ({"multi_label": False}, "multi_label", "only with labels"),
        *(
            (
                {"labels": ["a"], "hypothesis_template": template},
                "hypothesis_template",
                "must hold {} once",
            )
            for template in ("a", "a {", "a {1}", "{{}}", "{0.__class__}", "{!r}", "{:>9}", "{x}")
        ),
        ({"labels": ["a"], "hypothesis_template": "{} {}"}, "hypothesis_template", "once"),
        ({"labels": ["a"], "window": {}}, "window", "do not go together"),
        ({"labels": ["a"], "activation": "none"}, "activation", "do not go together"),
        (
            {"labels": ["a"], "input": {"text": "a", "text_pair": "b"}},
            "input.text_pair",
            "leave out text_pair",
        ),
        ({"labels": ["a"], "entailment_label": "yes"}, "entailment_label", "its labels are"),
        (
            {"labels": ["a"], "contradiction_label": "entailment"},
            "contradiction_label",
            "the model's label for entailment",
        ),
    ],
)
async def test_a_wrong_question_is_refused_with_the_field(
    client: httpx.AsyncClient, body: dict[str, Any], param: str, words: str
) -> None:
    response = await client.post("/classify", json={"input": "film"} | body)
    assert response.status_code == 422, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert words in error["message"]


async def test_hugging_faces_names_are_in_its_refusals(client: httpx.AsyncClient) -> None:
    parameters = {"candidate_labels": ["a", "a"]}
    response = await client.post("/", json={"inputs": "film", "parameters": parameters})
    assert response.status_code == 422
    assert response.json() == {"error": "parameters.candidate_labels[1] repeats an earlier label."}


async def test_other_models_refuse_labels_with_the_reason(
    artifact: Artifact, tmp_path: Path
) -> None:
    reranker = write_artifact(tmp_path / "reranker", labels=("LABEL_0",), activation="sigmoid")
    async with client_of(artifact, reranker) as (client, _):
        for model, words in (
            (artifact.manifest.name, "None of the model's labels (NEGATIVE, POSITIVE) is named"),
            ("reranker", "cannot judge labels: it must read pairs and choose one of several"),
        ):
            body = {"input": "film", "labels": ["a"], "model": model}
            response = await client.post("/classify", json=body)
            assert response.status_code == 422
            assert response.json()["error"]["param"] == "model"
            assert words in response.json()["error"]["message"]


async def test_each_models_tasks_are_listed(inference: Artifact, tmp_path: Path) -> None:
    reranker = write_artifact(tmp_path / "reranker", labels=("LABEL_0",), activation="sigmoid")
    single = write_artifact(tmp_path / "single", takes_pairs=False)
    expected = {
        "inference": ["classification", "zero-shot-classification"],
        "reranker": ["classification", "reranking"],
        "single": ["classification"],
    }
    async with client_of(inference, reranker, single) as (client, _):
        listed = (await client.get("/v1/models")).json()["data"]
        assert {item["id"]: item["tasks"] for item in listed} == expected
        models = (await client.get("/info")).json()["models"]
        assert {name: model["tasks"] for name, model in models.items()} == expected


async def test_texts_times_labels_are_within_the_limits(inference: Artifact) -> None:
    async with client_of(inference, max_texts=5) as (client, _):
        await answer(client, input="film", labels=["a", "b", "c", "good", "bad"])
        body: dict[str, Any] = {"input": ["film"] * 2, "labels": LABELS}
        response = await client.post("/classify", json=body)
        assert response.status_code == 413
        assert "labels and texts make 6 pairs, the limit is 5" in response.text
    async with client_of(inference, max_body_bytes=1024) as (client, _):
        body = {"input": "film " * 100, "labels": LABELS}
        response = await client.post("/classify", json=body)
        assert response.status_code == 413
        assert "make pairs of 1559 characters together" in response.text
