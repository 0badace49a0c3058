"""Models are loaded, reloaded and unloaded while others are asked, and nothing is lost."""

from __future__ import annotations

import asyncio
import json
import shutil
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from command import BadUsage
from service.admin import build_admin
from service.artifact import Artifact
from service.keys import Keys
from service.models import Models
from service.routes import build_app
from service.settings import Settings, read_settings
from tests.service.test_routes import classify, stuck, until
from tests.service.test_server import free_port, serving
from tests.worlds import write_artifact


@asynccontextmanager
async def both_ports(artifact: Artifact, keys: Keys | None = None) -> AsyncIterator[tuple[httpx.AsyncClient, httpx.AsyncClient, Models]]:
    models = Models({"reviews": artifact}, Settings(warm_up_s=0))
    models.load()
    public, private = [httpx.ASGITransport(app) for app in (build_app(models), build_admin(models, keys))]
    async with httpx.AsyncClient(transport=public, base_url="http://test") as client, httpx.AsyncClient(transport=private, base_url="http://admin") as admin:
        yield client, admin, models
    await models.drain()


@pytest.fixture
def other(tmp_path: Path) -> Artifact:
    """Another artifact, whose labels are called otherwise."""
    return write_artifact(tmp_path / "other", name="reviews", labels=["BAD", "GOOD"])


async def label(client: httpx.AsyncClient, model: str | None = None) -> str:
    answer: dict[str, Any] = (await classify(client, {"input": "good"} | ({"model": model} if model else {}))).json()
    return str(answer["data"][0]["label"])


async def test_a_model_is_replaced_while_its_last_requests_are_answered_by_the_old_one(artifact: Artifact, other: Artifact) -> None:
    async with both_ports(artifact) as (client, admin, models):
        old = models.loaded["reviews"]
        async with stuck(models):
            first = asyncio.create_task(label(client))
            await until(lambda: old.users == 1 and models.batcher.waiting == 0)
            second = asyncio.create_task(label(client))
            await until(lambda: models.batcher.waiting == 1)
            changed = (await admin.post("/models/reviews", json={"artifact": str(other.directory)})).json()
            third = asyncio.create_task(label(client))
            await until(lambda: models.batcher.waiting == 2)
            assert old.key in models.batcher.models    # it is still needed
        assert [await first, await second, await third] == ["POSITIVE", "POSITIVE", "GOOD"]
        await until(lambda: old.key not in models.batcher.models)
        assert changed["replaced"] == artifact.digest
        assert changed["digest"] == other.digest == models.info()["models"]["reviews"]["digest"]
        told = models.metrics.registry.get_sample_value
        facts = {"model": "reviews", "digest": other.digest, "encoder_digest": "e" * 64, "runtime": "openvino", "variant": "cpu-fp32"}
        assert told("drbert_model_info", facts) == 1


async def test_requests_go_on_while_models_come_and_go(artifact: Artifact, other: Artifact) -> None:
    async with both_ports(artifact) as (client, admin, models):
        seen: list[int] = []
        stop = False

        async def ask() -> None:
            while not stop:
                seen.append((await classify(client, {"input": ["good", "bad film"]})).status_code)

        asking = [asyncio.create_task(ask()) for _ in range(8)]
        for folder in (other.directory, artifact.directory, other.directory):
            assert (await admin.post("/models/reviews", json={"artifact": str(folder)})).status_code == 200
            assert (await admin.post("/models/second", json={"artifact": str(folder)})).status_code == 200
            assert (await admin.delete("/models/second")).status_code == 200
        stop = True
        await asyncio.gather(*asking)
        await until(lambda: len(models.batcher.models) == 1)
    assert set(seen) == {200}
    assert len(seen) >= 8


async def test_a_folder_that_changed_is_loaded_again_by_its_name_alone(artifact: Artifact, other: Artifact) -> None:
    async with both_ports(artifact) as (client, admin, _):
        shutil.rmtree(artifact.directory)
        shutil.copytree(other.directory, artifact.directory)
        assert await label(client) == "POSITIVE"
        assert (await admin.post("/models/reviews", json={})).status_code == 200
        assert await label(client) == "GOOD"


@pytest.mark.parametrize(("name", "body", "message"), [
    ("reviews", {"artifact": "/nowhere"}, "/nowhere"),
    ("reviews", {"digest": "0" * 64}, "was asked for"),
    ("second", {}, "artifact is missing: there is no model of that name to load again."),
])
async def test_what_cannot_be_loaded_leaves_everything_as_it_was(artifact: Artifact, name: str, body: dict[str, str], message: str) -> None:
    async with both_ports(artifact) as (client, admin, models):
        before = models.loaded
        refused = await admin.post(f"/models/{name}", json=body)
        assert models.loaded is before
        assert await label(client) == "POSITIVE"
    assert refused.status_code == 422
    assert message in refused.json()["error"]["message"]


async def test_a_changed_file_is_not_loaded(artifact: Artifact, other: Artifact) -> None:
    (other.directory / "model.onnx").write_bytes(b"something else")
    async with both_ports(artifact) as (client, admin, _):
        refused = await admin.post("/models/reviews", json={"artifact": str(other.directory)})
        assert await label(client) == "POSITIVE"
    assert refused.status_code == 422
    assert "model.onnx" in refused.json()["error"]["message"]


@pytest.mark.parametrize("changes", [{"files_as": {"tokenizer.json": "{}"}}, {"inputs": ["input_ids", "attention_mask", "colour"]}])
async def test_an_artifact_of_right_digests_that_is_no_model_is_refused_with_the_reason(
    tmp_path: Path, artifact: Artifact, changes: dict[str, Any], caplog: pytest.LogCaptureFixture,
) -> None:
    folder = write_artifact(tmp_path / "broken", **changes).directory
    async with both_ports(artifact) as (client, admin, models):
        before = models.loaded
        refused = await admin.post("/models/reviews", json={"artifact": str(folder)})
        assert models.loaded is before
        assert await label(client) == "POSITIVE"
    assert refused.status_code == 422
    error = refused.json()["error"]
    assert error["param"] == "artifact"
    assert str(folder) in error["message"]
    assert any(record.exc_info for record in caplog.records)


async def test_an_unloaded_model_is_unknown_and_leaves_no_series(artifact: Artifact, other: Artifact) -> None:
    async with both_ports(artifact) as (client, admin, models):
        await admin.post("/models/second", json={"artifact": str(other.directory)})
        assert await label(client, "second") == "GOOD"
        await admin.delete("/models/second")
        await until(lambda: len(models.batcher.models) == 1)
        gone = await classify(client, {"input": "good", "model": "second"})
        page = (await client.get("/metrics")).text
        last = await admin.delete("/models/reviews")
        unknown = await admin.delete("/models/second")
    assert gone.status_code == 404
    assert 'model="second"' not in page
    assert last.status_code == 422
    assert last.json()["error"]["message"] == "reviews is the only model; load another one first."
    assert unknown.status_code == 404


async def test_changes_take_a_key_where_there_are_keys(artifact: Artifact, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("secret\n")
    async with both_ports(artifact, Keys(tmp_path / "keys")) as (_, admin, _):
        assert (await admin.post("/models/reviews", json={})).status_code == 401
        assert (await admin.get("/metrics")).status_code == 200
        assert (await admin.post("/models/reviews", json={}, headers={"X-API-Key": "secret"})).status_code == 200


def test_the_private_port_is_only_where_it_was_asked_for(artifact: Artifact) -> None:
    port = free_port()
    with serving(artifact, DRBERT_ADMIN_PORT=str(port), DRBERT_METRICS="admin") as (url, _):
        request = urllib.request.Request(f"http://127.0.0.1:{port}/models/reviews", b"{}", {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as response:
            assert json.load(response)["model"] == "reviews"
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as response:
            assert b"drbert_ready 1.0" in response.read()
        for path, method in (("/metrics", "GET"), ("/models/reviews", "DELETE")):
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(urllib.request.Request(url + path, method=method), timeout=10)
            assert refused.value.code in (404, 405)
            refused.value.close()


@pytest.mark.parametrize(("variables", "message"), [
    ({"ADMIN_PORT": "8001", "ADMIN_HOST": "0.0.0.0"}, "DRBERT_ADMIN_HOST=0.0.0.0 lets others load models"),
    ({"METRICS": "admin"}, "DRBERT_METRICS=admin needs DRBERT_ADMIN_PORT"),
    ({"TLS_CERTIFICATE": "a.pem"}, "DRBERT_TLS_CERTIFICATE and DRBERT_TLS_KEY go together"),
])
def test_settings_that_do_not_go_together_are_refused(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(f"DRBERT_{name}", value)
    with pytest.raises(BadUsage, match=message):
        read_settings()
