"""drbert-classify, against a running service and against one that refuses."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from client.classify import Service, answered, main
from command import BadInput, BadUsage, Unavailable
from service.artifact import Artifact
from tests.service.test_server import serving


@pytest.fixture
def url(artifact: Artifact) -> Iterator[str]:
    with serving(artifact) as (url, _):
        yield url


def test_texts_are_answered_with_label_score_and_text(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["good film", "bad\tbad", "--url", url]) == 0
    assert capsys.readouterr().out == "POSITIVE\t0.7311\tgood film\nNEGATIVE\t0.8808\tbad\tbad\n"


def test_every_line_of_stdin_gets_its_line_in_order(url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    lines = ["good", "", "bad", "  ", "film good", *["good", "bad"] * 40]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
    assert main(["--url", url, "--at-once", "7", "--connections", "3"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert [line.split("\t")[0] for line in told] == ["POSITIVE", "", "NEGATIVE", "", "POSITIVE", *["POSITIVE", "NEGATIVE"] * 40]


def test_json_is_the_services_answer(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["good", "--json", "--top-k", "1", "--model", "reviews", "--url", url]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["label"] == "POSITIVE"
    assert len(told["scores"]) == 1


def test_the_client_is_answered_whatever_dialect_classify_speaks(artifact: Artifact, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(artifact, DRBERT_CLASSIFY_DIALECT="infinity") as (url, _):
        assert main(["good film", "--url", url]) == 0
    assert capsys.readouterr().out == "POSITIVE\t0.7311\tgood film\n"


def test_a_key_of_the_environment_is_sent(artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "keys").write_text("secret\n")
    with serving(artifact, DRBERT_API_KEYS_FILE=str(tmp_path / "keys")) as (url, _):
        with pytest.raises(BadInput, match="asks for a key"):
            main(["good", "--url", url])
        monkeypatch.setenv("DRBERT_API_KEY", "secret")
        assert main(["good", "--url", url]) == 0
    assert capsys.readouterr().out.startswith("POSITIVE")


def test_what_the_service_refuses_is_told_in_its_words(url: str) -> None:
    with pytest.raises(BadInput, match="No model has that name; loaded are reviews"):
        main(["good", "--model", "other", "--url", url])


def test_without_texts_and_lines_it_says_what_to_give(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", type("Terminal", (), {"isatty": lambda self: True})())
    with pytest.raises(BadUsage, match="Give texts, or lines on stdin"):
        main([])


def service_of(*statuses: int, patience_s: float = 60.0) -> tuple[Service, list[Any]]:
    """A service that answers with these statuses in turn, the last one for ever, and the lists it was asked."""
    asked: list[Any] = []

    def answer(request: httpx.Request) -> httpx.Response:
        texts = json.loads(request.content)["input"]
        asked.append(texts)
        status = statuses[min(len(asked), len(statuses)) - 1]
        if status != 200:
            return httpx.Response(status, json={"error": {"message": "full"}}, headers={"retry-after": "0"})
        return httpx.Response(200, json={"data": [{"label": text} for text in texts]})

    return Service(httpx.Client(transport=httpx.MockTransport(answer), base_url="http://test"), {}, patience_s), asked


def test_a_service_that_is_full_is_asked_again_and_later_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr("client.classify.time.sleep", waited.append)
    monkeypatch.setattr("client.classify.random.uniform", lambda low, high: high)
    service, asked = service_of(429, 503, 429, 200)
    assert service.classify(["good"]) == [{"label": "good"}]
    assert len(asked) == 4
    assert waited == [0.25, 0.5, 1.0]


def test_patience_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("client.classify.time.sleep", lambda seconds: None)
    service, _ = service_of(503, patience_s=0.0)
    with pytest.raises(Unavailable, match="did not answer within 0 s: full"):
        service.classify(["good"])


def test_nobody_there_is_unavailable() -> None:
    with httpx.Client(base_url="http://127.0.0.1:9") as client, pytest.raises(Unavailable, match="did not answer within 0 s"):
        Service(client, {}, 0.0).classify(["good"])


def test_no_more_is_read_than_is_under_way() -> None:
    service, _ = service_of(200)
    read: list[int] = []

    def lines() -> Iterator[str]:
        for i in range(1000):
            read.append(i)
            yield str(i)

    rows = answered(service, lines(), at_once=5, connections=2)
    assert [next(rows)[0] for _ in range(3)] == ["0", "1", "2"]
    assert len(read) <= 3 * 5
    rows.close()    # type: ignore[attr-defined]
