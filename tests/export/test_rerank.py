"""Cross-encoders are exported and served with the scores of transformers, alone and packed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from export.checkpoint.config import plain_functions
from export.pipeline import export
from service.artifact import read_artifact
from service.http.info import service_info
from tests.export.corpus import FAMILIES, MAX_TOKENS, SENTENCES, write_family
from tests.service.http.test_routes import client_of

pytestmark = pytest.mark.filterwarnings(
    "ignore"
)  # torch's tracer warns of what verification checks

QUERY = SENTENCES[0]
DOCUMENTS = [*SENTENCES, " ".join(SENTENCES), *(f"{text} {text}" for text in SENTENCES)]


def write_reranker(name: str, folder: Path) -> Path:
    """Write a small cross-encoder of a family, whose scores differ."""
    family = next(row for row in FAMILIES if row.name == name)
    with plain_functions():
        write_family(folder, family, labels=1)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    model.save_pretrained(folder)
    return folder


def scores_of(checkpoint: Path, queries: list[str], documents: list[str]) -> list[float]:
    """Return the scores of pairs as sentence-transformers computes them: one pair at a time."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint).float().eval()
    scores = []
    for query, document in zip(queries, documents, strict=True):
        pair = tokenizer(
            query, document, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        )
        with torch.no_grad():
            scores.append(float(model(**pair).logits[0, 0].sigmoid()))
    return scores


async def ask(client: httpx.AsyncClient, path: str, **body: Any) -> Any:
    response = await client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


@pytest.mark.parametrize("name", ["BERT", "RoBERTa", "XLM-RoBERTa"])
async def test_scores_are_those_of_transformers_in_every_format(name: str, tmp_path: Path) -> None:
    checkpoint = write_reranker(name, tmp_path / "checkpoint")
    export(str(checkpoint), tmp_path / "artifact", variants=["cpu-fp32"])
    expected = scores_of(checkpoint, [QUERY] * len(DOCUMENTS), DOCUMENTS)
    assert np.ptp(expected) > 0.1
    async with client_of(read_artifact(tmp_path / "artifact")) as (client, service):
        [model] = service_info(service)["models"].values()
        assert model["packs"]
        for path in ("/rerank", "/v1/rerank", "/v2/rerank"):
            results = (await ask(client, path, query=QUERY, documents=DOCUMENTS))["results"]
            ranked = [result["relevance_score"] for result in results]
            assert ranked == sorted(ranked, reverse=True)
            by_index = {result["index"]: result["relevance_score"] for result in results}
            assert by_index == pytest.approx(dict(enumerate(expected)), abs=1e-4)
        tei = await ask(client, "/rerank", query=QUERY, texts=DOCUMENTS)
        by_index = {result["index"]: result["score"] for result in tei}
        assert by_index == pytest.approx(dict(enumerate(expected)), abs=1e-4)
        for number, document in enumerate(DOCUMENTS):
            [alone] = (await ask(client, "/score", text_1=QUERY, text_2=document))["data"]
            assert alone["score"] == pytest.approx(expected[number], abs=1e-4)
        queries = DOCUMENTS[::-1]
        pairs = await ask(client, "/score", queries=queries, documents=DOCUMENTS)
        assert [item["score"] for item in pairs["data"]] == pytest.approx(
            scores_of(checkpoint, queries, DOCUMENTS), abs=1e-4
        )
