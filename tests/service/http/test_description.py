"""The description of the API: groups, examples, and the right addresses behind a proxy."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from jsonschema import Draft202012Validator

from command import BadUsage
from service.artifact import Artifact
from service.http.context import HttpContext
from service.http.routes import build_app
from service.settings import Settings, read_settings
from service.state import ServiceState
from tests.factories import write_artifact, write_tagger


@asynccontextmanager
async def client(artifact: Artifact, **settings: Any) -> AsyncIterator[httpx.AsyncClient]:
    service = ServiceState({"reviews": artifact}, Settings(warm_up_s=0, **settings))
    service.lifecycle.load()
    transport = httpx.ASGITransport(build_app(HttpContext(service)))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        yield http
    await service.lifecycle.drain()


async def test_a_root_path_is_accepted_and_left_out_and_the_description_names_it(
    artifact: Artifact,
) -> None:
    async with client(artifact, root_path="/nlp") as http:
        for path in ("/classify", "/nlp/classify", "/nlp/models/reviews"):
            key = "inputs" if "models" in path else "input"
            assert (await http.post(path, json={key: "good"})).status_code == 200, path
        assert (await http.get("/nlp/docs/files/swagger-ui.css")).status_code == 200
        assert (await http.get("/nlpx/docs")).status_code == 404
        for path in ("/openapi.json", "/nlp/openapi.json"):
            assert (await http.get(path)).json()["servers"] == [{"url": "/nlp"}]
        assert (await http.get("/nlp/")).json()["docs"] == "/nlp/docs"
        assert (await http.get("/nlp")).headers["location"] == "/nlp/"


async def test_a_forwarded_prefix_is_named_and_not_removed(artifact: Artifact) -> None:
    async with client(artifact) as http:
        described = await http.get("/openapi.json", headers={"X-Forwarded-Prefix": "/a/b"})
        assert described.json()["servers"] == [{"url": "/a/b"}]
        assert described.headers["vary"] == "x-forwarded-prefix"
        assert "servers" not in (await http.get("/openapi.json")).json()


@pytest.mark.parametrize(
    "prefix", ["a", "//evil.example", "/<script>", "/a/../b?", "/" + "a" * 500]
)
async def test_a_prefix_that_is_no_path_is_ignored(artifact: Artifact, prefix: str) -> None:
    async with client(artifact) as http:
        described = await http.get("/openapi.json", headers={"X-Forwarded-Prefix": prefix})
        assert "servers" not in described.json()


@pytest.mark.parametrize("path", ["nlp", "/nlp/", "//nlp", "/n lp"])
def test_a_root_path_that_is_no_path_is_refused(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRBERT_ROOT_PATH", path)
    with pytest.raises(BadUsage, match="DRBERT_ROOT_PATH"):
        read_settings()


async def test_the_description_groups_the_operations_and_explains_them(artifact: Artifact) -> None:
    async with client(artifact) as http:
        described = (await http.get("/openapi.json")).json()
    assert described["info"]["description"].startswith("Text classification")
    names = [tag["name"] for tag in described["tags"]]
    assert names == [
        "classification",
        "tokens",
        "reranking",
        "compatibility",
        "models",
        "health",
        "operation",
    ]
    assert next(iter(described["paths"])) == "/classify"
    for path, methods in described["paths"].items():
        for method, operation in methods.items():
            assert len(operation["tags"]) == 1, path
            assert operation["tags"][0] in names
            assert " " in operation["summary"], (method, path, operation["summary"])
    assert described["paths"]["/livez"]["get"]["tags"] == ["health"]
    assert described["paths"]["/v2/models/{model}/ready"]["get"]["tags"] == ["health"]


@pytest.mark.parametrize("dialect", ["native", "infinity", "semantic-router", "ort-server"])
async def test_every_example_of_the_description_fits_its_schema_and_can_be_sent(
    artifact: Artifact, tmp_path: Path, dialect: str
) -> None:
    reranker = write_artifact(tmp_path / "reranker", labels=("LABEL_0",), activation="sigmoid")
    async with (
        client(artifact, classify_dialect=dialect) as http,
        client(reranker, classify_dialect=dialect) as reranking,
        client(write_tagger(tmp_path / "tagger"), classify_dialect=dialect) as tagging,
    ):
        clients = {"reranking": reranking, "tokens": tagging}
        described = (await http.get("/openapi.json")).json()
        schemas = described["components"]["schemas"]
        for name, schema in schemas.items():
            if "example" in schema:
                validator = Draft202012Validator(
                    {"$ref": f"#/components/schemas/{name}"} | described
                )
                validator.validate(schema["example"])
        for path, methods in described["paths"].items():
            if "post" not in methods:
                continue
            operation = methods["post"]
            schema = operation["requestBody"]["content"]["application/json"]["schema"]
            to = clients.get(operation["tags"][0], http)
            for each in schema.get("anyOf", [schema]):
                example = schemas[each["$ref"].rpartition("/")[2]]["example"]
                filled = path.replace("{model}", "reviews").replace("{version}", "1")
                assert (await to.post(filled, json=example)).status_code == 200, path
