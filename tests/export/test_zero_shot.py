"""Labels of a request are judged as by the zero-shot pipeline of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast, pipeline

from export.pipeline import export
from service.artifact import read_artifact
from tests.export.factories import write_checkpoint
from tests.service.http.test_routes import client_of

pytestmark = pytest.mark.filterwarnings(
    "ignore"
)  # torch's tracer warns of what verification checks

TEXTS = ["good film", "bad", " ".join(["a bad film"] * 20)]
LABELS = ["good", "bad film", "a b c"]


@pytest.mark.parametrize("names", [("not_entailment", "entailment"), ("Entails", "other")])
async def test_scores_are_those_of_the_pipeline(names: tuple[str, str], tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", decoder=False)
    config = json.loads((checkpoint / "config.json").read_text())
    config["id2label"] = dict(enumerate(names))
    config["label2id"] = {name: place for place, name in enumerate(names)}
    (checkpoint / "config.json").write_text(json.dumps(config))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(checkpoint / "tokenizer.json"),
        pad_token="[PAD]",
        model_max_length=24,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint)
    pipe = pipeline("zero-shot-classification", model=model.float(), tokenizer=tokenizer)
    export(str(checkpoint), tmp_path / "artifact", variants=["cpu-fp32"])
    async with client_of(read_artifact(tmp_path / "artifact")) as (client, _):
        questions: list[dict[str, Any]] = [
            {},
            {"multi_label": True},
            {"hypothesis_template": "film {} a"},
            {"hypothesis_template": "{{film}} {0} a {{}}"},
            {"candidate_labels": ["bad"]},
        ]
        for question in questions:
            parameters = {"candidate_labels": LABELS} | question
            served = await judged(client, parameters)
            for text, scores in zip(TEXTS, served, strict=True):
                expected = pipe(text, **parameters)
                by_label = dict(zip(expected["labels"], expected["scores"], strict=True))
                assert {each["label"]: each["score"] for each in scores} == pytest.approx(
                    by_label, abs=1e-4
                )


async def judged(client: httpx.AsyncClient, parameters: dict[str, Any]) -> list[Any]:
    """Return the scores of TEXTS, which are the same alone and together."""
    together = await client.post("/", json={"inputs": TEXTS, "parameters": parameters})
    assert together.status_code == 200, together.text
    for text, scores in zip(TEXTS, together.json(), strict=True):
        alone = await client.post("/", json={"inputs": text, "parameters": parameters})
        assert [each["score"] for each in alone.json()] == pytest.approx(
            [each["score"] for each in scores], abs=1e-5
        )
    answers: list[Any] = together.json()
    return answers
