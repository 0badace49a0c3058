"""Models are loaded, reloaded and unloaded without losing a request."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import socket
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from command import BadInput, BadUsage
from service.artifact import Artifact, read_artifact
from service.checkpoints import cache
from service.http.admin import build_admin
from service.http.context import HttpContext
from service.http.info import service_info
from service.http.keys import Keys
from service.http.load_jobs import MAX_ABANDONED
from service.http.routes import build_app
from service.loading import engine
from service.runtimes import auto
from service.settings import Settings, read_settings
from service.state import ServiceState
from tests.factories import write_artifact, write_tokenizer
from tests.service.http.test_routes import classify, stuck, until
from tests.service.test_artifact import KINDS, put
from tests.service.test_server import free_port, serving


@asynccontextmanager
async def both_ports(
    artifact: Artifact, keys: Keys | None = None, **settings: Any
) -> AsyncIterator[tuple[httpx.AsyncClient, httpx.AsyncClient, ServiceState]]:
    service = ServiceState({"reviews": artifact}, Settings(warm_up_s=0, **settings))
    service.lifecycle.load()
    public, private = [
        httpx.ASGITransport(app)
        for app in (build_app(HttpContext(service)), build_admin(HttpContext(service), keys))
    ]
    async with (
        httpx.AsyncClient(transport=public, base_url="http://test") as client,
        httpx.AsyncClient(transport=private, base_url="http://127.0.0.1:8001") as admin,
    ):
        yield client, admin, service
    await service.lifecycle.drain()


@pytest.fixture
def other(tmp_path: Path) -> Artifact:
    """An artifact with other labels than the first one's."""
    return write_artifact(tmp_path / "other", name="reviews", labels=["BAD", "GOOD"])


async def label(client: httpx.AsyncClient, model: str | None = None) -> str:
    answer: dict[str, Any] = (
        await classify(client, {"input": "good"} | ({"model": model} if model else {}))
    ).json()
    return str(answer["data"][0]["label"])


async def test_a_replaced_model_still_answers_its_accepted_requests(
    artifact: Artifact, other: Artifact
) -> None:
    async with both_ports(artifact) as (client, admin, service):
        old = service.registry.loaded["reviews"]
        async with stuck(service):
            first = asyncio.create_task(label(client))
            await until(lambda: old.users == 1 and service.batcher.waiting == 0)
            second = asyncio.create_task(label(client))
            await until(lambda: service.batcher.waiting == 1)
            changed = (
                await admin.post("/models/reviews", json={"artifact": str(other.directory)})
            ).json()
            third = asyncio.create_task(label(client))
            await until(lambda: service.batcher.waiting == 2)
            assert old.key in service.batcher.models  # it is still needed
        assert [await first, await second, await third] == ["POSITIVE", "POSITIVE", "GOOD"]
        await until(lambda: old.key not in service.batcher.models)
        assert changed["replaced"] == artifact.digest
        assert (
            changed["digest"]
            == other.digest
            == service_info(service)["models"]["reviews"]["digest"]
        )
        sample_value = service.metrics.registry.get_sample_value
        facts = {
            "model": "reviews",
            "digest": other.digest,
            "encoder_digest": "e" * 64,
            "runtime": "openvino",
            "variant": "cpu-fp32",
        }
        assert sample_value("drbert_model_info", facts) == 1


async def test_no_request_is_lost_while_models_are_loaded_and_unloaded(
    artifact: Artifact, other: Artifact
) -> None:
    async with both_ports(artifact) as (client, admin, service):
        statuses: list[int] = []
        stop = False

        async def ask() -> None:
            while not stop:
                statuses.append(
                    (await classify(client, {"input": ["good", "bad film"]})).status_code
                )

        asking = [asyncio.create_task(ask()) for _ in range(8)]
        for folder in (other.directory, artifact.directory, other.directory):
            assert (
                await admin.post("/models/reviews", json={"artifact": str(folder)})
            ).status_code == 200
            assert (
                await admin.post("/models/second", json={"artifact": str(folder)})
            ).status_code == 200
            assert (await admin.delete("/models/second")).status_code == 200
        stop = True
        await asyncio.gather(*asking)
        await until(lambda: len(service.batcher.models) == 1)
    assert set(statuses) == {200}
    assert len(statuses) >= 8


async def test_a_changed_folder_is_reloaded_by_the_models_name(
    artifact: Artifact, other: Artifact
) -> None:
    async with both_ports(artifact) as (client, admin, _):
        shutil.rmtree(artifact.directory)
        shutil.copytree(other.directory, artifact.directory)
        assert await label(client) == "POSITIVE"
        assert (await admin.post("/models/reviews", json={})).status_code == 200
        assert await label(client) == "GOOD"


@pytest.mark.parametrize(
    ("name", "body", "message"),
    [
        ("reviews", {"artifact": "/nowhere"}, "/nowhere"),
        ("reviews", {"digest": "0" * 64}, "the request names 0000"),
        ("second", {}, "artifact is missing: there is no model of that name to load again."),
    ],
)
async def test_a_failed_load_changes_nothing(
    artifact: Artifact, name: str, body: dict[str, str], message: str
) -> None:
    async with both_ports(artifact) as (client, admin, service):
        before = service.registry.loaded
        refused = await admin.post(f"/models/{name}", json=body)
        assert service.registry.loaded is before
        assert await label(client) == "POSITIVE"
    assert refused.status_code == 422
    assert message in refused.json()["error"]["message"]


async def test_an_artifact_with_a_modified_file_is_not_loaded(
    artifact: Artifact, other: Artifact
) -> None:
    (other.directory / "model.onnx").write_bytes(b"something else")
    async with both_ports(artifact) as (client, admin, _):
        refused = await admin.post("/models/reviews", json={"artifact": str(other.directory)})
        assert await label(client) == "POSITIVE"
    assert refused.status_code == 422
    assert "model.onnx" in refused.json()["error"]["message"]


@pytest.mark.parametrize(
    "changes",
    [{"files_as": {"tokenizer.json": "{}"}}, {"inputs": ["input_ids", "attention_mask", "colour"]}],
)
async def test_an_artifact_with_correct_digests_but_no_model_is_refused_with_the_reason(
    tmp_path: Path,
    artifact: Artifact,
    changes: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = write_artifact(tmp_path / "broken", **changes).directory
    async with both_ports(artifact) as (client, admin, service):
        before = service.registry.loaded
        refused = await admin.post("/models/reviews", json={"artifact": str(folder)})
        assert service.registry.loaded is before
        assert await label(client) == "POSITIVE"
    assert refused.status_code == 422
    error = refused.json()["error"]
    assert error["param"] == "artifact"
    assert str(folder) in error["message"]
    assert any(record.exc_info for record in caplog.records)


async def test_an_unloaded_model_is_unknown_and_has_no_metrics(
    artifact: Artifact, other: Artifact
) -> None:
    async with both_ports(artifact) as (client, admin, service):
        await admin.post("/models/second", json={"artifact": str(other.directory)})
        assert await label(client, "second") == "GOOD"
        await admin.delete("/models/second")
        await until(lambda: len(service.batcher.models) == 1)
        gone = await classify(client, {"input": "good", "model": "second"})
        page = (await client.get("/metrics")).text
        last = await admin.delete("/models/reviews")
        unknown = await admin.delete("/models/second")
    assert gone.status_code == 404
    assert 'model="second"' not in page
    assert last.status_code == 422
    assert last.json()["error"]["message"] == "reviews is the only model; load another one first."
    assert unknown.status_code == 404


async def test_changes_need_a_key_if_there_are_keys(artifact: Artifact, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("secret\n")
    async with both_ports(artifact, Keys(tmp_path / "keys")) as (_, admin, _):
        assert (await admin.post("/models/reviews", json={})).status_code == 401
        assert (await admin.get("/metrics")).status_code == 200
        assert (
            await admin.post("/models/reviews", json={}, headers={"X-API-Key": "secret"})
        ).status_code == 200


async def test_after_the_default_model_is_unloaded_no_other_model_takes_its_requests(
    artifact: Artifact, other: Artifact
) -> None:
    unnamed: list[tuple[str, dict[str, Any]]] = [
        ("/classify", {"input": "good"}),
        ("/v1/classify", {"input": "good"}),
        ("/predict", {"inputs": "good"}),
        ("/", {"inputs": "good"}),
    ]
    async with both_ports(artifact) as (client, admin, service):
        await admin.post("/models/second", json={"artifact": str(other.directory)})
        deleted = (await admin.delete("/models/reviews")).json()
        assert deleted["default"] is False
        for path, body in unnamed:
            refused = await client.post(path, json=body)
            assert refused.status_code == 404
            assert "The default model is not loaded any more; name one of second." in refused.text
        assert service_info(service)["default_model"] is None
        assert await label(client, "second") == "GOOD"

        chosen = (await admin.post("/models/second", json={"default": True})).json()
        assert (chosen["default"], chosen["digest"]) == (True, other.digest)
        assert service_info(service)["default_model"] == "second"
        for path, body in unnamed:
            assert "GOOD" in (await client.post(path, json=body)).text

        loaded = (
            await admin.post(
                "/models/reviews", json={"artifact": str(artifact.directory), "default": True}
            )
        ).json()
        assert loaded["default"] is True
        assert await label(client) == "POSITIVE"
        assert (await admin.post("/models/third", json={"default": True})).status_code == 404


async def test_a_model_reloaded_under_the_default_name_is_the_default(
    artifact: Artifact, other: Artifact
) -> None:
    async with both_ports(artifact) as (client, admin, _):
        await admin.post("/models/second", json={"artifact": str(other.directory)})
        await admin.delete("/models/reviews")
        assert (
            await admin.post("/models/reviews", json={"artifact": str(artifact.directory)})
        ).json()["default"] is True
        assert await label(client) == "POSITIVE"


PATHS = [
    "a" * 5000,
    "a/" * 2000,
    "a\0b",
    "\ud800",
    "",
    ".",
    "/",
    "/dev/zero",
    "/dev/full",
    "/proc/self/mem",
    "/proc/self/fd",
    "~root",
    "file:///tmp",
    "http://a/b",
]


@pytest.mark.parametrize("path", PATHS)
async def test_an_unusable_artifact_path_is_422(artifact: Artifact, path: str) -> None:
    async with both_ports(artifact) as (client, admin, _):
        refused = await admin.post(
            "/models/reviews",
            content=json.dumps({"artifact": path}),
            headers={"content-type": "application/json"},
        )
        assert await label(client) == "POSITIVE"
    assert refused.status_code == 422, refused.text
    assert len(refused.text) < 2000


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["manifest.json", "model.onnx", "tokenizer.json"])
async def test_an_unusable_kind_of_file_in_an_artifact_is_422(
    artifact: Artifact, other: Artifact, name: str, kind: str
) -> None:
    put(other.path(name), kind)
    async with both_ports(artifact) as (client, admin, _):
        assert (
            await admin.post("/models/reviews", json={"artifact": str(other.directory)})
        ).status_code == 422
        assert await label(client) == "POSITIVE"


def tokenizer(**changes: Any) -> str:
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder, "tokenizer.json"))
        values: dict[str, Any] = json.loads(
            Path(folder, "tokenizer.json").read_text(encoding="utf-8")
        )
    return json.dumps(values | changes)


REPLACE = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000}
LONG_TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [
        {"SpecialToken": {"id": "[CLS]", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"[CLS]": {"id": "[CLS]", "ids": [2] * 1000, "tokens": ["[CLS]"] * 1000}},
}


@pytest.mark.parametrize(
    "changes",
    [
        {
            "files_as": {
                "tokenizer.json": tokenizer(
                    normalizer={"type": "Sequence", "normalizers": [REPLACE, REPLACE]}
                )
            }
        },
        {"files_as": {"tokenizer.json": tokenizer(post_processor=LONG_TEMPLATE)}},
        {"files_as": {"tokenizer.json": "[" * 100_000}},
        {
            "files_as": {
                "tokenizer.json": "\ud800".encode("utf-8", "surrogatepass").decode("latin-1")
            }
        },
        {"files_as": {"model.onnx": ""}},
        {"files_as": {"model.onnx": "x" * 1000}},
        {"labels": [f"L{i}" for i in range(100)], "files_as": {}, "inputs": ["input_ids"]},
        {"inputs": []},
    ],
    ids=[
        "replacements",
        "template",
        "nesting",
        "no text",
        "empty model",
        "no model",
        "labels",
        "no inputs",
    ],
)
async def test_a_malicious_artifact_is_422(
    tmp_path: Path, artifact: Artifact, changes: dict[str, Any]
) -> None:
    folder = write_artifact(tmp_path / "hurting", **changes).directory
    async with both_ports(artifact) as (client, admin, _):
        refused = await admin.post("/models/reviews", json={"artifact": str(folder)})
        assert await label(client) == "POSITIVE"
    assert refused.status_code == 422, refused.text


def swap(first: Path, second: Path) -> None:
    os.rename(first, first.with_name("meanwhile"))
    os.rename(second, first)
    os.rename(first.with_name("meanwhile"), second)


def swap_links(first: Path, second: Path) -> None:
    target = first.readlink()
    first.unlink()
    first.symlink_to(second.readlink())
    second.unlink()
    second.symlink_to(target)


@pytest.mark.parametrize("place", ["file", "folder", "link to a file", "link to the folder"])
async def test_a_file_that_replaces_a_verified_one_during_the_load_is_never_used(
    tmp_path: Path,
    artifact: Artifact,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
) -> None:
    # Two models of equal size whose labels mean the opposite: only the bytes that are loaded tell
    # them apart.
    verified, evil = write_artifact(tmp_path / "verified"), write_artifact(tmp_path / "evil")
    content = evil.path("model.onnx").read_bytes()
    evil.path("model.onnx").write_bytes(
        content.replace(np.float32(1).tobytes(), np.float32(-1).tobytes())
    )
    first, second, exchange = verified.path("model.onnx"), evil.path("model.onnx"), swap
    requested_folder = verified.directory
    if place == "folder":
        first, second = verified.directory, evil.directory
    elif place == "link to a file":
        for path in (first, second):
            os.rename(path, path.with_name("blob"))
            os.rename(path.with_name("blob"), tmp_path / f"blob-{path.parent.name}")
            path.symlink_to(tmp_path / f"blob-{path.parent.name}")
        exchange = swap_links
    elif place == "link to the folder":
        first, second, exchange = tmp_path / "current", tmp_path / "next", swap_links
        first.symlink_to(verified.directory)
        second.symlink_to(evil.directory)
        requested_folder = first
    await asyncio.sleep(0.02)  # the system's clock for files ticks a hundred times a second or more
    real = auto.load

    def load_meanwhile(*arguments: Any) -> Any:
        exchange(first, second)
        try:
            return real(*arguments)
        finally:
            exchange(first, second)

    async with both_ports(artifact) as (client, admin, service):
        before = service.registry.loaded["reviews"]
        with monkeypatch.context() as patched:
            patched.setattr(engine, "load", load_meanwhile)
            answer = await admin.post("/models/reviews", json={"artifact": str(requested_folder)})
        if place == "link to the folder":  # the folder that was verified is the one that was read
            assert answer.status_code == 200, answer.text
        else:
            assert answer.status_code == 422, answer.text
            assert (
                "was changed or touched after it was verified" in answer.json()["error"]["message"]
            )
            assert service.registry.loaded["reviews"] is before
        assert await label(client) == "POSITIVE"


class Panic(BaseException):
    """An exception that is not an Exception, as Rust's panics are in Python."""


async def test_a_library_that_panics_is_422_and_not_an_exit_code_of_a_verdict(
    artifact: Artifact,
    other: Artifact,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def panic(*arguments: object) -> None:
        raise Panic("index out of bounds")

    async with both_ports(artifact) as (client, admin, _):
        with monkeypatch.context() as patched:
            patched.setattr(engine, "load", panic)
            refused = await admin.post("/models/reviews", json={"artifact": str(other.directory)})
            with pytest.raises(BadInput, match=r"cannot be loaded \(Panic: index out of bounds\)"):
                ServiceState({"reviews": artifact}, Settings()).lifecycle.load()
        assert await label(client) == "POSITIVE"
    assert refused.status_code == 422
    assert "cannot be loaded (Panic: index out of bounds)" in refused.json()["error"]["message"]


async def test_a_load_that_hangs_is_abandoned_and_blocks_no_other(
    artifact: Artifact, other: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    comes_back = threading.Event()

    def hang_or_read(folder: Path) -> Artifact:
        if folder == Path("/mnt/gone"):  # like a network file system without its server
            assert comes_back.wait(60)
            return other
        return read_artifact(folder)

    monkeypatch.setattr(cache, "read_artifact", hang_or_read)
    async with both_ports(artifact, admin_load_timeout_s=1.5) as (client, admin, service):
        hanging = asyncio.create_task(admin.post("/models/first", json={"artifact": "/mnt/gone"}))
        await asyncio.sleep(0.2)
        again = await admin.post("/models/first", json={"artifact": str(other.directory)})
        unloaded = await admin.delete("/models/first")
        waited = await admin.post("/models/second", json={"artifact": str(other.directory)})
        assert (again.status_code, unloaded.status_code) == (409, 409)
        assert again.json()["error"]["code"] == "load_in_progress"
        assert waited.status_code in (200, 409)  # it is its turn when the first is given up
        refused = await hanging
        assert refused.status_code == 504
        assert "DRBERT_ADMIN_LOAD_TIMEOUT_S" in refused.json()["error"]["message"]
        assert (
            await admin.post("/models/second", json={"artifact": str(other.directory)})
        ).status_code == 200
        assert await label(client, "second") == "GOOD"

        for number in range(MAX_ABANDONED - 1):
            assert (
                await admin.post(f"/models/hanging-{number}", json={"artifact": "/mnt/gone"})
            ).status_code == 504
        full = await admin.post("/models/third", json={"artifact": str(other.directory)})
        assert full.status_code == 503
        assert "restart this replica" in full.json()["error"]["message"]

        comes_back.set()
        await until(
            lambda: not any(thread.name.startswith("load ") for thread in threading.enumerate())
        )
        assert list(service.registry.loaded) == [
            "reviews",
            "second",
        ]  # the late load changed nothing
        assert (
            await admin.post("/models/third", json={"artifact": str(other.directory)})
        ).status_code == 200


async def test_loads_of_several_models_run_one_after_the_other(
    artifact: Artifact, other: Artifact
) -> None:
    async with both_ports(artifact) as (_, admin, service):
        loads = [
            admin.post(f"/models/m{number}", json={"artifact": str(other.directory)})
            for number in range(4)
        ]
        assert [answer.status_code for answer in await asyncio.gather(*loads)] == [200] * 4
        assert sorted(service.registry.loaded) == ["m0", "m1", "m2", "m3", "reviews"]


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:8001", 200),
        ("127.0.0.1", 200),
        ("127.0.0.1:9", 200),
        ("127.1.2.3:8001", 200),
        ("[::1]", 200),
        ("[::1]:8001", 200),
        ("evil.example", 403),
        ("evil.example:8001", 403),
        ("localhost.evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("10.0.0.1", 403),
        ("127.0.0.1@evil.example", 403),
        ("[::2]:8001", 403),
        ("localhost:evil", 403),
        ("[::1].evil", 403),
        ("", 403),
        ("0.0.0.0:8001", 403),
        ("2130706433", 403),
    ],
)
async def test_without_keys_only_host_names_of_this_host_are_accepted(
    artifact: Artifact, host: str, status: int
) -> None:
    async with both_ports(artifact) as (_, admin, service):
        for method, path in (("GET", "/info"), ("POST", "/models/reviews"), ("GET", "/metrics")):
            answer = await admin.request(
                method, path, headers={"host": host}, json={} if method == "POST" else None
            )
            assert answer.status_code == status, (method, path)
        assert (await admin.delete("/models/reviews", headers={"host": host})).status_code == (
            422 if status == 200 else 403
        )
        assert list(service.registry.loaded) == ["reviews"]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"origin": "http://127.0.0.1:8001"}, 200),
        ({"sec-fetch-site": "none"}, 200),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://127.0.0.1:3000"}, 403),
        ({"origin": "http://localhost:8001"}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site"}, 403),
    ],
)
async def test_without_keys_requests_of_other_origins_are_refused(
    artifact: Artifact, headers: dict[str, str], status: int
) -> None:
    async with both_ports(artifact) as (_, admin, _):
        answer = await admin.post("/models/reviews", json={}, headers=headers)
    assert answer.status_code == status
    assert ("error" in answer.json()) == (status == 403)


async def test_with_keys_every_host_name_is_accepted(artifact: Artifact, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("secret\n")
    async with both_ports(artifact, Keys(tmp_path / "keys")) as (_, admin, _):
        assert (
            await admin.get(
                "/info", headers={"host": "drbert-admin.example", "x-api-key": "secret"}
            )
        ).status_code == 200


async def test_a_hub_id_needs_a_revision_because_it_may_be_a_mistyped_path(
    artifact: Artifact,
) -> None:
    async with both_ports(artifact) as (_, admin, _):
        refused = await admin.post("/models/x", json={"artifact": "reviews/v4"})
    assert refused.status_code == 422
    assert "name its revision, as in reviews/v4@main" in refused.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "kind", "status", "words"),
    [
        (b"zanzibar", "application/json", 400, "The body is not JSON."),
        (b"[" * 60_000, "application/json", 400, "The body is not JSON."),
        (b"9" * 60_000, "application/json", 400, "The body is not JSON."),
        (b"\xff", "application/json", 400, "The body is not JSON."),
        (
            b'{"zanzibar": 1}',
            "application/json",
            422,
            "The body has an unknown field; known are artifact, digest, default.",
        ),
        (
            b'{"artifact": {"zanzibar": 1}}',
            "application/json",
            422,
            "artifact: Input should be a valid string",
        ),
        (
            b'{"digest": "' + b"zanzibar" * 10 + b'"}',
            "application/json",
            422,
            "digest: String should have at most 64 characters.",
        ),
        (
            b'{"default": "zanzibar"}',
            "application/json",
            422,
            "default: Input should be a valid boolean.",
        ),
        (b'"zanzibar"', "application/json", 422, "The body must be a JSON object"),
        (b"", "application/json", 422, "The body must be a JSON object"),
        (
            b'{"artifact": "zanzibar"}',
            "text/plain",
            422,
            "The body must be a JSON object, sent with Content-Type: application/json.",
        ),
        (
            b"artifact=zanzibar",
            "application/x-www-form-urlencoded",
            422,
            "The body must be a JSON object",
        ),
        (b" " * 70_000, "application/json", 413, "The body has 70000 bytes, the limit is 65536."),
    ],
)
async def test_an_invalid_body_is_refused_in_the_error_format_and_not_repeated(
    artifact: Artifact, body: bytes, kind: str, status: int, words: str
) -> None:
    async with both_ports(artifact) as (_, admin, _):
        refused = await admin.post("/models/reviews", content=body, headers={"content-type": kind})
    assert refused.status_code == status, refused.text
    error = refused.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert words in error["message"]
    assert "zanzibar" not in refused.text


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("PUT", "/models/reviews", 405),
        ("POST", "/models/" + "x" * 201, 422),
        ("DELETE", "/models/" + "x" * 201, 422),
    ],
)
async def test_every_refusal_has_the_error_format(
    artifact: Artifact, method: str, path: str, status: int
) -> None:
    async with both_ports(artifact) as (_, admin, _):
        refused = await admin.request(method, path, json={} if method != "GET" else None)
    assert refused.status_code == status
    assert set(refused.json()["error"]) == {"message", "type", "param", "code"}
    assert "xxx" not in refused.text


def test_an_endless_body_is_413_before_it_is_read(artifact: Artifact) -> None:
    port = free_port()
    with (
        serving(artifact, DRBERT_ADMIN_PORT=str(port)),
        socket.create_connection(("127.0.0.1", port), timeout=30) as caller,
    ):
        caller.sendall(
            b"POST /models/reviews HTTP/1.1\r\nHost: localhost\r\nContent-Type:"
            b" application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        answer, sent = b"", 0
        caller.setblocking(False)
        while not answer and sent < 2**28:
            with contextlib.suppress(BlockingIOError):
                sent += caller.send(b"10000\r\n" + b" " * 65_536 + b"\r\n")
            with contextlib.suppress(BlockingIOError):
                answer = caller.recv(100)
    assert answer.startswith(b"HTTP/1.1 413")
    assert sent < 2**28


def test_the_private_port_is_open_only_if_configured(artifact: Artifact) -> None:
    port = free_port()
    with serving(artifact, DRBERT_ADMIN_PORT=str(port), DRBERT_METRICS="admin") as (url, _):
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/models/reviews", b"{}", {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            assert json.load(response)["model"] == "reviews"
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as response:
            assert b"drbert_ready 1.0" in response.read()
        for path, method in (("/metrics", "GET"), ("/models/reviews", "DELETE")):
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(
                    urllib.request.Request(url + path, method=method), timeout=10
                )
            assert refused.value.code in (404, 405)
            refused.value.close()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            {"ADMIN_PORT": "8001", "ADMIN_HOST": "0.0.0.0"},
            "DRBERT_ADMIN_HOST=0.0.0.0 lets others load models",
        ),
        ({"METRICS": "admin"}, "DRBERT_METRICS=admin needs DRBERT_ADMIN_PORT"),
        ({"TLS_CERTIFICATE": "a.pem"}, "DRBERT_TLS_CERTIFICATE and DRBERT_TLS_KEY go together"),
    ],
)
def test_contradictory_settings_are_refused(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(f"DRBERT_{name}", value)
    with pytest.raises(BadUsage, match=message):
        read_settings()
