"""API keys come from a file, which is reloaded when it changes."""

from __future__ import annotations

import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from pathlib import Path

import httpx
import pytest

from command import Unavailable
from service.artifact import Artifact
from service.http import keys as keys_module
from service.http.context import HttpContext, RequestHooks
from service.http.keys import Keys
from service.http.routes import build_app
from service.settings import Settings
from service.state import ServiceState
from tests.service.test_server import serving


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text(
        "# for the web shop\nfirst-key\n\n  # for tests\nsecond-key  # for tests\nab#cd\n"
    )
    return path


def admits(keys: Keys, key: str) -> bool:
    return keys.admit({b"x-api-key": key.encode()})


@pytest.mark.parametrize(
    ("headers", "admitted"),
    [
        ({b"authorization": b"Bearer first-key"}, True),
        ({b"authorization": b"bearer second-key"}, True),
        ({b"x-api-key": b"second-key"}, True),
        ({b"x-api-key": b"ab#cd"}, True),
        ({b"x-api-key": b"ab"}, False),
        ({}, False),
        ({b"authorization": b"Bearer "}, False),
        ({b"authorization": b"Bearer third"}, False),
        ({b"x-api-key": b""}, False),
        ({b"authorization": b"Basic first-key"}, False),
        ({b"x-api-key": b"# for the web shop"}, False),
        ({b"x-api-key": b"\xff\xfe"}, False),
    ],
)
def test_a_request_with_one_of_the_keys_is_admitted(
    file: Path, headers: dict[bytes, bytes], admitted: bool
) -> None:
    assert Keys(file).admit(headers) is admitted


def test_keys_are_reloaded_when_their_file_changes(file: Path) -> None:
    keys = Keys(file)
    # As Kubernetes changes a mounted secret: another file under the same name.
    (file.parent / "next").write_text("third-key\n")
    os.replace(file.parent / "next", file)
    keys.reload_if_changed()
    assert admits(keys, "third-key")
    assert not admits(keys, "first-key")


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def commented(file: Path) -> None:
    file.write_bytes(b"# none yet\n\n \n")


def removed(file: Path) -> None:
    file.unlink()


def made_a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def made_a_fifo(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def made_endless(file: Path) -> None:
    file.unlink()
    file.symlink_to("/dev/zero")


def made_a_loop(file: Path) -> None:
    file.unlink()
    file.symlink_to(file)


def made_huge(file: Path) -> None:
    os.truncate(file, keys_module.MAX_FILE_BYTES + 1)


def saved_as_utf16(file: Path) -> None:
    file.write_text("third-key\n", encoding="utf-16")


CHANGES = [
    emptied,
    commented,
    removed,
    made_a_folder,
    made_a_fifo,
    made_endless,
    made_a_loop,
    made_huge,
    saved_as_utf16,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_the_previous_keys_stay_valid_and_one_error_is_logged_while_the_file_cannot_be_used(
    file: Path,
    change: Callable[[Path], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    keys = Keys(file)
    change(file)
    keys.reload_if_changed()
    keys.reload_if_changed()
    assert admits(keys, "first-key")
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    if file.is_dir():
        file.rmdir()
    file.unlink(missing_ok=True)
    file.write_text("third-key\n")
    keys.reload_if_changed()
    assert admits(keys, "third-key")
    assert not admits(keys, "first-key")


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_key_file_that_cannot_be_used_is_refused_at_start(
    file: Path, change: Callable[[Path], None]
) -> None:
    change(file)
    with pytest.raises(Unavailable, match=re.escape(str(file))):
        Keys(file)


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbffirst-key\nsecond-key\n",
        b"\xef\xbb\xbf# comment\r\nfirst-key\r\nsecond-key",
        b"\xef\xbb\xbfsecond-key\n\xef\xbb\xbffirst-key\n",
    ],
)
def test_a_byte_order_mark_is_not_part_of_a_key(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    keys = Keys(file)
    assert len(keys) == 2
    assert admits(keys, "first-key")
    assert admits(keys, "second-key")


def test_a_request_never_reads_the_file(file: Path) -> None:
    keys = Keys(file)
    file.unlink()
    os.mkfifo(file)  # opening it would wait for ever
    assert admits(keys, "first-key")


def test_keys_are_rotated_in_a_running_service_and_a_fifo_in_their_place_is_harmless(
    artifact: Artifact, file: Path
) -> None:
    with serving(artifact, DRBERT_API_KEYS_FILE=str(file)) as (url, process):
        assert process.stdout is not None
        made_a_fifo(file)
        line_with(process.stdout, "the key file cannot be used; the previous keys stay valid")
        with urllib.request.urlopen(f"{url}/livez", timeout=30) as response:
            assert response.read() == b"ok\n"
        assert status(url, "first-key") == 200
        (file.parent / "next").write_text("third-key\n")
        os.replace(file.parent / "next", file)
        line_with(process.stdout, "keys reloaded")
        assert status(url, "third-key") == 200
        assert status(url, "first-key") == 401


def line_with(lines: Iterable[str], event: str) -> None:
    """Read the log until it names an event."""
    assert any(event in line for line in lines)


def status(url: str, key: str) -> int:
    try:
        with urllib.request.urlopen(
            urllib.request.Request(f"{url}/info", headers={"X-API-Key": key}), timeout=30
        ) as response:
            return int(response.status)
    except urllib.error.HTTPError as refused:
        refused.close()
        return refused.code


@pytest.mark.parametrize(
    ("content", "message"), [("# none\n", "holds no key"), (None, "cannot be read")]
)
def test_a_file_without_keys_is_refused_at_start(
    tmp_path: Path, content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "keys").write_text(content)
    with pytest.raises(Unavailable, match=message):
        Keys(tmp_path / "keys")


async def test_without_a_key_all_but_health_metrics_and_pages_is_401_in_its_dialect(
    artifact: Artifact, file: Path
) -> None:
    service = ServiceState({"reviews": artifact}, Settings(warm_up_s=0))
    service.lifecycle.load()
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(
            build_app(HttpContext(service, RequestHooks(keys=Keys(file))))
        ),
        base_url="http://test",
    ) as client:
        closed = [
            await client.post("/classify", json={"input": "good"}),
            await client.get("/info"),
            await client.get("/v1/models"),
            await client.get("/v2/models/reviews"),
            await client.post("/classify", content=b"no JSON", headers={"x-api-key": "no"}),
        ]
        spoken = [
            await client.post(path, json={})
            for path in ("/predict", "/", "/v1/models/reviews:predict", "/v2/models/reviews/infer")
        ]
        opened = [
            await client.get(path)
            for path in (
                "/livez",
                "/readyz",
                "/health",
                "/v2/health/live",
                "/metrics",
                "/docs",
                "/openapi.json",
                "/",
                "/page/page.js",
            )
        ]
        answered = await client.post(
            "/classify", json={"input": "good"}, headers={"Authorization": "Bearer first-key"}
        )
    await service.lifecycle.drain()
    assert [response.status_code for response in [*closed, *spoken]] == [401] * 9
    assert all(response.headers["www-authenticate"] == "Bearer" for response in [*closed, *spoken])
    assert closed[0].json()["error"]["code"] == "invalid_api_key"
    assert all(isinstance(response.json()["error"], str) for response in spoken)
    assert [response.status_code for response in opened] == [200] * 9
    assert answered.json()["data"][0]["label"] == "POSITIVE"
