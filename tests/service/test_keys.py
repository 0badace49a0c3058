"""Who may ask: keys from a file that is read again when it changes."""

from __future__ import annotations

import os
from pathlib import Path

import httpx
import pytest

from command import Unavailable
from service import keys as keys_module
from service.artifact import Artifact
from service.classify import Around
from service.keys import Keys
from service.models import Models
from service.routes import build_app
from service.settings import Settings


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text("# for the web shop\nfirst-key\n\n  # for tests\nsecond-key  # for tests\nab#cd\n")
    return path


@pytest.mark.parametrize(("headers", "admitted"), [
    ({b"authorization": b"Bearer first-key"}, True), ({b"authorization": b"bearer second-key"}, True), ({b"x-api-key": b"second-key"}, True),
    ({b"x-api-key": b"ab#cd"}, True), ({b"x-api-key": b"ab"}, False),
    ({}, False), ({b"authorization": b"Bearer "}, False), ({b"authorization": b"Bearer third"}, False), ({b"x-api-key": b""}, False),
    ({b"authorization": b"Basic first-key"}, False), ({b"x-api-key": b"# for the web shop"}, False), ({b"x-api-key": b"\xff\xfe"}, False),
])
def test_whoever_brings_one_of_the_keys_is_admitted(file: Path, headers: dict[bytes, bytes], admitted: bool) -> None:
    assert Keys(file).admit(headers) is admitted


def test_keys_are_read_again_when_their_file_changes(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys_module, "LOOK_EVERY_S", 0.0)
    keys = Keys(file)
    # As Kubernetes changes a mounted secret: another file under the same name.
    (file.parent / "next").write_text("third-key\n")
    os.replace(file.parent / "next", file)
    assert keys.admit({b"x-api-key": b"third-key"})
    assert not keys.admit({b"x-api-key": b"first-key"})
    file.unlink()
    assert keys.admit({b"x-api-key": b"third-key"})    # the last ones hold while there is no file
    file.write_text("")
    assert not keys.admit({b"x-api-key": b"third-key"})    # an empty one lets nobody in


@pytest.mark.parametrize(("content", "message"), [("# none\n", "holds none"), (None, "cannot be read")])
def test_a_file_without_keys_lets_no_service_start(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "keys").write_text(content)
    with pytest.raises(Unavailable, match=message):
        Keys(tmp_path / "keys")


async def test_without_a_key_everything_but_health_metrics_and_pages_is_401_in_its_dialect(artifact: Artifact, file: Path) -> None:
    models = Models({"reviews": artifact}, Settings(warm_up_s=0))
    models.load()
    async with httpx.AsyncClient(transport=httpx.ASGITransport(build_app(models, Around(keys=Keys(file)))), base_url="http://test") as client:
        closed = [
            await client.post("/classify", json={"input": "good"}), await client.get("/info"), await client.get("/v1/models"), await client.get("/v2/models/reviews"),
            await client.post("/classify", content=b"no JSON", headers={"x-api-key": "no"}),
        ]
        spoken = [await client.post(path, json={}) for path in ("/predict", "/", "/v1/models/reviews:predict", "/v2/models/reviews/infer")]
        opened = [await client.get(path) for path in ("/livez", "/readyz", "/health", "/v2/health/live", "/metrics", "/docs", "/openapi.json", "/", "/page/page.js")]
        answered = await client.post("/classify", json={"input": "good"}, headers={"Authorization": "Bearer first-key"})
    await models.drain()
    assert [response.status_code for response in [*closed, *spoken]] == [401] * 9
    assert all(response.headers["www-authenticate"] == "Bearer" for response in [*closed, *spoken])
    assert closed[0].json()["error"]["code"] == "invalid_api_key"
    assert all(isinstance(response.json()["error"], str) for response in spoken)
    assert [response.status_code for response in opened] == [200] * 9
    assert answered.json()["data"][0]["label"] == "POSITIVE"
