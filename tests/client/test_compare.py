"""Two servers are compared by their answers and by their times, whatever format they speak."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from client.compare import commands
from client.compare.answers import compare_answers, wilson_interval
from client.compare.commands import main, parse_labels, parse_requirements
from client.compare.formats import Answer, Format, mapping_format, parse_format
from client.compare.timing import median_ratio, order_statistic
from command import BadInput, BadUsage, Unavailable
from proof.plans.dialects import read_headers
from service.artifact import Artifact
from tests.service.test_server import free_port, serving

TEXTS = ("good", "bad", "good good", "so bad", "good bad good", "bad bad")


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(TEXTS) + "\n\n")
    return path


@pytest.fixture(autouse=True)
def short_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "FEWEST_SECONDS", 1.0)


def score(text: str) -> float:
    """Return the probability that a text is good, by its words."""
    words = text.split()
    return (1 + words.count("good")) / (2 + words.count("good") + words.count("bad"))


def labelled(text: str) -> list[dict[str, Any]]:
    good = score(text)
    entries = [{"label": "GOOD", "score": good}, {"label": "BAD", "score": 1 - good}]
    return sorted(entries, key=lambda entry: -float(str(entry["score"])))


Answering = Callable[[Any], Any]
"""Request's JSON → answer's JSON; raises KeyError for a request of another format."""


@contextmanager
def server(paths: Mapping[str, Answering], models: Any = None) -> Iterator[str]:
    """Run a server of POST paths, and of GET /models, and yield its address."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            known = models is not None and self.path == "/models"
            self.reply(200 if known else 404, models if known else {"error": "not found"})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path not in paths:
                self.reply(404, {"error": "not found"})
                return
            try:
                self.reply(200, paths[self.path](body))
            except (KeyError, TypeError, AttributeError):
                self.reply(422, {"error": "another format"})

        def reply(self, status: int, values: Any) -> None:
            content = json.dumps(values).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 64
        daemon_threads = True

    with Server(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{http.server_port}"
        finally:
            http.shutdown()
            thread.join()


FORMATS: Mapping[str, tuple[str, Answering]] = {
    "infinity": (
        "/classify",
        # Only a list of one text: a string of several letters is of another format.
        lambda body: {"data": [labelled(*body["input"]) for _ in body["model"][:1]]},
    ),
    "tei": ("/predict", lambda body: labelled(body["inputs"])),
    "hf": ("/", lambda body: [labelled(body["inputs"])]),
    "plain 'text'": ("/predict", lambda body: labelled(body["text"])[0]),
}
"""Format that is found out → path and answers of a server of it."""


@pytest.mark.parametrize("name", FORMATS)
def test_the_format_of_a_server_is_found_out_and_equal_servers_agree(
    name: str, texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, answering = FORMATS[name]
    with (
        server({path: answering}, models={"data": [{"id": "m"}]}) as old,
        server({"/predict": FORMATS["tei"][1]}) as new,
    ):
        assert main([old, new, "--texts", str(texts), "--seconds", "1"]) == 0
    printed = capsys.readouterr().out
    assert f"old  {old}  {name} at {path}" in printed
    assert "same answer for 6 of 6 texts: 100 %" in printed
    assert "required agreement ≥ 0.99: met (1)" in printed
    assert "`drbert-prove` is the proof" in printed


def test_a_server_that_answers_wrongly_is_reported_and_ends_with_1(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(body: Any) -> Any:
        return labelled("bad" if body["inputs"] == "good good" else body["inputs"])

    report, page = tmp_path / "report.json", tmp_path / "page.html"
    with server({"/predict": FORMATS["tei"][1]}) as old, server({"/predict": wrong}) as new:
        arguments = [old, new, "--texts", str(texts), "--seconds", "1"]
        assert main([*arguments, "--json", str(report), "--html", str(page)]) == 1
    printed = capsys.readouterr().out
    assert "same answer for 5 of 6 texts: 83.3 %" in printed
    assert "line 3: old GOOD 0.7500, new BAD 0.6667: good good" in printed
    assert "required agreement ≥ 0.99: NOT met" in printed
    values = json.loads(report.read_text())
    assert not values["accepted"]
    assert values["answers"]["differing"][0]["text"] == "good good"
    assert [level["in_flight"] for level in values["levels"]] == [1, 8, 32]
    assert "does not meet what is required" in page.read_text()
    assert "good good" in page.read_text()


def test_our_own_service_is_compared_with_a_mapped_server(
    artifact: Artifact, texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def answering(body: Any) -> Any:
        [best, _] = labelled(body["review"]["content"])
        return {"result": {"sentiment": best["label"], "confidence": best["score"]}}

    mapping = {
        "path": "/analyse",
        "body": {"review": {"content": "{text}"}},
        "label": "result.sentiment",
        "score": "result.confidence",
    }
    with serving(artifact) as (new, _), server({"/analyse": answering}) as old:
        arguments = [old, new, "--texts", str(texts), "--seconds", "1"]
        arguments += ["--old-format", json.dumps(mapping), "--require", "agreement=0.1"]
        assert main([*arguments, "--labels", "GOOD=POSITIVE,BAD=NEGATIVE"]) == 0
    printed = capsys.readouterr().out
    assert "mapping at /analyse" in printed
    assert "drbert at /classify" in printed
    assert "name labels differently" not in printed


def test_requests_that_fail_are_counted_and_named(
    texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def picky(body: Any) -> Any:
        if body["inputs"] == "so bad":
            raise KeyError
        return labelled(body["inputs"])

    with server({"/predict": FORMATS["tei"][1]}) as old, server({"/predict": picky}) as new:
        assert main([old, new, "--texts", str(texts), "--seconds", "1"]) == 1
    printed = capsys.readouterr().out
    assert "the new server did not answer 1 of the texts" in printed
    assert 'line 4: old BAD 0.6667, new status 422: {"error": "another format"}: so bad' in printed
    assert "to the new server failed; the first: status 422" in printed


def test_a_server_of_an_unknown_format_is_named_with_what_was_tried(texts: Path) -> None:
    with (
        server({}) as old,
        pytest.raises(Unavailable, match=r"old server .* no known format; .* --old-format.*404"),
    ):
        main([old, old, "--texts", str(texts)])


def test_a_server_that_is_not_there_is_one_line(texts: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(Unavailable, match=f"The old server does not answer at {url}"):
        main([url, url, "--texts", str(texts)])


def test_labels_without_a_common_name_are_pointed_out() -> None:
    old = [Answer("LABEL_1", {"LABEL_1": 0.9}), Answer("LABEL_0", {"LABEL_0": 0.8})]
    new = [Answer("GOOD", {"GOOD": 0.9}), Answer("BAD", {"BAD": 0.7})]
    agreement = compare_answers([(1, "good"), (2, "bad")], old, new, {})
    assert (agreement.same, agreement.has_foreign_labels) == (0, True)
    renamed = compare_answers(
        [(1, "good"), (2, "bad")], old, new, {"LABEL_1": "GOOD", "LABEL_0": "BAD"}
    )
    assert (renamed.same, renamed.has_foreign_labels) == (2, False)
    assert renamed.largest_difference == pytest.approx(0.1)
    assert renamed.largest_text == 2


def test_scores_without_names_are_compared_by_the_best_one() -> None:
    named = Answer("GOOD", {"GOOD": 0.75, "BAD": 0.25})
    unnamed = Answer("GOOD", {"0": 0.3, "1": 0.7})
    agreement = compare_answers([(1, "good")], [named], [unnamed], {})
    assert agreement.largest_difference == pytest.approx(0.05)


def test_the_interval_of_a_share_is_wilsons() -> None:
    low, high = wilson_interval(9, 10)
    # Wilson 1927, as in scipy.stats.binomtest(9, 10).proportion_ci(method="wilson").
    assert low == pytest.approx(0.5958, abs=1e-4)
    assert high == pytest.approx(0.9821, abs=1e-4)
    assert wilson_interval(10, 10)[1] == 1.0


@pytest.mark.parametrize(("count", "left_out"), [(5, None), (6, 0), (8, 0), (9, 1), (12, 2)])
def test_an_interval_of_a_median_leaves_out_as_many_as_the_binomial_allows(
    count: int, left_out: int | None
) -> None:
    assert order_statistic(count) == left_out


def test_too_few_ratios_bound_nothing() -> None:
    assert median_ratio([2.0]).high == math.inf
    assert median_ratio([1.0, 2, 3, 4, 5, 6, 7, 8, 9]) == median_ratio(
        [9.0, 8, 7, 6, 5, 4, 3, 2, 1]
    )
    ratio = median_ratio([1.0, 2, 3, 4, 5, 6, 7, 8, 9])
    assert (ratio.median, ratio.low, ratio.high) == (5, 2, 8)


@pytest.mark.parametrize(
    ("mapping", "words"),
    [
        ("{", "is not JSON"),
        ("[]", "is not a JSON object"),
        ('{"path": "/x", "body": {"a": "{text}"}}', "needs path, body, and label or scores"),
        ('{"path": "/x", "body": {"a": "b"}, "label": "l"}', 'no "{text}"'),
        ('{"path": "/x", "body": "{text}", "label": "l", "url": "x"}', "unknown key 'url'"),
    ],
)
def test_a_mapping_that_cannot_be_used_is_refused(mapping: str, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        mapping_format(mapping, "the mapping")


def test_a_mapping_may_read_a_list_of_scores_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "old.json"
    file.write_text('{"path": "x", "body": ["{text}"], "scores": "0"}')
    chosen: Format = parse_format(str(file), None)
    assert (chosen.path, chosen.body("so bad")) == ("/x", ["so bad"])
    assert chosen.read([labelled("good")]).label == "GOOD"


@pytest.mark.parametrize(
    "arguments",
    [
        ["localhost:80", "http://x"],
        ["http://x", "http://y", "--seconds", "0.5"],
        ["http://x", "http://y", "--require", "speed=1"],
        ["http://x", "http://y", "--require", "agreement=much"],
        ["http://x", "http://y", "--labels", "A"],
        ["http://x", "http://y", "--old-format", "grpc"],
    ],
)
def test_a_wrong_command_line_is_refused(arguments: list[str], texts: Path) -> None:
    with pytest.raises(BadUsage):
        main([*arguments, "--texts", str(texts)])


def test_requirements_and_labels_are_lists() -> None:
    assert parse_requirements("agreement=0.9,speedup=1") == {"agreement": 0.9, "speedup": 1.0}
    assert parse_requirements("") == {}
    assert parse_labels("A=B, C=D") == {"A": "B", "C": "D"}


@pytest.mark.parametrize(
    ("content", "error"), [(b"\n \n", "has no text"), (b"\xff", "is not UTF-8")]
)
def test_a_file_without_texts_is_refused(content: bytes, error: str, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_bytes(content)
    with pytest.raises(BadInput, match=error):
        main(["http://x", "http://y", "--texts", str(tmp_path / "texts.txt")])


def test_numbers_are_compared_by_their_value_and_not_by_their_one_label() -> None:
    old = [Answer("LABEL_0", {"LABEL_0": value}) for value in (4.9, -3.0)]
    new = [Answer("LABEL_0", {"LABEL_0": value}) for value in (4.91, 2.0)]
    agreement = compare_answers([(1, "good"), (2, "bad")], old, new, {})
    assert agreement.same == 1
    assert agreement.largest_difference == pytest.approx(5.0)


def test_all_counted_labels_of_a_multi_label_model_are_compared() -> None:
    both, toxic = {"toxic": 0.9, "insult": 0.6}, {"toxic": 0.9, "insult": 0.4}
    neither = {"toxic": 0.2, "insult": 0.1}
    old = [Answer("toxic", both), Answer("toxic", both), Answer("toxic", neither)]
    new = [Answer("toxic", toxic), Answer("toxic", both), Answer("insult", neither)]
    agreement = compare_answers([(1, "one"), (2, "two"), (3, "three")], old, new, {})
    assert agreement.same == 2
    [text] = agreement.differing
    assert (text.old, text.new) == ("toxic 0.9000, insult 0.6000", "toxic 0.9000")


def test_a_server_that_reads_no_text_from_a_field_is_asked_in_another_format(
    texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def lenient(body: Any) -> Any:
        return labelled(body.get("text", ""))

    with server({"/predict": lenient}) as old, server({"/predict": FORMATS["tei"][1]}) as new:
        assert main([old, new, "--texts", str(texts), "--seconds", "1"]) == 0
    assert "plain 'text' at /predict" in capsys.readouterr().out


def test_a_format_that_is_given_gets_the_model_that_the_server_lists(
    artifact: Artifact, texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(artifact) as (url, _):
        arguments = [url, url, "--texts", str(texts), "--seconds", "1"]
        assert main([*arguments, "--old-format", "kserve-v1"]) == 0
    assert "kserve-v1 at /v1/models/reviews:predict, model reviews" in capsys.readouterr().out


def test_a_format_that_is_given_and_wrong_is_reported_at_once(texts: Path) -> None:
    with (
        server({"/predict": FORMATS["tei"][1]}) as url,
        pytest.raises(Unavailable, match=r"is the format right\? Tried: hf at /: status 404"),
    ):
        main([url, url, "--texts", str(texts), "--old-format", "hf"])


@pytest.mark.parametrize("url", ["http://[::1", "http://user:secret@host", "host:80", "ftp://x"])
def test_an_address_that_cannot_be_used_is_refused_and_a_password_is_not_printed(
    url: str, texts: Path
) -> None:
    with pytest.raises(BadUsage) as refused:
        main([url, url, "--texts", str(texts)])
    assert "secret" not in str(refused.value)


def test_a_file_that_cannot_be_written_is_reported_before_the_minute(
    texts: Path, tmp_path: Path
) -> None:
    with pytest.raises(Unavailable, match="cannot be written"):
        main(["http://x", "http://y", "--texts", str(texts), "--json", str(tmp_path / "a/b.json")])


def test_headers_come_from_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLD", "Authorization: Bearer x\nX-A: b:c")
    assert read_headers("OLD", "--old-headers") == {"Authorization": "Bearer x", "X-A": "b:c"}
    with pytest.raises(BadInput, match="--new-headers takes headers from the variable NEW, which"):
        read_headers("NEW", "--new-headers")
    monkeypatch.setenv("OLD", "nothing")
    with pytest.raises(BadInput, match="without a colon"):
        read_headers("OLD", "--old-headers")
