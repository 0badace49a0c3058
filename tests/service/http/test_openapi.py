"""Real requests, answers and errors match the schemas of the API's description."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from jsonschema import Draft202012Validator

from service.artifact import Artifact
from service.http.context import HttpContext, RequestHooks
from service.http.keys import Keys
from service.http.routes import build_app
from service.settings import Settings
from service.state import ServiceState
from tests.factories import write_artifact, write_tagger
from tests.service.http.test_routes import client_of

TENSOR = {"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": ["good"]}]}
REQUESTS: dict[str, dict[str, Any]] = {
    "/classify": {"input": ["good", {"text": "good", "text_pair": "bad"}], "top_k": 1},
    "/v1/classify": {"input": "good", "truncate_prompt_tokens": 3, "probs": False},
    "/predict": {"inputs": [["good"], ["good", "bad"]]},
    "/": {
        "inputs": ["good"],
        "parameters": {
            "truncation": True,
            "padding": "longest",
            "function_to_apply": None,
            "max_length": 8,
        },
    },
    "/rerank": {"query": "good", "documents": ["bad", {"text": "a"}], "model": "reranker"},
    "/v1/rerank": {"query": "good", "documents": ["bad"], "top_n": 1, "model": "reranker"},
    "/v2/rerank": {"query": "good", "documents": ["bad"], "model": "reranker"},
    "/score": {"queries": "good", "documents": ["bad", "a"], "model": "reranker"},
    "/v1/score": {"queries": ["good"], "documents": "bad", "model": "reranker"},
    "/tokens": {"input": ["good film"], "model": "tagger", "window": {"stride": 2}},
    "/v1/tokens": {"input": "good", "model": "tagger", "aggregation": "none"},
    "/pooling": {"input": "good", "model": "tagger", "task": "token_classify"},
    "/models/{model}": {"inputs": "good"},
    "/v1/models/{model}:predict": {"instances": ["good"], "parameters": {"activation": "none"}},
    "/v2/models/{model}/infer": TENSOR,
    "/v2/models/{model}/versions/{version}/infer": TENSOR | {"model_version": "1"},
}
OTHERS_CLASSIFY: dict[str, dict[str, Any]] = {
    "infinity": {"input": ["good"], "raw_scores": True},
    "semantic-router": {"inputs": "good"},
    "ort-server": {"text": "good", "top_k": 1},
}
"""Requests to /classify in the dialects that a setting chooses."""
REFUSED: list[dict[str, Any]] = [{}, {"inputs": 3}, {"input": []}, {"unknown": True}]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"classify_dialect": "infinity", "root_dialect": "tei"},
        {"classify_dialect": "semantic-router"},
        {"classify_dialect": "ort-server"},
    ],
    ids=["by default", "with other dialects", "for a semantic router", "as ort-server"],
)
async def test_requests_answers_and_errors_match_their_schemas(
    artifact: Artifact, tmp_path: Path, settings: dict[str, Any]
) -> None:
    reranker = write_artifact(tmp_path / "reranker", labels=("LABEL_0",), activation="sigmoid")
    requests = dict(REQUESTS)
    if settings.get("root_dialect") == "tei":
        requests["/"] = {"inputs": ["good", "bad"], "truncation_direction": "Left"}
    if "classify_dialect" in settings:
        requests["/classify"] = OTHERS_CLASSIFY[settings["classify_dialect"]]
    tagger = write_tagger(tmp_path / "tagger")
    async with client_of(artifact, reranker, tagger, **settings) as (client, _):
        described = (await client.get("/openapi.json")).json()
        assert requests.keys() == {
            path for path, methods in described["paths"].items() if "post" in methods
        }
        for path, body in requests.items():
            operation = described["paths"][path]["post"]
            check(described, operation["requestBody"], body)
            for sent, statuses in ((body, {200}), *((refused, {400, 422}) for refused in REFUSED)):
                answer = await client.post(path.format(model="reviews", version="1"), json=sent)
                assert answer.status_code in statuses
                check(described, operation["responses"][str(answer.status_code)], answer.json())


async def test_every_json_answer_of_every_path_has_a_schema(artifact: Artifact) -> None:
    async with client_of(artifact) as (client, _):
        described = (await client.get("/openapi.json")).json()
    referenced = set(re.findall(r"#/components/schemas/(\w+)", str(described)))
    assert referenced == described["components"]["schemas"].keys()
    for methods in described["paths"].values():
        for operation in methods.values():
            assert all(
                "schema" in content
                for response in operation["responses"].values()
                for content in response.get("content", {}).values()
            )
            assert all(
                "application/json" in response["content"]
                for status, response in operation["responses"].items()
                if int(status) >= 400
            )


async def test_errors_of_other_paths_match_their_schemas(artifact: Artifact) -> None:
    async with client_of(artifact, load=False) as (client, _):
        described = (await client.get("/openapi.json")).json()
        for path in (
            "/readyz",
            "/health",
            "/v2/health/ready",
            "/v2/models/{model}",
            "/v2/models/{model}/ready",
            "/v1/models/{model}",
        ):
            answer = await client.get(path.format(model="nobody"))
            assert answer.status_code in (404, 503)
            check(
                described,
                described["paths"][path]["get"]["responses"][str(answer.status_code)],
                answer.json(),
            )


async def test_api_keys_are_described_if_there_are_any(artifact: Artifact, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("first-key\n")
    service = ServiceState({"reviews": artifact}, Settings(warm_up_s=0))
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(
            build_app(HttpContext(service, RequestHooks(keys=Keys(tmp_path / "keys"))))
        ),
        base_url="http://test",
    ) as client:
        keyed = (await client.get("/openapi.json")).json()
    async with client_of(artifact) as (client, _):
        open_to_all = (await client.get("/openapi.json")).json()
    assert {scheme["type"] for scheme in keyed["components"]["securitySchemes"].values()} == {
        "http",
        "apiKey",
    }
    assert all("security" in keyed["paths"][path]["post"] for path in REQUESTS)
    assert "security" in keyed["paths"]["/info"]["get"]
    assert "security" not in keyed["paths"]["/livez"]["get"]
    assert "security" not in keyed["paths"]["/"]["get"]
    assert "securitySchemes" not in open_to_all["components"]


def check(described: dict[str, Any], of: dict[str, Any], value: object) -> None:
    """Raises unless `value` keeps the schema that a request or a response has in the
    description.
    """
    schema = of["content"]["application/json"]["schema"]
    Draft202012Validator({"components": described["components"], **schema}).validate(value)
