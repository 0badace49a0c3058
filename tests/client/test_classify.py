"""drbert-classify, against a running service and against one that refuses."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
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


def stdin(content: bytes) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(content))


def test_texts_are_answered_with_label_score_and_text(
    url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["good film", "bad\tbad", "--url", url]) == 0
    assert capsys.readouterr().out == "POSITIVE\t0.7311\tgood film\nNEGATIVE\t0.8808\tbad\tbad\n"


def test_every_line_of_stdin_gets_its_line_in_order(
    url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["good", "", "bad", "  ", "film good", *["good", "bad"] * 40]
    monkeypatch.setattr(sys, "stdin", stdin("\n".join(lines).encode() + b"\n"))
    assert main(["--url", url, "--at-once", "7", "--connections", "3"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert [line.split("\t")[0] for line in told] == [
        "POSITIVE",
        "",
        "NEGATIVE",
        "",
        "POSITIVE",
        *["POSITIVE", "NEGATIVE"] * 40,
    ]


def test_json_is_the_services_answer(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["good", "--json", "--top-k", "1", "--model", "reviews", "--url", url]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["label"] == "POSITIVE"
    assert len(told["scores"]) == 1


def test_the_client_is_answered_whatever_dialect_classify_speaks(
    artifact: Artifact, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(artifact, DRBERT_CLASSIFY_DIALECT="infinity") as (url, _):
        assert main(["good film", "--url", url]) == 0
    assert capsys.readouterr().out == "POSITIVE\t0.7311\tgood film\n"


def test_a_key_of_the_environment_is_sent(
    artifact: Artifact,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
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


def test_a_refusal_names_the_line_and_not_the_place_in_its_request(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(artifact, DRBERT_MAX_TEXT_CHARS="10", DRBERT_MAX_TEXTS="3") as (url, _):
        monkeypatch.setattr(
            sys, "stdin", stdin(b"good\n\nbad\n" * 2 + b"\n" + b"good " * 9 + b"\n")
        )
        with pytest.raises(BadInput, match=r"refused: line 8 has 45 characters, the limit is 10\."):
            main(["--url", url, "--at-once", "3"])
        with pytest.raises(BadInput, match=r"refused: text 2 has 11 characters"):
            main(["good", "bad bad bad", "--url", url])
        with pytest.raises(
            BadInput, match=r"refused: text 1 to text 4 holds 4 texts, the limit is 3"
        ):
            main(["good"] * 4 + ["--url", url])


def test_a_line_that_is_not_utf_8_is_named(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", stdin("good\nbébé\n".encode() + "bébé\n".encode("latin-1")))
    with pytest.raises(BadInput, match="line 3 is not UTF-8"):
        main(["--url", url])


@pytest.mark.parametrize(
    "url",
    [
        "127.0.0.1:8000",
        "localhost:8000",
        "reviews.example",
        "ftp://reviews.example",
        "http://",
        "http://a:b:c",
        "",
    ],
)
def test_an_address_without_http_is_refused_at_once(url: str) -> None:
    with pytest.raises(
        BadUsage, match=r"--url .* is no address of a service; write it as http://127\.0\.0\.1:8000"
    ):
        main(["good", "--url", url])


def test_without_texts_and_lines_it_says_what_to_give(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", type("Terminal", (), {"isatty": lambda self: True})())
    with pytest.raises(BadUsage, match="Give texts, or lines on stdin"):
        main([])


def service_of(*statuses: int, patience_s: float = 60.0) -> tuple[Service, list[Any]]:
    """A service that answers with these statuses in turn, the last one for ever, and the lists it
    was asked.
    """
    asked: list[Any] = []

    def answer(request: httpx.Request) -> httpx.Response:
        texts = json.loads(request.content)["input"]
        asked.append(texts)
        status = statuses[min(len(asked), len(statuses)) - 1]
        if status != 200:
            return httpx.Response(
                status, json={"error": {"message": "full"}}, headers={"retry-after": "0"}
            )
        return httpx.Response(200, json={"data": [{"label": text} for text in texts]})

    return (
        Service(
            httpx.Client(transport=httpx.MockTransport(answer), base_url="http://test"),
            {},
            patience_s,
        ),
        asked,
    )


def test_a_service_that_is_full_is_asked_again_and_later_each_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waited: list[float] = []
    monkeypatch.setattr("client.classify.random.uniform", lambda low, high: high)
    service, asked = service_of(429, 503, 429, 200)
    monkeypatch.setattr(service.over, "wait", waited.append)
    assert service.classify(["good"]) == [{"label": "good"}]
    assert len(asked) == 4
    assert waited == [0.25, 0.5, 1.0]


def test_patience_ends() -> None:
    service, _ = service_of(503, patience_s=0.0)
    with pytest.raises(Unavailable, match="did not answer within 0 s: full"):
        service.classify(["good"])


def test_nobody_there_is_unavailable() -> None:
    with (
        httpx.Client(base_url="http://127.0.0.1:9") as client,
        pytest.raises(Unavailable, match="did not answer within 0 s"),
    ):
        Service(client, {}, 0.0).classify(["good"])


class Full(BaseHTTPRequestHandler):
    """Refuses whoever asks for half a minute."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(503)
        self.send_header("Retry-After", "30")
        self.send_header("Content-Length", "0")
        self.end_headers()
        self.server.asked.set()  # type: ignore[attr-defined]

    def log_message(self, *_: object) -> None:
        pass


def test_whoever_interrupts_a_client_that_waits_does_not_wait() -> None:
    with HTTPServer(("127.0.0.1", 0), Full) as server:
        server.asked = threading.Event()  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "client",
                    "good",
                    "--url",
                    f"http://127.0.0.1:{server.server_port}",
                ],
                stderr=subprocess.PIPE,
                text=True,
                # Whoever runs the tests in the background has them ignore it, and so their
                # children.
                preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
            )
            assert server.asked.wait(30)  # type: ignore[attr-defined]
            time.sleep(0.2)
            interrupted = time.monotonic()
            process.send_signal(signal.SIGINT)
            told = process.communicate(timeout=60)[1]
        finally:
            server.shutdown()
            thread.join()
    assert time.monotonic() - interrupted < 5
    assert (process.returncode, told) == (130, "client: interrupted\n")


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
    rows.close()  # type: ignore[attr-defined]
