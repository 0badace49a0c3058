"""
Models that label tokens are exported and served, with the answers of transformers' pipeline for
token classification.
"""

from __future__ import annotations

import itertools
import json
import warnings
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForTokenClassification,
    AutoTokenizer,
    TokenClassificationPipeline,
)

from command import BadUsage
from export.distillation import Distillation
from export.pipeline import Quantization, export
from service.artifact import Artifact, read_artifact
from service.classifier import Classifier
from service.http.info import service_info
from service.requests.entities import STRATEGIES
from service.runtimes.auto import choose, load
from tests.export.corpus import FAMILIES, MAX_TOKENS, SENTENCES
from tests.export.test_families import write_checkpoint
from tests.service.http.test_routes import client_of

pytestmark = pytest.mark.filterwarnings(
    "ignore"
)  # torch's tracer warns of what verification checks

LABELS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
PACKED = ["BERT", "RoBERTa", "XLM-RoBERTa", "CamemBERT", "DistilBERT", "ELECTRA", "ALBERT"]
NEAR_TIE = 1e-3
"""Difference of two probabilities from which rounding does not change which one is larger."""


def texts(count: int = 26) -> list[str]:
    """Return texts with emoji, combining marks, other scripts, punctuation and odd spaces.

    `count` of them are put together at random.
    """
    rng = np.random.default_rng(31)
    words = [word for sentence in SENTENCES for word in sentence.split()]
    words += [
        "👩‍👩‍👧",
        "🙂",
        "cafe\u0301",
        "naïve",
        "e-mail@example.com",
        "(a,b)",
        "\u00a0",
        "don't",
        "[SEP]",
    ]
    made = [" ".join(rng.choice(words, rng.integers(1, 12))) for _ in range(count)]
    return [*SENTENCES, *made, "x", " a space first", "two  spaces\tand a tab"]


def write_tagger(name: str, folder: Path, labels: list[str] = LABELS) -> Path:
    """Write a small checkpoint of a family that labels tokens."""
    family = next(row for row in FAMILIES if row.name == name)
    checkpoint = write_checkpoint(family, folder)
    config = AutoConfig.from_pretrained(checkpoint)
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: index for index, label in enumerate(labels)}
    config.problem_type = None
    torch.manual_seed(0)
    model = AutoModelForTokenClassification.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)  # Otherwise all labels are equally likely.
    model.save_pretrained(checkpoint)
    return checkpoint


def pipeline_of(checkpoint: Path) -> TokenClassificationPipeline:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.model_max_length = MAX_TOKENS
    model = AutoModelForTokenClassification.from_pretrained(checkpoint).float()
    return TokenClassificationPipeline(model=model, tokenizer=tokenizer)


def is_near_tie(pipe: TokenClassificationPipeline, text: str) -> bool:
    """Return whether rounding may change a token's label."""
    encoded = pipe.tokenizer(text, truncation=True, return_tensors="pt")
    with torch.no_grad():
        scores = pipe.model(**encoded).logits[0].softmax(-1).sort(-1, descending=True)[0]
    return bool((scores[:, 0] - scores[:, 1] < NEAR_TIE).any())


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Artifact]:
    folder = tmp_path_factory.mktemp("tagger")
    checkpoint = write_tagger("BERT", folder / "checkpoint")
    export(str(checkpoint), folder / "artifact", variants=["cpu-fp32"])
    return checkpoint, read_artifact(folder / "artifact")


@pytest.mark.parametrize("name", PACKED)
async def test_entities_are_those_of_the_pipeline_alone_and_packed(
    name: str, tmp_path: Path
) -> None:
    checkpoint = write_tagger(name, tmp_path / "checkpoint")
    export(str(checkpoint), tmp_path / "artifact", variants=["cpu-fp32"])
    artifact = read_artifact(tmp_path / "artifact")
    assert artifact.manifest.task == "token_labels"
    pipe = pipeline_of(checkpoint)
    # Each text of the others takes as long again.
    made = texts(240) if name == "BERT" else texts()
    compared = [text for text in made if not is_near_tie(pipe, text)]
    assert len(compared) >= (200 if name == "BERT" else 30)
    async with client_of(artifact) as (client, service):
        [model] = service_info(service)["models"].values()
        assert model["packs"]
        assert model["tasks"] == ["token-classification"]
        for strategy in STRATEGIES:
            parameters = {"aggregation_strategy": strategy}
            together = await ask(client, compared, parameters)
            for text, served in zip(compared, together, strict=True):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    expected = pipe(text, **parameters)
                assert_same(served, expected)
                if strategy == "simple":
                    assert_same(await ask(client, text, parameters), expected)


async def ask(client: httpx.AsyncClient, inputs: Any, parameters: dict[str, Any]) -> Any:
    """Return the answer in Hugging Face's format."""
    answer = await client.post("/", json={"inputs": inputs, "parameters": parameters})
    assert answer.status_code == 200, answer.text
    return answer.json()


def assert_same(served: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    without_scores = [
        [{name: value for name, value in entity.items() if name != "score"} for entity in entities]
        for entities in (served, expected)
    ]
    assert without_scores[0] == without_scores[1]
    assert [entity["score"] for entity in served] == pytest.approx(
        [float(entity["score"]) for entity in expected], abs=1e-4
    )


async def test_our_own_format_names_the_part_of_the_text(bert: tuple[Path, Artifact]) -> None:
    checkpoint, artifact = bert
    pipe = pipeline_of(checkpoint)
    sent = ["The waiter 🙂 brought cafe\u0301", "x"]
    async with client_of(artifact) as (client, _):
        answer = (await client.post("/tokens", json={"input": sent, "aggregation": "max"})).json()
    assert answer["object"] == "list"
    assert [each["index"] for each in answer["data"]] == [0, 1]
    assert answer["usage"]["prompt_tokens"] == sum(each["tokens"] for each in answer["data"])
    for text, each in zip(sent, answer["data"], strict=True):
        assert not each["truncated"]
        expected = pipe(text, aggregation_strategy="max")
        assert [(entity["start"], entity["end"]) for entity in each["entities"]] == [
            (entity["start"], entity["end"]) for entity in expected
        ]
        for entity in each["entities"]:
            assert entity["text"] == text[entity["start"] : entity["end"]]
            assert "index" not in entity


async def test_labels_can_be_ignored_or_shown(bert: tuple[Path, Artifact]) -> None:
    checkpoint, artifact = bert
    pipe = pipeline_of(checkpoint)
    text = SENTENCES[7]
    async with client_of(artifact) as (client, _):
        for ignored in ([], ["O", "PER"], ["O", "LOC"]):
            parameters = {"aggregation_strategy": "simple", "ignore_labels": ignored}
            assert_same(await ask(client, text, parameters), pipe(text, **parameters))


async def test_vllm_gets_the_probabilities_of_every_token(bert: tuple[Path, Artifact]) -> None:
    checkpoint, artifact = bert
    pipe = pipeline_of(checkpoint)
    async with client_of(artifact) as (client, _):
        body: dict[str, Any] = {"input": [*SENTENCES[:3], "x"], "task": "token_classify"}
        answer = (await client.post("/pooling", json=body)).json()
        logits = (await client.post("/pooling", json=body | {"use_activation": False})).json()
        for text, each in zip(body["input"], answer["data"], strict=True):
            alone = (await client.post("/pooling", json={"input": text})).json()["data"][0]
            np.testing.assert_allclose(alone["data"], each["data"], atol=1e-4)
    for text, each, raw in zip(body["input"], answer["data"], logits["data"], strict=True):
        with torch.no_grad():
            expected = pipe.model(**pipe.tokenizer(text, return_tensors="pt")).logits[0]
        assert each["object"] == "pooling"
        np.testing.assert_allclose(each["data"], expected.softmax(-1), atol=1e-4)
        np.testing.assert_allclose(raw["data"], expected, atol=1e-3)


async def test_a_long_text_is_cut_or_read_by_windows(bert: tuple[Path, Artifact]) -> None:
    _, artifact = bert
    text = " ".join(["the plot is thin and the jokes are thinner"] * 30)
    async with client_of(artifact) as (client, _):
        whole = {"input": text, "ignore_labels": []}
        cut = (await client.post("/tokens", json=whole)).json()
        read = (await client.post("/tokens", json=whole | {"window": {"stride": 8}})).json()
        refused = await client.post("/tokens", json={"input": text, "truncate": "none"})
        left = await client.post(
            "/tokens", json={"input": text, "truncate": "left", "ignore_labels": []}
        )
        stride = await ask(client, text, {"stride": 8, "ignore_labels": []})
    [cut], [read] = cut["data"], read["data"]
    assert cut["truncated"]
    assert cut["tokens"] == MAX_TOKENS
    assert not read["truncated"]
    assert read["windows"] > 2
    assert cut["entities"][-1]["end"] < len(text) / 2
    assert read["entities"][-1]["end"] == len(text)
    # Nothing is said twice, and nothing is left out.
    ends = [(entity["start"], entity["end"]) for entity in read["entities"]]
    assert all(first[1] <= second[0] for first, second in itertools.pairwise(ends))
    covered = "".join(text[start:end] for start, end in ends)
    assert covered.replace(" ", "") == text.replace(" ", "")
    assert [(entity["start"], entity["end"]) for entity in stride] == ends
    assert refused.status_code == 422
    assert (
        f"the model reads {MAX_TOKENS}, and truncate is none" in refused.json()["error"]["message"]
    )
    [left] = left.json()["data"]
    assert left["entities"][-1]["end"] == len(text)
    assert left["entities"][0]["start"] > len(text) / 2


@pytest.mark.parametrize("name", ["BERT", "RoBERTa"])
async def test_tokens_in_windows_have_their_characters_in_the_whole_text(
    name: str, tmp_path: Path
) -> None:
    checkpoint = write_tagger(name, tmp_path / "checkpoint")
    export(str(checkpoint), tmp_path / "artifact", variants=["cpu-fp32"])
    text = " ".join(["🙂 cafe\u0301 👩\u200d👩\u200d👧 naïve İstanbul ﬁn, (x)"] * 20)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    expected = encoded["offset_mapping"]
    assert len(expected) > 2 * MAX_TOKENS

    def places(answer: httpx.Response) -> list[tuple[int, int]]:
        assert answer.status_code == 200, answer.text
        [data] = answer.json()["data"]
        return [(entity["start"], entity["end"]) for entity in data["entities"]]

    body: dict[str, Any] = {"input": text, "aggregation": "none", "ignore_labels": []}
    async with client_of(read_artifact(tmp_path / "artifact")) as (client, _):
        windows = await client.post("/tokens", json=body | {"window": {"stride": 8}})
        assert places(windows) == expected
        # The same with every character beyond ASCII as an escape, emoji as pairs of surrogates.
        escaped = json.dumps(body | {"window": {"stride": 8}}).encode()
        assert places(await client.post("/tokens", content=escaped)) == expected
        left = places(await client.post("/tokens", json=body | {"truncate": "left"}))
        assert left == expected[-len(left) :]
        right = places(await client.post("/tokens", json=body | {"truncate": "right"}))
        assert right == expected[: len(right)]


LABEL_SCHEMES = {
    "no prefixes": ["O", "PER", "LOC", "ORG", "MISC"],
    "names with hyphens": ["O", "B-first-name", "I-first-name", "B-last-name", "I-last-name"],
    "begin, inside, last, unit": ["O", "B-PER", "I-PER", "L-PER", "U-PER"],
    "no outside": ["LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3", "LABEL_4"],
}


@pytest.mark.parametrize("scheme", LABEL_SCHEMES)
async def test_labels_of_any_scheme_are_grouped_as_the_pipeline_does(
    scheme: str, tmp_path: Path
) -> None:
    checkpoint = write_tagger("BERT", tmp_path / "checkpoint", LABEL_SCHEMES[scheme])
    export(str(checkpoint), tmp_path / "artifact", variants=["cpu-fp32"])
    pipe = pipeline_of(checkpoint)
    compared = [text for text in texts() if not is_near_tie(pipe, text)]
    async with client_of(read_artifact(tmp_path / "artifact")) as (client, _):
        for strategy in ("simple", "first"):
            parameters = {"aggregation_strategy": strategy}
            for text in compared:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    expected = pipe(text, **parameters)
                assert_same(await ask(client, text, parameters), expected)


REFUSED = {
    "unknown strategy": (
        {"input": "x", "aggregation": "last"},
        "aggregation",
        "must be one of none",
    ),
    "a strategy that is no text": ({"input": "x", "aggregation": 1}, "aggregation", "must be one"),
    "labels that are no list": ({"input": "x", "ignore_labels": "O"}, "ignore_labels", "a list"),
    "no text": ({}, "input", "input is missing"),
    "a pair": ({"input": [{"text": "a", "text_pair": "b"}]}, "input[0]", "must be a text"),
    "an empty text": ({"input": ["x", ""]}, "input[1]", "empty"),
    "pooled windows": ({"input": "x", "window": {"pool": "max"}}, "window.pool", "not a field"),
    "too large a stride": ({"input": "x", "window": {"stride": 99}}, "window.stride", "at most"),
    "a field of /classify": ({"input": "x", "top_k": 1}, "top_k", "not a field"),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_refuses(name: str, bert: tuple[Path, Artifact]) -> None:
    body, field, words = REFUSED[name]
    async with client_of(bert[1]) as (client, _):
        answer = await client.post("/tokens", json=body)
    assert answer.status_code == 422
    error = answer.json()["error"]
    assert error["param"] == field
    assert words in error["message"]


OF_ANOTHER_TASK = {
    "/classify": {"input": "x"},
    "/predict": {"inputs": "x"},
    "/rerank": {"query": "x", "documents": ["y"]},
    "/score": {"queries": "x", "documents": "y"},
}


@pytest.mark.parametrize("path", OF_ANOTHER_TASK)
async def test_a_model_that_labels_tokens_classifies_no_texts(
    path: str, bert: tuple[Path, Artifact]
) -> None:
    async with client_of(bert[1]) as (client, _):
        answer = await client.post(path, json=OF_ANOTHER_TASK[path])
    assert answer.status_code == 422
    assert "/info lists the tasks" in answer.text or "has 5 labels" in answer.text


async def test_a_model_that_classifies_texts_labels_no_tokens(artifact: Artifact) -> None:
    async with client_of(artifact) as (client, _):
        tokens = await client.post("/tokens", json={"input": "good"})
        pooling = await client.post("/pooling", json={"input": "good"})
        parameter = await client.post(
            "/", json={"inputs": "good", "parameters": {"aggregation_strategy": "simple"}}
        )
    for answer in (tokens, pooling):
        assert answer.status_code == 422
        assert "classifies whole texts" in answer.json()["error"]["message"]
    assert parameter.status_code == 422
    assert "parameters.aggregation_strategy has no meaning here" in parameter.json()["error"]


async def test_a_parameter_of_text_classification_is_refused(bert: tuple[Path, Artifact]) -> None:
    async with client_of(bert[1]) as (client, _):
        answer = await client.post("/", json={"inputs": "x", "parameters": {"top_k": 1}})
        zero_shot = await client.post(
            "/", json={"inputs": "x", "parameters": {"candidate_labels": ["a"]}}
        )
    assert answer.status_code == 422
    assert "parameters.top_k has no meaning here: the model labels tokens" in answer.text
    assert zero_shot.status_code == 422


@pytest.mark.parametrize("variant", ["cpu-int8", "cpu-int8-ort"])
def test_int8_is_gated_by_texts_whose_tokens_all_agree(variant: str, tmp_path: Path) -> None:
    checkpoint = write_tagger("BERT", tmp_path / "checkpoint")
    rng = np.random.default_rng(0)
    words = [word for sentence in SENTENCES for word in sentence.split()]
    lines = {" ".join(rng.choice(words, rng.integers(2, 6))) for _ in range(5_400)}
    (tmp_path / "gate.txt").write_text("\n".join(sorted(lines)) + "\n")
    quantization = Quantization(gate=tmp_path / "gate.txt", agreement=0.5)
    export(
        str(checkpoint),
        tmp_path / "artifact",
        variants=["cpu-fp32", variant],
        quantization=quantization,
    )
    artifact = read_artifact(tmp_path / "artifact")
    agreement = artifact.manifest.variants[variant].gate.agreement
    assert agreement is not None
    assert 0.3 < agreement.agreeing / agreement.texts < 1
    assert agreement.labels == {}
    exact, reduced = (
        Classifier(artifact, load(artifact, choose(artifact, name), 1))
        for name in ("cpu-fp32", variant)
    )
    for text in sorted(lines)[:50]:
        first, second = (each.predict([each.encode(text)]) for each in (exact, reduced))
        assert first.shape == second.shape
        assert not np.array_equal(first, second)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"variants": ["cpu-fp32", "cuda-fp16"]}, "no variant cuda-fp16"),
        ({"quantization": Quantization(agreement_per_label=0.9)}, "--agreement-per-label is for"),
        ({"distillation": Distillation(Path("texts.txt"), 1, 1)}, "--distill is for models"),
    ],
)
def test_options_for_whole_texts_are_refused(
    options: dict[str, Any], words: str, bert: tuple[Path, Artifact], tmp_path: Path
) -> None:
    with pytest.raises(BadUsage, match=words):
        export(str(bert[0]), tmp_path / "artifact", **options)
    assert not (tmp_path / "artifact").exists()


def test_a_task_for_whole_texts_is_refused(bert: tuple[Path, Artifact], tmp_path: Path) -> None:
    with pytest.raises(Exception, match="the model labels tokens"):
        export(str(bert[0]), tmp_path / "artifact", task="multi_label")


def test_the_manifest_says_what_the_model_does(bert: tuple[Path, Artifact]) -> None:
    manifest = json.loads(bert[1].path("manifest.json").read_text())
    assert manifest["task"] == "token_labels"
    assert manifest["labels"] == LABELS
    assert not manifest["takes_pairs"]
    assert manifest["variants"]["cpu-fp32"]["gate"]["status"] == "passed"
