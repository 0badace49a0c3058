"""The application over HTTP: answers, errors, health, metrics and pages."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import importlib.metadata
import json
import math
import re
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.artifact import Artifact
from service.http.context import HttpContext
from service.http.routes import build_app
from service.settings import Settings
from service.state import ServiceState
from tests.factories import MAX_TOKENS, write_artifact


@asynccontextmanager
async def client_of(
    *artifacts: Artifact, load: bool = True, **settings: Any
) -> AsyncIterator[tuple[httpx.AsyncClient, ServiceState]]:
    async with client_and_context(*artifacts, load=load, **settings) as (client, context):
        yield client, context.service


@asynccontextmanager
async def client_and_context(
    *artifacts: Artifact, load: bool = True, **settings: Any
) -> AsyncIterator[tuple[httpx.AsyncClient, HttpContext]]:
    service = ServiceState(
        {a.manifest.name: a for a in artifacts}, Settings(warm_up_s=0, **settings)
    )
    context = HttpContext(service)
    if load:
        service.lifecycle.load()
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(build_app(context)), base_url="http://test"
    ) as client:
        yield client, context
    await service.lifecycle.drain()


async def classify(client: httpx.AsyncClient, body: Any) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return await client.post("/classify", content=content)


async def test_a_text_is_answered_with_its_label_and_all_probabilities(artifact: Artifact) -> None:
    async with client_of(artifact) as (client, _):
        response = await classify(client, {"input": "good good film"})
    answer = response.json()
    assert response.status_code == 200
    assert answer["object"] == "list"
    assert answer["model"] == "reviews"
    [item] = answer["data"]
    likely = 1 / (1 + math.exp(-2))
    assert item["label"] == "POSITIVE"
    assert item["score"] == pytest.approx(likely)
    assert item["probs"] == pytest.approx([1 - likely, likely])
    assert [entry["label"] for entry in item["scores"]] == ["POSITIVE", "NEGATIVE"]
    assert (item["tokens"], item["truncated"], item["num_classes"]) == (5, False, 2)
    assert answer["usage"] == {"prompt_tokens": 5, "total_tokens": 5, "completion_tokens": 0}


async def test_a_list_is_answered_in_order(artifact: Artifact) -> None:
    async with client_of(artifact) as (client, _):
        answer = (
            await classify(
                client, {"inputs": ["good", "bad", {"text": "bad", "text_pair": "good good"}]}
            )
        ).json()
    assert [(item["index"], item["label"]) for item in answer["data"]] == [
        (0, "POSITIVE"),
        (1, "NEGATIVE"),
        (2, "POSITIVE"),
    ]


async def test_top_k_and_threshold_cut_the_scores_and_not_the_probs(artifact: Artifact) -> None:
    async with client_of(artifact) as (client, _):
        top = (await classify(client, {"input": "good", "top_k": 1})).json()["data"][0]
        above = (await classify(client, {"input": "good good good", "threshold": 0.9})).json()[
            "data"
        ][0]
    assert len(top["scores"]) == 1
    assert len(top["probs"]) == 2
    assert [entry["label"] for entry in above["scores"]] == ["POSITIVE"]


async def test_a_multi_label_model_names_every_label_above_the_threshold(tmp_path: Path) -> None:
    several = write_artifact(tmp_path / "several", labels=("angry", "glad"), task="multi_label")
    async with client_of(several) as (client, _):
        item = (await classify(client, {"input": "good bad"})).json()["data"][0]
        none = (await classify(client, {"input": "film", "threshold": 0.6})).json()["data"][0]
    assert sorted(item["labels"]) == ["angry", "glad"]
    assert item["probs"] == pytest.approx([1 / (1 + math.exp(-1))] * 2)
    assert none["labels"] == []


async def test_labels_do_not_depend_on_the_form_of_the_scores(tmp_path: Path) -> None:
    several = write_artifact(tmp_path / "several", labels=("angry", "glad"), task="multi_label")
    async with client_of(several) as (client, _):
        answers = [
            (await classify(client, {"input": "good", "activation": a})).json()["data"][0]["labels"]
            for a in ("auto", "none", "softmax")
        ]
    assert answers[0] == answers[1] == answers[2] == ["glad", "angry"]


async def test_a_regression_model_answers_its_value(tmp_path: Path) -> None:
    value = write_artifact(tmp_path / "value", labels=("score",), task="regression")
    async with client_of(value) as (client, _):
        item = (await classify(client, {"input": "bad bad bad"})).json()["data"][0]
    assert item["score"] == pytest.approx(3.0)


async def test_a_request_may_ask_for_logits(artifact: Artifact) -> None:
    async with client_of(artifact) as (client, _):
        ours = (await classify(client, {"input": "good good", "activation": "none"})).json()[
            "data"
        ][0]
        vllms = (await classify(client, {"input": "good good", "use_activation": False})).json()[
            "data"
        ][0]
    assert ours["probs"] == vllms["probs"] == [0.0, 2.0]


async def test_a_long_text_is_truncated_on_the_requested_side_and_marked(
    artifact: Artifact,
) -> None:
    text = "good " * 20 + "bad " * 20
    async with client_of(artifact) as (client, _):
        right = (await classify(client, {"input": text})).json()["data"][0]
        first_cut = (await classify(client, {"input": text, "truncate": "left"})).json()["data"][0]
        none = await classify(client, {"input": ["good", text], "truncate": "none"})
    assert (right["label"], right["truncated"], right["tokens"]) == ("POSITIVE", True, MAX_TOKENS)
    assert first_cut["label"] == "NEGATIVE"
    assert none.status_code == 422
    assert none.json()["error"]["param"] == "input[1]"
    assert "42 tokens, the model reads 16" in none.json()["error"]["message"]


async def test_an_answer_does_not_depend_on_the_other_texts_of_its_batch(
    artifact: Artifact,
) -> None:
    async with client_of(artifact) as (client, _):
        alone = (await classify(client, {"input": "good"})).json()["data"][0]
        company = (await classify(client, {"input": ["good", "bad film a", "bad bad bad"]})).json()[
            "data"
        ][0]
    assert alone["probs"] == company["probs"]


async def test_a_text_on_which_the_model_fails_is_500_for_its_request_only(
    artifact: Artifact,
) -> None:
    async with client_of(artifact) as (client, _):
        poisoned, fine = await asyncio.gather(
            classify(client, {"input": "poison"}), classify(client, {"input": "good"})
        )
        endless = await classify(client, {"input": "endless"})
    assert poisoned.status_code == endless.status_code == 500
    assert poisoned.json()["error"]["code"] == "model_output_invalid"
    assert fine.status_code == 200


LONG_TEXT = "word " * 100_000

REFUSED: list[tuple[str, Any, int, str | None, str]] = [
    ("a broken document", b"{", 400, None, "not UTF-8 JSON"),
    ("bytes that are not UTF-8", b'{"input":"\xff"}', 400, None, "not UTF-8 JSON"),
    ("a lone surrogate", rb'{"input":"\ud800"}', 400, None, "surrogate"),
    ("a document that is no object", [1], 422, None, "must be an object"),
    ("no input", {}, 422, "input", "input is missing"),
    ("a number", {"input": 3}, 422, "input", "input is a number"),
    ("null", {"input": None}, 422, "input", "input is null"),
    ("token ids", {"input": [1, 2]}, 422, "input[0]", "input[0] is a number"),
    ("an empty text", {"input": ["good", " "]}, 422, "input[1]", "input[1] is empty"),
    ("an empty list", {"input": []}, 422, "input", "empty list"),
    ("half a pair", {"input": {"text_pair": "a"}}, 422, "input.text", "input.text is null"),
    ("a pair with more", {"input": {"text": "a", "label": "b"}}, 422, "input", "unknown field"),
    ("an unknown field", {"input": "a", "colour": 1}, 422, "colour", "colour is not a field"),
    ("a text by another name", {"text": "a"}, 422, "text", "did you mean input? Known are"),
    ("a misspelt field", {"input": "a", "modell": "b"}, 422, "modell", "did you mean model?"),
    ("both names", {"input": "a", "inputs": "b"}, 422, "inputs", "the same field"),
    ("top_k of nothing", {"input": "a", "top_k": 0}, 422, "top_k", "greater than or equal to 1"),
    ("top_k in words", {"input": "a", "top_k": "two"}, 422, "top_k", "valid integer"),
    (
        "a threshold above one",
        {"input": "a", "threshold": 1.5},
        422,
        "threshold",
        "less than or equal to 1",
    ),
    (
        "an unknown activation",
        {"input": "a", "activation": "relu"},
        422,
        "activation",
        "'auto', 'softmax'",
    ),
    ("a chat", {"input": "a", "messages": []}, 422, "messages", "messages is not supported"),
    ("a priority", {"input": "a", "priority": 1}, 422, "priority", "0"),
    ("an unknown model", {"input": "a", "model": "b"}, 404, "model", "loaded are reviews"),
    ("10,000 texts", {"input": ["a"] * 10_000}, 413, "input", "10000 texts, the limit is 1000"),
    (
        "a 100,000-word text",
        {"input": LONG_TEXT},
        413,
        "input",
        "500000 characters, the limit is 131072",
    ),
    (
        "a long half of a pair",
        {"input": [{"text": "a", "text_pair": LONG_TEXT}]},
        413,
        "input[0].text_pair",
        "the limit is 131072",
    ),
    (
        "a list of one that must not be cut",
        {"input": ["good " * 40], "truncate": "none"},
        422,
        "input[0]",
        "42 tokens",
    ),
    (
        "a 10 MB body",
        b'{"input":"' + b"a" * 10_000_000 + b'"}',
        413,
        "body",
        "the limit is 4194304",
    ),
]


@pytest.mark.parametrize(
    ("body", "status", "param", "words"),
    [case[1:] for case in REFUSED],
    ids=[case[0] for case in REFUSED],
)
async def test_invalid_input_gets_its_status_and_a_message_that_names_the_field(
    artifact: Artifact, body: Any, status: int, param: str | None, words: str
) -> None:
    async with client_of(artifact) as (client, _):
        response = await classify(client, body)
        after = await classify(client, {"input": "good"})
    error = response.json()["error"]
    assert response.status_code == status
    assert error["param"] == param
    assert words in error["message"]
    assert LONG_TEXT[:50] not in error["message"]
    assert after.status_code == 200


async def test_a_body_without_a_length_has_the_same_limit(artifact: Artifact) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield b"x" * 1000

    async with client_of(artifact, max_body_bytes=5000) as (client, _):
        response = await client.post("/classify", content=chunks())
    assert response.status_code == 413
    assert "more than 5000 bytes" in response.json()["error"]["message"]


async def test_a_nul_character_is_ordinary_text(artifact: Artifact) -> None:
    async with client_of(artifact) as (client, _):
        response = await classify(client, {"input": "good\u0000"})
    assert response.status_code == 200


@asynccontextmanager
async def stuck(service: ServiceState) -> AsyncIterator[None]:
    """Keep the model in its batch until the block ends."""
    gate, classifier = threading.Event(), next(iter(service.registry.loaded.values())).classifier
    begin = classifier.start

    def start(batch: Any, layout: Any = None) -> Callable[[], Any]:
        finish = begin(batch, layout)
        return lambda: gate.wait(10) and finish()

    classifier.start = start  # type: ignore[method-assign]
    try:
        yield
    finally:
        gate.set()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


async def test_a_full_queue_is_429_with_retry_after(artifact: Artifact) -> None:
    async with (
        client_of(artifact, max_queue_size=1, max_texts=1) as (client, service),
        stuck(service),
    ):
        tasks = [asyncio.create_task(classify(client, {"input": "good"}))]
        await until(lambda: service.lifecycle.active_requests == 1 and service.batcher.waiting == 0)
        tasks.append(asyncio.create_task(classify(client, {"input": "bad"})))
        await until(lambda: service.batcher.waiting == 1)
        response = await classify(client, {"input": "film"})
    assert response.status_code == 429
    assert int(response.headers["retry-after"]) >= 1
    assert "limit of 1" in response.json()["error"]["message"]
    assert [(await task).status_code for task in tasks] == [200, 200]


async def test_a_deadline_that_passes_is_504(artifact: Artifact) -> None:
    async with client_of(artifact, request_timeout_s=0.05) as (client, service), stuck(service):
        response = await classify(client, {"input": "good"})
    assert response.status_code == 504
    assert response.json()["error"]["code"] == "deadline_exceeded"


async def test_the_request_of_a_client_that_disconnects_is_not_computed(artifact: Artifact) -> None:
    async with client_of(artifact) as (client, service):
        app = build_app(HttpContext(service))
        async with stuck(service):
            task = asyncio.create_task(classify(client, {"input": "good"}))
            await until(
                lambda: service.lifecycle.active_requests == 1 and service.batcher.waiting == 0
            )
            disconnected = asyncio.Event()
            messages: list[Any] = [
                {"type": "http.request", "body": b'{"input":"bad"}', "more_body": False}
            ]

            async def receive() -> Any:
                if messages:
                    return messages.pop()
                await disconnected.wait()
                return {"type": "http.disconnect"}

            async def send(message: Any) -> None:
                pass

            scope = {
                "type": "http",
                "method": "POST",
                "path": "/classify",
                "headers": [],
                "query_string": b"",
                "http_version": "1.1",
            }
            leaving = asyncio.ensure_future(app(scope, receive, send))
            await until(lambda: service.batcher.waiting == 1)
            disconnected.set()
            await leaving
        assert (await task).status_code == 200
        await service.lifecycle.drain()
        value = service.metrics.registry.get_sample_value
        assert value("drbert_requests_total", {"model": "reviews", "code": "499"}) == 1
        assert value("drbert_tokens_total", {"model": "reviews"}) == 3


async def test_a_bug_is_a_500_with_its_ids_and_is_counted(
    artifact: Artifact, caplog: pytest.LogCaptureFixture
) -> None:
    async with client_of(artifact) as (client, service):
        service.registry.loaded["reviews"].classifier.encode = lambda *_: 1 / 0  # type: ignore[method-assign, assignment]
        response = await client.post(
            "/classify", content=b'{"input":"good"}', headers={"X-Request-Id": "mine-2"}
        )
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal_error"
    assert (response.headers["x-request-id"], response.headers["x-instance-id"]) == (
        "mine-2",
        service.instance_id,
    )
    assert (
        service.metrics.registry.get_sample_value(
            "drbert_requests_total", {"model": "reviews", "code": "500"}
        )
        == 1
    )
    assert any(getattr(record, "request_id", "") == "mine-2" for record in caplog.records)


async def test_of_thousands_of_unknown_fields_the_first_is_named(artifact: Artifact) -> None:
    body = b'{"input":"a",' + b",".join(b'"k%d":0' % i for i in range(12_000)) + b"}"
    async with client_of(artifact) as (client, _):
        response = await classify(client, body)
    assert response.json()["error"]["param"] == "k0"


async def test_all_but_liveness_is_503_while_models_are_loaded(artifact: Artifact) -> None:
    async with client_of(artifact, load=False) as (client, _):
        statuses = [
            (await client.get(path)).status_code for path in ("/livez", "/readyz", "/health")
        ]
        refused = await classify(client, {"input": "good"})
    assert statuses == [200, 503, 503]
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "not_ready"


async def test_a_full_queue_refuses_before_the_texts_are_tokenized(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with (
        client_of(artifact, max_queue_size=1, max_texts=1) as (client, service),
        stuck(service),
    ):
        tasks = [asyncio.create_task(classify(client, {"input": "good"}))]
        await until(lambda: service.lifecycle.active_requests == 1 and service.batcher.waiting == 0)
        tasks.append(asyncio.create_task(classify(client, {"input": "bad"})))
        await until(lambda: service.batcher.waiting == 1)
        [loaded] = service.registry.loaded.values()
        encoded: list[str] = []
        monkeypatch.setattr(loaded.classifier, "encode", lambda text, *_: encoded.append(text))
        assert (await classify(client, {"input": "film"})).status_code == 429
    assert encoded == []
    assert [(await task).status_code for task in tasks] == [200, 200]


async def test_failure_counters_start_at_zero_so_that_a_rate_shows_the_first(
    artifact: Artifact,
) -> None:
    async with client_of(artifact) as (_, service):
        value = service.metrics.registry.get_sample_value
        assert {
            value("drbert_requests_total", {"model": "reviews", "code": code})
            for code in ("200", "429", "500", "503", "504")
        } == {0.0}


async def test_while_draining_requests_are_refused(artifact: Artifact) -> None:
    async with client_of(artifact) as (client, service):
        assert (await client.get("/readyz")).status_code == 200
        await service.lifecycle.drain()
        assert (await client.get("/readyz")).status_code == 503
        refused = await classify(client, {"input": "good"})
    assert refused.json()["error"]["code"] == "shutting_down"


async def test_every_answer_has_its_stage_times_and_its_instance(artifact: Artifact) -> None:
    async with client_of(artifact) as (client, service):
        response = await client.post(
            "/classify", content=b'{"input":"good"}', headers={"X-Request-Id": "mine-1"}
        )
        other = await client.get("/livez")
    names = [part.strip().split(";")[0] for part in response.headers["server-timing"].split(",")]
    assert names == ["tokenize", "queue", "inference", "cpu", "batch", "total"]
    assert 'desc="b=1 t=4"' in response.headers["server-timing"]
    assert response.headers["x-request-id"] == "mine-1"
    assert response.json()["id"] == "classify-mine-1"
    assert (
        response.headers["x-instance-id"] == other.headers["x-instance-id"] == service.instance_id
    )


async def test_an_answer_names_its_batch_and_whether_its_shape_was_new(artifact: Artifact) -> None:
    batches = []
    async with client_of(artifact) as (client, service):
        [model] = service.registry.loaded.values()
        model.classifier._shapes_run.clear()
        for text in ("good", "good", "good good film"):
            response = await client.post("/classify", json={"input": text})
            batches += re.findall(r'batch;desc="(.*?)"', response.headers["server-timing"])
    assert batches == ["1 first", "2", "3 first"]


async def test_metrics_count_requests_texts_and_tokens(artifact: Artifact) -> None:
    async with client_of(artifact) as (client, service):
        await classify(client, {"input": ["good", "bad film"]})
        await classify(client, {"input": ""})
        page = (await client.get("/metrics")).text
    value = service.metrics.registry.get_sample_value
    assert value("drbert_requests_total", {"model": "reviews", "code": "200"}) == 1
    assert value("drbert_requests_total", {"model": "", "code": "422"}) == 1
    assert value("drbert_rejected_total", {"reason": "invalid_input"}) == 1
    assert value("drbert_tokens_total", {"model": "reviews"}) == 7
    assert value("drbert_inference_duration_seconds_count", {"model": "reviews"}) == 1
    assert value("drbert_queue_duration_seconds_count", {"model": "reviews"}) == 2
    assert value("drbert_inflight_requests") == 0
    assert 'drbert_model_info{digest="' in page


METRICS = {
    "requests_total",
    "request_duration_seconds",
    "tokenize_duration_seconds",
    "queue_duration_seconds",
    "inference_duration_seconds",
    "batch_size",
    "batch_tokens",
    "padding_tokens_total",
    "tokens_total",
    "truncated_total",
    "queue_depth",
    "inflight_requests",
    "rejected_total",
    "model_info",
    "ready",
    "event_loop_lag_seconds",
}


async def test_all_documented_metrics_are_exported(artifact: Artifact) -> None:
    async with client_of(artifact) as (client, _):
        page = (await client.get("/metrics")).text
    described = {line.split()[2] for line in page.splitlines() if line.startswith("# TYPE")}
    assert {f"drbert_{name}" for name in METRICS} <= described


async def test_info_lists_the_loaded_models_and_the_reasons(artifact: Artifact) -> None:
    async with client_of(artifact) as (client, service):
        info = (await client.get("/info")).json()
        listed = (await client.get("/v1/models")).json()
    model = info["models"]["reviews"]
    assert (model["variant"], model["runtime"], model["precision"]) == (
        "cpu-fp32",
        "openvino",
        "f32",
    )
    assert model["flush_to_zero"] is True
    assert model["digest"] == artifact.digest
    assert info["engines"]["openvino"] == importlib.metadata.version("openvino")
    assert info["instance_id"] == service.instance_id
    assert [entry["id"] for entry in listed["data"]] == ["reviews"]


@pytest.mark.parametrize(("truncate", "status"), [("right", 200), ("left", 422), ("none", 422)])
async def test_windows_and_another_truncation_are_refused_together(
    artifact: Artifact, truncate: str, status: int
) -> None:
    async with client_of(artifact) as (client, _):
        response = await classify(
            client, {"input": "good " * 40, "window": {}, "truncate": truncate}
        )
    assert response.status_code == status
    if status == 422:
        assert response.json()["error"]["param"] == "truncate"
        assert response.json()["error"]["message"].startswith(
            f"truncate {truncate} and window do not go together"
        )


async def test_the_docs_page_loads_nothing_from_another_host(artifact: Artifact) -> None:
    async with client_of(artifact) as (client, _):
        page = (await client.get("/docs")).text
        script = await client.get("/docs/files/swagger-ui-bundle.js")
    assert "https://" not in page
    assert script.status_code == 200


async def test_pages_find_their_files_and_the_service_behind_any_prefix(artifact: Artifact) -> None:
    async with client_of(artifact) as (client, _):
        pages = {
            path: (await client.get(path, headers={"Accept": "text/html"})).text
            for path in ("/", "/docs")
        }
        scripts = [(await client.get(path)).text for path in ("/page/page.js", "/page/docs.js")]
        for path, page in pages.items():
            linked = re.findall(r'(?:src|href)="([^"#:]+)"', page)
            assert linked
            assert not [
                link for link in linked if link.startswith("/")
            ]  # it would leave a proxy's prefix
            assert {
                (await client.get(str(httpx.URL("http://test").join(path).join(link)))).status_code
                for link in linked
            } == {200}
    assert not re.findall(r"""["'`]/\w""", "".join(scripts))


async def test_every_page_has_the_security_policy_under_every_path(artifact: Artifact) -> None:
    async with client_of(artifact) as (client, _):
        pages = [
            await client.get(path, headers={"Accept": "text/html"})
            for path in ("/", "/docs", "/page/index.html", "/page/docs.html")
        ]
    for page in pages:
        assert page.status_code == 200
        policy = page.headers["content-security-policy"]
        assert "default-src 'self'" in policy
        assert "unsafe" not in policy
        assert page.headers["x-content-type-options"] == "nosniff"


async def test_the_docs_page_pins_the_digests_of_its_scripts(artifact: Artifact) -> None:
    """The digests are those of Swagger UI's own release on npm.

    The Python package that bundles the files has one maintainer.
    """
    async with client_of(artifact) as (client, _):
        page = (await client.get("/docs")).text
        digests = re.findall(r'="(docs/files/[^"]+)" integrity="sha384-([^"]+)"', page)
        for path, digest in digests:
            served = (await client.get(f"/{path}")).content
            assert base64.b64encode(hashlib.sha384(served).digest()).decode() == digest
    assert {path for path, _ in digests} == set(re.findall(r"docs/files/[^\"]+", page))
    assert len(digests) == 2


async def test_an_unknown_path_is_answered_in_the_error_format(artifact: Artifact) -> None:
    async with client_of(artifact) as (client, _):
        missing, wrong = await client.get("/nope"), await client.get("/classify")
    assert (missing.status_code, wrong.status_code) == (404, 405)
    assert missing.json()["error"]["code"] == "not_found"


@pytest.mark.parametrize("name", ["input", "inputs"])
async def test_input_and_inputs_are_the_same_field(artifact: Artifact, name: str) -> None:
    async with client_of(artifact) as (client, _):
        assert (await classify(client, {name: "good"})).json()["data"][0]["label"] == "POSITIVE"


async def test_an_injected_delay_is_refused_unless_it_is_turned_on(
    artifact: Artifact,
) -> None:
    async with client_of(artifact) as (client, _):
        refused = await client.post(
            "/classify", content=b'{"input":"good"}', headers={"X-Busy-Wait": "0.06"}
        )
    assert refused.status_code == 422
    assert "DRBERT_BUSY_WAIT=loopback turns it on" in refused.json()["error"]["message"]
    async with client_of(artifact, busy_wait="loopback") as (client, _):
        allowed = await client.post(
            "/classify", content=b'{"input":"good"}', headers={"X-Busy-Wait": "0.06"}
        )
        assert (await client.get("/info")).json()["settings"]["busy_wait"] == "loopback"
        for nonsense in ("2", "-1", "nan", "much"):
            wrong = await client.post(
                "/classify", content=b'{"input":"good"}', headers={"X-Busy-Wait": nonsense}
            )
            assert wrong.status_code == 422
    assert allowed.status_code == 200


async def test_a_service_that_is_full_for_too_long_is_not_ready_if_configured(
    artifact: Artifact,
) -> None:
    async with client_of(artifact, max_queue_size=1, max_texts=1, saturated_after_s=0.01) as (
        client,
        service,
    ):
        async with stuck(service):
            tasks = [asyncio.create_task(classify(client, {"input": "good"}))]
            await until(
                lambda: service.lifecycle.active_requests == 1 and service.batcher.waiting == 0
            )
            tasks.append(asyncio.create_task(classify(client, {"input": "bad"})))
            await until(lambda: service.batcher.waiting == 1)
            assert (await client.get("/readyz")).status_code == 200
            assert (await classify(client, {"input": "film"})).status_code == 429
            await until(lambda: service.batcher.queue.full_for_s > 0.01)
            full = await client.get("/readyz")
        assert [(await task).status_code for task in tasks] == [200, 200]
        assert (await client.get("/readyz")).status_code == 200
    assert full.status_code == 503
    assert "The queue has been full for" in full.json()["error"]["message"]


async def test_only_configured_origins_may_call(
    artifact: Artifact,
) -> None:
    preflight = {
        "Origin": "https://a.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "content-type",
    }
    async with client_of(artifact) as (client, _):
        silent = await client.post(
            "/classify", json={"input": "good"}, headers={"Origin": "https://a.example"}
        )
    async with client_of(artifact, cors_origins="https://a.example, https://b.example") as (
        client,
        _,
    ):
        before = await client.options("/classify", headers=preflight)
        allowed = await client.post(
            "/classify", json={"input": "good"}, headers={"Origin": "https://a.example"}
        )
        other = await client.options(
            "/classify", headers=preflight | {"Origin": "https://c.example"}
        )
    assert "access-control-allow-origin" not in silent.headers
    assert (
        before.headers["access-control-allow-origin"]
        == allowed.headers["access-control-allow-origin"]
        == "https://a.example"
    )
    assert "Server-Timing" in allowed.headers["access-control-expose-headers"]
    assert other.status_code == 400


async def test_a_stalled_engine_makes_the_service_not_ready_until_it_returns(
    artifact: Artifact,
) -> None:
    async with client_of(artifact) as (client, service):
        ready = service.metrics.registry.get_sample_value
        service.lifecycle.set_stalled(True)
        assert (await client.get("/readyz")).status_code == 503
        assert (await classify(client, {"input": "good"})).status_code == 503
        assert ready("drbert_ready") == 0
        service.lifecycle.set_stalled(False)
        assert (await client.get("/readyz")).status_code == 200
        assert ready("drbert_ready") == 1
        await service.lifecycle.drain()
        service.lifecycle.set_stalled(False)  # a draining server is not ready, stalled or not
        assert ready("drbert_ready") == 0


@pytest.mark.parametrize(
    "path",
    [
        "/livez",
        "/readyz",
        "/health",
        "/v2/health/live",
        "/v2/health/ready",
        "/metrics",
        "/",
        "/info",
        "/v1/models",
        "/docs",
    ],
)
async def test_head_is_answered_as_get_without_its_body(artifact: Artifact, path: str) -> None:
    async with client_of(artifact) as (client, _):
        got, headed = await client.get(path), await client.head(path)
    assert headed.status_code == got.status_code == 200
    assert headed.content == b""
    assert headed.headers["content-type"] == got.headers["content-type"]


async def test_a_405_lists_all_methods_of_its_path(
    artifact: Artifact,
) -> None:
    async with client_of(artifact) as (client, _):
        allowed = {
            path: (await client.put(path)).headers["allow"] for path in ("/", "/livez", "/classify")
        }
    assert allowed == {"/": "GET, HEAD, POST", "/livez": "GET, HEAD", "/classify": "POST"}


@pytest.mark.parametrize("path", ["/classify/", "/predict/", "/livez/", "/v1/models/"])
async def test_a_trailing_slash_is_404_and_not_redirected(artifact: Artifact, path: str) -> None:
    async with client_of(artifact) as (client, _):
        answer = await client.request(
            "GET" if path in ("/livez/", "/v1/models/") else "POST",
            path,
            content=b'{"input": "good"}',
        )
    assert answer.status_code == 404
    assert "location" not in answer.headers
    assert answer.json()["error"]["code"] == "not_found"
