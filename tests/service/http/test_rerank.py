"""A model with one label sorts documents, in the formats of TEI, Jina, Cohere and vLLM."""

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
from tests.service.test_overload import as_slow_as

QUERY = "film"
DOCUMENTS = ["good", "bad", "bad bad"]
"""The logit of the toy model is the number of times that `bad` occurs."""
SCORES = [1 / (1 + exp(-logit)) for logit in (0, 1, 2)]


@pytest.fixture
def reranker(tmp_path: Path) -> Artifact:
    return write_artifact(tmp_path / "reranker", labels=("LABEL_0",), activation="sigmoid")


@pytest.fixture
async def client(reranker: Artifact) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(reranker) as (client, _):
        yield client


async def answer(client: httpx.AsyncClient, path: str, **body: Any) -> Any:
    response = await client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


async def refusal(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> dict[str, Any]:
    response = await client.post(path, json=body)
    assert response.status_code == 422, response.text
    error: dict[str, Any] = response.json()["error"]
    return error


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank"])
async def test_documents_come_best_first(client: httpx.AsyncClient, path: str) -> None:
    found = await answer(client, path, query=QUERY, documents=DOCUMENTS, model="reranker")
    assert [item["index"] for item in found["results"]] == [2, 1, 0]
    assert [item["relevance_score"] for item in found["results"]] == pytest.approx(SCORES[::-1])
    assert found["model"] == "reranker"
    assert found["usage"]["total_tokens"] == 3 * 4 + 4  # [CLS] film [SEP] … [SEP]
    returned = [item.get("document") for item in found["results"]]
    expected = [{"text": text} for text in DOCUMENTS[::-1]]
    assert returned == ([None] * 3 if path == "/v2/rerank" else expected)


async def test_only_the_best_documents_are_returned_if_asked(client: httpx.AsyncClient) -> None:
    found = await answer(
        client, "/v2/rerank", query=QUERY, documents=DOCUMENTS, top_n=1, return_documents=True
    )
    [best] = found["results"]
    assert best["index"] == 2
    assert best["document"] == {"text": "bad bad"}
    for count in (9, 0, None):  # 0 is vLLM's default, which its clients send
        every = await answer(client, "/v1/rerank", query=QUERY, documents=DOCUMENTS, top_n=count)
        assert len(every["results"]) == 3


async def test_documents_may_be_objects_and_scores_logits(client: httpx.AsyncClient) -> None:
    documents = [{"text": "bad", "title": "ignored"}, "good"]
    found = await answer(
        client,
        "/rerank",
        query=QUERY,
        documents=documents,
        raw_scores=True,
        return_documents=False,
    )
    assert found["results"] == [
        {"index": 0, "relevance_score": 1.0},
        {"index": 1, "relevance_score": 0.0},
    ]


async def test_cohere_cuts_each_document_to_so_many_tokens(client: httpx.AsyncClient) -> None:
    documents = ["a bad bad bad", "good", "bad"]
    whole = await answer(client, "/v2/rerank", query=QUERY, documents=documents, raw_scores=True)
    cut = await answer(
        client,
        "/v2/rerank",
        query=QUERY,
        documents=documents,
        raw_scores=True,
        max_tokens_per_doc=2,
    )
    assert [item["relevance_score"] for item in whole["results"]] == [3.0, 1.0, 0.0]
    assert [item["relevance_score"] for item in cut["results"]] == [1.0, 1.0, 0.0]
    assert [item["index"] for item in cut["results"]] == [0, 2, 1]
    assert cut["usage"]["total_tokens"] == whole["usage"]["total_tokens"] - 2


async def test_punctuation_counts_as_a_token(tmp_path: Path) -> None:
    artifact = write_artifact(tmp_path / "reranker", labels=("LABEL_0",), activation="sigmoid")
    async with client_of(artifact) as (client, _):
        found = await answer(
            client, "/v2/rerank", query=QUERY, documents=["bad, bad"], max_tokens_per_doc=1
        )
    assert found["usage"]["total_tokens"] == 5  # [CLS] film [SEP] bad [SEP]


async def test_equal_documents_keep_their_order(client: httpx.AsyncClient) -> None:
    found = await answer(client, "/rerank", query=QUERY, documents=["good", "a", "b", "good"])
    assert [item["index"] for item in found["results"]] == [0, 1, 2, 3]


async def test_teis_request_is_answered_in_its_format(client: httpx.AsyncClient) -> None:
    response = await client.post("/rerank", json={"query": QUERY, "texts": DOCUMENTS})
    found = response.json()
    assert [item["index"] for item in found] == [2, 1, 0]
    assert [item["score"] for item in found] == pytest.approx(SCORES[::-1])
    assert "text" not in found[0]
    assert response.headers["x-compute-tokens"] == "16"
    found = await answer(
        client, "/rerank", query=QUERY, texts=DOCUMENTS, return_text=True, raw_scores=True
    )
    assert found[0] == {"index": 2, "score": 2.0, "text": "bad bad"}


async def test_errors_have_teis_form_where_the_service_speaks_teis_dialect(
    reranker: Artifact,
) -> None:
    async with client_of(reranker, root_dialect="tei") as (client, _):
        for body in ({"query": QUERY, "texts": []}, {"query": QUERY, "documents": []}):
            response = await client.post("/rerank", json=body)
            assert response.status_code == 422
            error = response.json()
            assert error["error_type"] == "Validation"
            assert "must be a list of at least one text" in error["error"]
        broken = await client.post("/rerank", content=b"{")
        assert broken.json()["error_type"] == "Validation"
        other = await client.post("/v1/rerank", json={"query": QUERY, "documents": []})
        assert other.json()["error"]["param"] == "documents"


@pytest.mark.parametrize("path", ["/score", "/v1/score"])
@pytest.mark.parametrize("names", [("queries", "documents"), ("text_1", "text_2")])
async def test_one_text_is_scored_with_each_of_a_list(
    client: httpx.AsyncClient, path: str, names: tuple[str, str]
) -> None:
    found = await answer(client, path, **dict(zip(names, (QUERY, DOCUMENTS), strict=True)))
    assert found["object"] == "list"
    assert [item["score"] for item in found["data"]] == pytest.approx(SCORES)
    assert found["data"][1] | {"score": 0} == {"index": 1, "object": "score", "score": 0}


async def test_two_lists_are_scored_text_by_text(client: httpx.AsyncClient) -> None:
    found = await answer(
        client, "/score", queries=["bad", "good"], documents=["bad", "good"], raw_scores=True
    )
    assert [item["score"] for item in found["data"]] == [2.0, 0.0]
    [one] = (await answer(client, "/score", queries="bad", documents="good"))["data"]
    assert one["score"] == pytest.approx(SCORES[1])


@pytest.mark.parametrize(
    ("path", "body", "param", "words"),
    [
        ("/rerank", {"documents": ["a"]}, "query", "query must be a text"),
        ("/rerank", {"query": " ", "documents": ["a"]}, "query", "query is empty"),
        ("/rerank", {"query": "a"}, "documents", "a list of at least one text"),
        ("/rerank", {"query": "a", "documents": []}, "documents", "at least one text"),
        ("/rerank", {"query": "a", "documents": ["a", ""]}, "documents[1]", "is empty"),
        ("/rerank", {"query": "a", "documents": [{"txt": "a"}]}, "documents[0].text", "a text"),
        ("/rerank", {"query": "a", "documents": ["a"], "top_n": -1}, "top_n", "at least 0"),
        ("/rerank", {"query": "a", "documents": ["a"], "top_n": True}, "top_n", "at least 0"),
        ("/rerank", {"query": "a", "documents": ["a"], "priority": 1}, "priority", "equal to 0"),
        (
            "/v2/rerank",
            {"query": "a", "documents": ["a"], "max_tokens_per_doc": 0},
            "max_tokens_per_doc",
            "at least 1",
        ),
        ("/v1/rerank", {"query": "a", "texts": ["a"]}, "texts", "texts"),
        ("/score", {"queries": ["a", "b"], "documents": ["a"]}, "queries", "as many as"),
        ("/score", {"queries": "a", "documents": []}, "documents", "at least one text"),
        ("/score", {"documents": "a"}, "queries", "queries"),
    ],
)
async def test_a_wrong_request_is_refused_with_the_field(
    client: httpx.AsyncClient, path: str, body: dict[str, Any], param: str, words: str
) -> None:
    error = await refusal(client, path, body)
    assert error["param"] == param
    assert words in error["message"]


async def test_a_model_that_is_no_reranker_is_refused_with_the_reason(artifact: Artifact) -> None:
    async with client_of(artifact) as (client, _):
        for path in ("/rerank", "/v2/rerank"):
            error = await refusal(client, path, {"query": "a", "documents": ["a"]})
            assert "The model has 2 labels, and a reranker has one" in error["message"]
        error = await refusal(client, "/score", {"queries": "a", "documents": "a"})
        assert error["param"] == "model"


async def test_fields_that_vllms_other_paths_take_are_taken_here_too(
    client: httpx.AsyncClient,
) -> None:
    fields = {"use_activation": False, "priority": 0, "truncation_side": "left"}
    ranked = await answer(client, "/v1/rerank", query=QUERY, documents=DOCUMENTS, **fields)
    assert [item["relevance_score"] for item in ranked["results"]] == [2.0, 1.0, 0.0]
    scored = await answer(client, "/score", text_1=QUERY, text_2=DOCUMENTS, **fields)
    assert [item["score"] for item in scored["data"]] == [0.0, 1.0, 2.0]


@pytest.mark.parametrize(
    ("path", "query", "documents"),
    [
        ("/rerank", "query", "documents"),
        ("/rerank", "query", "texts"),
        ("/score", "queries", "documents"),
    ],
)
async def test_long_texts_are_refused_by_their_names(
    reranker: Artifact, path: str, query: str, documents: str
) -> None:
    async with client_of(reranker, max_text_chars=100, max_body_bytes=1_000) as (client, _):

        async def refused(first: str, others: list[str]) -> dict[str, Any]:
            response = await client.post(path, json={query: first, documents: others})
            assert response.status_code == 413, response.text
            error: dict[str, Any] = response.json()["error"]
            return error

        error = await refused("a" * 101, ["a"])
        assert (error["param"], "has 101 characters" in error["message"]) == (query, True)
        error = await refused("a", ["a", "a" * 101])
        assert error["param"] == f"{documents}[1]"
        # One query is in the body once, and in each of its pairs.
        error = await refused("a" * 100, ["a"] * 20)
        assert error["param"] == query
        assert "make pairs of 2020 characters together, the limit is 1000" in error["message"]


async def test_limits_of_time_count_documents(reranker: Artifact) -> None:
    async with client_of(reranker) as (client, service):
        as_slow_as(service, 0.1)
        body = {"query": "a", "documents": ["a"] * 1_000}
        response = await client.post("/rerank", json=body, headers={"X-Request-Timeout-Ms": "1000"})
    assert response.status_code == 413, response.text
    message = response.json()["error"]["message"]
    assert "The 1000 documents have about" in message
    assert "such documents a request" in message


async def test_a_thousand_documents_are_ranked(client: httpx.AsyncClient) -> None:
    documents = [" ".join(["bad"] * (number % 5) or ["good"]) for number in range(1_000)]
    found = await answer(client, "/v2/rerank", query=QUERY, documents=documents, raw_scores=True)
    scores = [item["relevance_score"] for item in found["results"]]
    assert scores == sorted((float(number % 5) for number in range(1_000)), reverse=True)
    assert sorted(item["index"] for item in found["results"]) == list(range(1_000))


async def test_too_many_documents_are_refused_by_their_name(reranker: Artifact) -> None:
    async with client_of(reranker, max_texts=2) as (client, _):
        response = await client.post("/rerank", json={"query": "a", "documents": ["a"] * 3})
    assert response.status_code == 413
    assert "documents" in response.json()["error"]["message"]
