"""`drbert-classify` against a running service, and against one that refuses."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from client.classify import Service, classify_lines, main
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
    assert main(["--url", url, "--batch-size", "7", "--connections", "3"]) == 0
    output = capsys.readouterr().out.splitlines()
    assert [line.split("\t")[0] for line in output] == [
        "POSITIVE",
        "",
        "NEGATIVE",
        "",
        "POSITIVE",
        *["POSITIVE", "NEGATIVE"] * 40,
    ]


def test_options_are_accepted_by_their_old_names(
    url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", stdin(b"good\nbad\ngood\n"))
    services: list[Service] = []
    batches: list[int] = []

    def classify(service: Service, texts: Sequence[str], names: Sequence[str]) -> list[Any]:
        services.append(service)
        batches.append(len(texts))
        return [{"label": text, "score": 1.0} for text in texts]

    monkeypatch.setattr(Service, "classify", classify)
    assert main(["--url", url, "--at-once", "2", "--patience", "7"]) == 0
    assert sorted(batches) == [1, 2]
    assert services[0].retry_timeout_s == 7
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_the_help_shows_options_by_their_new_names_only(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    assert "--batch-size" in shown
    assert "--retry-timeout" in shown
    assert "--at-once" not in shown
    assert "--patience" not in shown


@pytest.mark.parametrize("option", ["--batch-size", "--at-once", "--connections"])
def test_a_number_below_1_is_refused(option: str) -> None:
    with pytest.raises(BadUsage, match=r"is 0; it must be at least 1"):
        main(["good", option, "0"])


def test_json_is_the_services_answer(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["good", "--json", "--top-k", "1", "--model", "reviews", "--url", url]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["label"] == "POSITIVE"
    assert len(answer["scores"]) == 1


def test_the_client_is_answered_whatever_dialect_classify_speaks(
    artifact: Artifact, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(artifact, DRBERT_CLASSIFY_DIALECT="infinity") as (url, _):
        assert main(["good film", "--url", url]) == 0
    assert capsys.readouterr().out == "POSITIVE\t0.7311\tgood film\n"


def test_a_server_of_another_program_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    class Other(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(200)
            self.send_header("content-length", "2")
            self.end_headers()
            self.wfile.write(b"ok")

        def log_message(self, *_: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Other) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        with pytest.raises(BadInput, match="does not answer as DrBERT Serve does; give --url"):
            main(["good", "--url", f"http://127.0.0.1:{server.server_address[1]}"])


def test_a_key_that_no_header_can_hold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRBERT_API_KEY", "schlüssel")
    with pytest.raises(BadUsage, match="DRBERT_API_KEY has a character that is not ASCII"):
        main(["good"])


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


def test_a_refusal_is_reported_in_the_words_of_the_service(url: str) -> None:
    with pytest.raises(BadInput, match="No model has that name; loaded are reviews"):
        main(["good", "--model", "other", "--url", url])


def test_a_refusal_names_the_line_and_not_its_position_in_the_request(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(artifact, DRBERT_MAX_TEXT_CHARS="10", DRBERT_MAX_TEXTS="3") as (url, _):
        monkeypatch.setattr(
            sys, "stdin", stdin(b"good\n\nbad\n" * 2 + b"\n" + b"good " * 9 + b"\n")
        )
        with pytest.raises(BadInput, match=r"refused: line 8 has 45 characters, the limit is 10\."):
            main(["--url", url, "--batch-size", "3"])
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
def test_an_address_without_a_scheme_or_a_host_is_refused(url: str) -> None:
    with pytest.raises(
        BadUsage,
        match=r"--url .* is not the address of a service; write it as http://127\.0\.0\.1:8000",
    ):
        main(["good", "--url", url])


def test_without_input_it_is_a_usage_error_that_shows_how_to_pass_texts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "stdin", type("Terminal", (), {"isatty": lambda self: True})())
    with pytest.raises(BadUsage, match="Pass texts or lines on stdin"):
        main([])


def service_of(*statuses: int, retry_timeout_s: float = 60.0) -> tuple[Service, list[Any]]:
    """Return a service that answers with these statuses in turn, and the lists that it receives.

    The last status is repeated for ever.
    """
    requests: list[Any] = []

    def answer(request: httpx.Request) -> httpx.Response:
        texts = json.loads(request.content)["input"]
        requests.append(texts)
        status = statuses[min(len(requests), len(statuses)) - 1]
        if status != 200:
            return httpx.Response(
                status, json={"error": {"message": "full"}}, headers={"retry-after": "0"}
            )
        return httpx.Response(200, json={"data": [{"label": text} for text in texts]})

    return (
        Service(
            httpx.Client(transport=httpx.MockTransport(answer), base_url="http://test"),
            {},
            retry_timeout_s,
        ),
        requests,
    )


def test_requests_to_a_full_service_are_retried_with_growing_pauses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("client.classify.random.uniform", lambda low, high: high)
    service, requests = service_of(429, 503, 429, 200)
    monkeypatch.setattr(service.stopped, "wait", pauses.append)
    assert service.classify(["good"]) == [{"label": "good"}]
    assert len(requests) == 4
    assert pauses == [0.25, 0.5, 1.0]


def test_retries_end_after_the_timeout() -> None:
    service, _ = service_of(503, retry_timeout_s=0.0)
    with pytest.raises(Unavailable, match="did not answer within 0 s: full"):
        service.classify(["good"])


def test_a_service_that_does_not_listen_is_unavailable() -> None:
    with (
        httpx.Client(base_url="http://127.0.0.1:9") as client,
        pytest.raises(Unavailable, match="did not answer within 0 s"),
    ):
        Service(client, {}, 0.0).classify(["good"])


class Full(BaseHTTPRequestHandler):
    """Refuses each request and asks the client to return after 30 s."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(503)
        self.send_header("Retry-After", "30")
        self.send_header("Content-Length", "0")
        self.end_headers()
        self.server.received.set()  # type: ignore[attr-defined]

    def log_message(self, *_: object) -> None:
        pass


def test_an_interrupt_ends_a_client_that_waits_for_a_retry() -> None:
    with HTTPServer(("127.0.0.1", 0), Full) as server:
        server.received = threading.Event()  # type: ignore[attr-defined]
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
                # A shell starts background jobs with SIGINT ignored, and children inherit that.
                preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
            )
            assert server.received.wait(30)  # type: ignore[attr-defined]
            time.sleep(0.2)
            interrupted = time.monotonic()
            process.send_signal(signal.SIGINT)
            errors = process.communicate(timeout=60)[1]
        finally:
            server.shutdown()
            thread.join()
    assert time.monotonic() - interrupted < 5
    retrying, interrupted_line = errors.splitlines()
    assert retrying.endswith("it answered with status 503; retrying for up to 60 s")
    assert (process.returncode, interrupted_line) == (130, "drbert-classify: interrupted")


def test_no_more_is_read_ahead_than_the_pending_requests_need() -> None:
    service, _ = service_of(200)
    read: list[int] = []

    def lines() -> Iterator[str]:
        for i in range(1000):
            read.append(i)
            yield str(i)

    rows = classify_lines(service, lines(), batch_size=5, connections=2)
    assert [next(rows)[0] for _ in range(3)] == ["0", "1", "2"]
    assert len(read) <= 3 * 5
    rows.close()  # type: ignore[attr-defined]
