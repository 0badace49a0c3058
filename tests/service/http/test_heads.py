"""A model with several heads, by a toy model; tests/export/test_heads.py has real ones."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from service.artifact import Artifact, Head, Manifest, labels_of
from service.errors import InvalidInput, UnknownModel
from service.http.context import RequestHooks
from service.http.info import service_info
from service.shadow import Pairing, Shadow
from tests.factories import write_artifact
from tests.service.http.test_routes import classify, client_and_context, client_of


def head(task: Any, *labels: str) -> Head:
    return Head(task=task, labels=list(labels), checkpoint="none", checkpoint_sha256="0" * 64)


HEADS = {
    "tone": head("single_label", "NEGATIVE", "POSITIVE"),
    "topics": head("multi_label", "film", "food", "music"),
}


@pytest.fixture
def several(tmp_path: Path) -> Artifact:
    return write_artifact(tmp_path / "several", labels_of(HEADS), task="heads", heads=HEADS)


async def test_named_heads_answer_in_their_order_and_the_text_is_computed_once(
    several: Artifact,
) -> None:
    async with client_of(several) as (client, _):
        body = {"input": "good", "heads": ["topics", "tone"], "top_k": 1}
        answer = (await classify(client, body)).json()
        page = (await client.get("/metrics")).text
    [item] = answer["data"]
    assert answer["model"] == "several"
    assert list(item["heads"]) == ["topics", "tone"]
    assert item["heads"]["tone"]["label"] == "POSITIVE"
    assert sum(item["heads"]["tone"]["probs"]) == pytest.approx(1)
    topics = item["heads"]["topics"]
    assert topics["num_classes"] == 3
    assert set(topics["labels"]) == {
        label
        for label, prob in zip(HEADS["topics"].labels, topics["probs"], strict=True)
        if prob >= 0.5
    }
    assert all(len(each["scores"]) == 1 for each in item["heads"].values())
    assert item["label"] == topics["label"], "the item itself is the first named head's answer"
    assert 'drbert_batch_size_sum{model="several"} 1.0' in page


async def test_without_heads_the_main_one_answers_as_a_model_of_its_own(several: Artifact) -> None:
    async with client_of(several) as (client, _):
        named = (await classify(client, {"input": "good", "heads": ["tone"]})).json()["data"][0]
        plain = (await classify(client, {"input": "good"})).json()
        tei = (await client.post("/predict", json={"inputs": "good"})).json()
        vllm = (await client.post("/v1/classify", json={"input": "good"})).json()["data"][0]
    assert plain["model"] == "several"
    assert named == plain["data"][0] | {"heads": named["heads"]}
    assert "heads" not in plain["data"][0]
    assert tei == plain["data"][0]["scores"]
    assert vllm["probs"] == plain["data"][0]["probs"]


async def test_a_head_is_a_model_in_every_format(several: Artifact) -> None:
    async with client_of(several, cache_mib=1) as (client, service):
        body = {"input": "good", "heads": ["tone", "topics"]}
        whole = (await classify(client, body)).json()["data"][0]["heads"]
        topics = (await classify(client, {"input": "good", "model": "several/topics"})).json()
        hf = await client.post("/models/several/topics", json={"inputs": "good"})
        kserve = await client.post(
            "/v1/models/several/topics:predict", json={"instances": ["good"]}
        )
        inferred = await client.post(
            "/v2/models/several/topics/infer",
            json={
                "inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": ["good"]}]
            },
        )
        listed = (await client.get("/v1/models")).json()
        described = (await client.get("/v2/models/several/tone")).json()
        info = service_info(service)["models"]["several"]
        page = (await client.get("/metrics")).text
    assert topics["model"] == "several/topics"
    assert topics["data"][0].pop("cached"), "the text was computed for all heads"
    assert {name: topics["data"][0][name] for name in whole["topics"]} == whole["topics"]
    assert [each["label"] for each in hf.json()[0]] == [
        each["label"] for each in whole["topics"]["scores"]
    ]
    assert kserve.status_code == inferred.status_code == 200, (kserve.text, inferred.text)
    assert listed["models"] == ["several", "several/tone", "several/topics"]
    assert [each["heads"] for each in listed["data"]] == [["tone", "topics"], None, None]
    assert described["name"] == "several/tone"
    assert list(info["heads"]) == ["tone", "topics"]
    assert info["labels"] == ["NEGATIVE", "POSITIVE"]
    assert info["tasks"] == ["classification"]
    assert 'model="several"' in page
    assert 'model="several/topics"' not in page


@pytest.mark.parametrize(
    ("body", "status", "param", "words"),
    [
        ({"heads": ["tone", "colour"]}, 422, "heads[1]", "it has tone, topics"),
        ({"heads": ["tone", "tone"]}, 422, "heads[1]", "repeats an earlier head"),
        ({"heads": []}, 422, "heads", "name at least one head"),
        ({"heads": "tone"}, 422, "heads", "a string"),
        ({"heads": [3]}, 422, "heads[0]", "a number"),
        ({"heads": ["tone"], "model": "several/tone"}, 422, "heads", "has one head"),
        ({"heads": ["tone"], "labels": ["x"]}, 422, "model", "cannot judge labels"),
        ({"model": "several/colour"}, 404, "model", "loaded are several, several/tone"),
    ],
)
async def test_a_wrong_head_is_named_with_the_heads_that_there_are(
    body: dict[str, Any], status: int, param: str, words: str, several: Artifact
) -> None:
    async with client_of(several) as (client, _):
        answer = await classify(client, {"input": "good", **body})
    assert answer.status_code == status
    assert answer.json()["error"]["param"] == param
    assert words in answer.json()["error"]["message"]


async def test_a_model_with_one_head_refuses_to_be_asked_for_heads(artifact: Artifact) -> None:
    async with client_of(artifact) as (client, _):
        answer = await classify(client, {"input": "good", "heads": ["tone"]})
    assert answer.status_code == 422
    assert "leave heads out" in answer.json()["error"]["message"]


async def test_windows_of_a_long_text_are_pooled_for_every_head(several: Artifact) -> None:
    async with client_of(several) as (client, _):
        body = {"input": "good " * 60, "window": {"pool": "mean"}}
        [answer] = (await classify(client, {**body, "heads": ["topics", "tone"]})).json()["data"]
        alone = (await classify(client, {**body, "model": "several/tone"})).json()["data"][0]
    assert answer["windows"] == alone["windows"] > 1
    assert answer["heads"]["tone"]["probs"] == alone["probs"]


async def test_a_head_cannot_be_unloaded_or_be_the_default(several: Artifact) -> None:
    async with client_of(several) as (_, service):
        with pytest.raises(InvalidInput, match="is a head of several; unload that model"):
            service.registry.remove("several/tone")
        with pytest.raises(InvalidInput, match="is a head of several; name that model"):
            service.registry.set_default("several/tone")


async def test_a_replaced_model_is_freed_once_nobody_asks_its_heads(several: Artifact) -> None:
    async with client_of(several) as (_, service):
        registry = service.registry
        with service.acquire("several/tone") as view:
            assert registry.loaded["several"].users == 1
            _, replaced = registry.add("several", several)
            assert replaced is not None
            released = asyncio.create_task(registry.release_when_idle(replaced))
            await asyncio.sleep(0.05)
            assert not released.done(), "a head is still in use"
            assert view.full_name == "several/tone"
        await released
        engine = weakref.ref(replaced.classifier)
        del replaced, view, released
        assert engine() is None, "its memory waits for no garbage collector"
        with pytest.raises(UnknownModel):
            registry.get("several/colour")


@pytest.mark.parametrize("with_heads", [True, False])
async def test_a_shadow_answers_for_the_head_that_was_asked(
    with_heads: bool, several: Artifact, artifact: Artifact, tmp_path: Path
) -> None:
    other = artifact
    if with_heads:
        other = write_artifact(tmp_path / "other", labels_of(HEADS), task="heads", heads=HEADS)
    async with client_and_context(several, other) as (client, context):
        shadow = Shadow(
            context.service, Pairing(other.manifest.name, "several", 1.0), context.limits
        )
        object.__setattr__(context, "hooks", RequestHooks(shadow=shadow))
        for body in ({}, {"heads": ["tone", "topics"]}, {"model": "several/topics"}):
            assert (await classify(client, {"input": "good", **body})).status_code == 200
        while shadow._running:
            await asyncio.sleep(0.01)
    counts = shadow.summary()
    assert counts["agreed"] == (3 if with_heads else 2), counts
    assert counts["differed"] == counts["dropped"] == counts["failed"] == 0


def test_a_proof_compares_the_main_head(several: Artifact) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "service.plain", str(several.directory)],
        input=json.dumps(["good"]),
        capture_output=True,
        text=True,
        check=True,
    )
    answers = json.loads(done.stdout)
    assert answers["labels"] == ["NEGATIVE", "POSITIVE"]
    assert sum(answers["scores"][0]) == pytest.approx(1)


@pytest.mark.parametrize(
    "changes",
    [
        {"task": "heads"},
        {"heads": HEADS},
        {"heads": HEADS, "task": "heads"},
        {"heads": {"load": head("single_label", "NEGATIVE", "POSITIVE")}, "task": "heads"},
        {"heads": {"2": head("single_label", "NEGATIVE", "POSITIVE")}, "task": "heads"},
    ],
)
def test_a_manifest_with_other_labels_than_its_heads_is_refused(
    changes: dict[str, Any], artifact: Artifact
) -> None:
    with pytest.raises(ValidationError, match="head"):
        Manifest.model_validate(artifact.manifest.model_dump(by_alias=True) | changes)
