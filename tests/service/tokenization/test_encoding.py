"""Windows over long texts, and the limit of a request's tokens."""

from __future__ import annotations

import itertools
import math
import re
import threading
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, processors

from service.artifact import Artifact
from service.classifier import Classifier, Encoded
from service.runtimes.auto import choose, load
from service.tokenization.encoding import MAX_CHARS_ON_LOOP
from tests.factories import MAX_TOKENS, write_artifact
from tests.service.http.test_routes import classify, client_of, until

ROOM = MAX_TOKENS - 2  # [CLS] and [SEP] are in every window


@pytest.fixture
def classifier(artifact: Artifact) -> Classifier:
    return Classifier(artifact, load(artifact, choose(artifact), 1))


@pytest.mark.parametrize("words", [1, ROOM, ROOM + 1, 40])
@pytest.mark.parametrize("stride", [0, 3, ROOM - 1])
def test_windows_hold_every_token_and_share_the_stride(
    classifier: Classifier, words: int, stride: int
) -> None:
    text = " ".join(["good", "bad", "film", "a", "b", "c"][i % 6] for i in range(words))
    tokens = classifier.tokens(text)
    windows = [
        list(classifier.window(tokens, start).ids)
        for start in classifier.window_starts(len(tokens), stride)
    ]
    whole = list(classifier.encode("good bad film a b c").ids)[1:-1]
    expected = [whole[i % 6] for i in range(words)]
    assert all(
        len(ids) <= MAX_TOKENS and ids[0] == windows[0][0] and ids[-1] == windows[0][-1]
        for ids in windows
    )
    tokens = windows[0][1:-1]
    for before, after in itertools.pairwise(windows):
        assert stride == 0 or after[1 : 1 + stride] == before[-1 - stride : -1]
        tokens += after[1 + stride : -1]
    assert tokens == expected


async def test_a_long_text_is_classified_by_windows_on_request(artifact: Artifact) -> None:
    # Ten good words, then ten bad ones and more of them: cut, it is good; as a whole it is not.
    text = "good " * 10 + "bad " * 30
    async with client_of(artifact) as (client, _):
        cut = await classify(client, {"input": text})
        whole = [
            (await classify(client, {"input": text, "window": window})).json()["data"][0]
            for window in (
                {"stride": 0},
                {"stride": 0, "pool": "max"},
                {"stride": 0, "pool": "first"},
                {},
            )
        ]
        logits = (
            await classify(client, {"input": text, "window": {"stride": 0}, "activation": "none"})
        ).json()["data"][0]
    mean, most, first, default = whole
    # Windows of 14 words: 10 good and 4 bad, 14 bad, 12 bad.
    assert logits["probs"] == pytest.approx([(4 + 14 + 12) / 3, 10 / 3])
    assert mean["probs"][0] == pytest.approx(1 / (1 + math.exp(10 / 3 - 10)))
    assert most["probs"][0] == pytest.approx(1 / (1 + math.exp(10 - 14)))
    assert first["probs"] == pytest.approx(cut.json()["data"][0]["probs"])
    assert (cut.json()["data"][0]["label"], mean["label"]) == ("POSITIVE", "NEGATIVE")
    assert [(result["windows"], result["tokens"], result["truncated"]) for result in whole] == [
        (3, 40 + 6, False),
        (3, 40 + 6, False),
        (1, 16, True),
        (default["windows"], default["tokens"], False),
    ]
    assert default["windows"] > 3  # they share half a window
    assert "windows" not in cut.json()["data"][0]


async def test_windowed_texts_keep_their_order_and_their_answers(artifact: Artifact) -> None:
    texts = ["good", "bad " * 40, "good " * 20, "bad"]
    async with client_of(artifact) as (client, _):
        together = (await classify(client, {"input": texts, "window": {"stride": 2}})).json()[
            "data"
        ]
        alone = [
            (await classify(client, {"input": text, "window": {"stride": 2}})).json()["data"][0]
            for text in texts
        ]
    assert [result["label"] for result in together] == [
        "POSITIVE",
        "NEGATIVE",
        "POSITIVE",
        "NEGATIVE",
    ]
    assert [result | {"index": 0} for result in together] == alone


@pytest.mark.parametrize(
    ("body", "status", "param", "message"),
    [
        (
            {"input": "good", "window": {"stride": ROOM}},
            422,
            "window.stride",
            (
                f"window.stride: A window holds {ROOM} tokens of the text, so with a stride of"
                f" {ROOM} no window adds a token; give at most {ROOM - 1}."
            ),
        ),
        (
            {"input": ["good", "bad " * 60], "window": {"stride": 0}},
            413,
            "input[1]",
            "input[1] takes at least 5 windows, the limit is 4; send it in parts.",
        ),
        (
            {"input": {"text": "good", "text_pair": "bad"}, "window": {}},
            422,
            "input.text_pair",
            "input.text_pair: windows are of single texts; classify a pair without them.",
        ),
        ({"input": "good", "window": {"stride": -1}}, 422, "window.stride", None),
        ({"input": "good", "window": {"pool": "median"}}, 422, "window.pool", None),
        ({"input": "good", "window": {"size": 4}}, 422, "window.size", None),
        (
            {"input": ["good"] * 5 + ["bad " * 40] * 4, "window": {}},
            413,
            "input",
            "input makes more windows than the 20 that the queue holds; send several requests.",
        ),
    ],
)
async def test_impossible_windows_are_refused_by_name(
    artifact: Artifact, body: Any, status: int, param: str | None, message: str | None
) -> None:
    async with client_of(
        artifact,
        max_windows=6 if message is None or "queue" in message else 4,
        max_queue_size=20,
        max_texts=20,
    ) as (client, _):
        response = await classify(client, body)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (status, param)
    assert message is None or error["message"] == message


async def test_a_requests_tokens_can_be_limited(artifact: Artifact) -> None:
    async with client_of(artifact, max_request_tokens=10) as (client, _):
        fits = await classify(client, {"input": ["good film", "bad film"]})  # four tokens each
        refused = await classify(client, {"input": ["good film", "bad film", "film"]})
    assert fits.status_code == 200
    assert refused.status_code == 413
    assert (
        refused.json()["error"]["message"]
        == "input has 11 tokens, the limit of a request is 10; send several requests."
    )


@pytest.mark.parametrize("task", ["multi_label", "regression"])
async def test_windows_work_for_every_task(tmp_path: Path, task: str) -> None:
    labels = ["NEGATIVE", "POSITIVE"] if task == "multi_label" else ["stars"]
    artifact = write_artifact(tmp_path / "reviews", labels=labels, task=task)
    async with client_of(artifact) as (client, _):
        [answer] = (
            await classify(client, {"input": "bad " * 28, "window": {"stride": 0, "pool": "max"}})
        ).json()["data"]
    assert answer["windows"] == 2
    assert answer["score"] == pytest.approx(
        1 / (1 + math.exp(-14)) if task == "multi_label" else 14.0
    )


@pytest.mark.parametrize("frame", ["bert", "roberta", "bare"])
@pytest.mark.parametrize(
    ("words", "stride"),
    [(0, 0), (1, 3), (ROOM, 0), (ROOM + 1, 0), (ROOM + 1, 3), (40, 5), (55, ROOM - 1)],
)
def test_windows_equal_those_of_the_tokenizers_library(
    artifact: Artifact, frame: str, words: int, stride: int
) -> None:
    tokenizer = Tokenizer.from_file(str(artifact.path("tokenizer.json")))
    if frame == "roberta":
        tokenizer.post_processor = processors.RobertaProcessing(("[SEP]", 3), ("[CLS]", 2))
    if frame == "bare":
        tokenizer.post_processor = processors.TemplateProcessing(
            single="$A", pair="$A $B:1", special_tokens=[]
        )
    tokenizer.save(str(artifact.path("tokenizer.json")))
    classifier = Classifier(artifact, load(artifact, choose(artifact), 1))
    text = " ".join(["good", "bad", "film"][i % 3] for i in range(words))
    tokenizer.enable_truncation(MAX_TOKENS, stride=stride)
    whole = tokenizer.encode(text)
    tokens = classifier.tokens(text)
    windows = [
        classifier.window(tokens, start) for start in classifier.window_starts(len(tokens), stride)
    ]
    # What has no tokens at all is one of padding to us.
    assert [(list(window.ids), list(window.type_ids)) for window in windows] == [
        (window.ids or [0], window.type_ids or [0]) for window in (whole, *whole.overflowing)
    ]


async def test_a_text_of_too_many_windows_is_refused_before_they_are_made(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Classifier, "window", lambda *_: pytest.fail("a window was cut"))
    async with client_of(artifact) as (client, _):
        response = await classify(
            client, {"input": "bad " * 20_000, "window": {"stride": ROOM - 1}}
        )
    assert response.status_code == 413
    assert re.match(
        "input takes at least [0-9]+ windows, the limit is 64", response.json()["error"]["message"]
    )


async def test_the_deadline_holds_while_texts_are_tokenized(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts, go_on = [], threading.Event()
    encode = Classifier.encode

    def slow(self: Classifier, text: str, *more: Any) -> Encoded:
        texts.append(text)
        assert go_on.wait(10)
        return encode(self, text, *more)

    long = "bad " * MAX_CHARS_ON_LOOP
    async with client_of(artifact) as (client, service):
        monkeypatch.setattr(Classifier, "encode", slow)
        response = await client.post(
            "/classify", json={"input": [long, long]}, headers={"X-Request-Timeout-Ms": "20"}
        )
        assert (response.status_code, response.json()["error"]["code"]) == (
            504,
            "deadline_exceeded",
        )
        go_on.set()
        await until(lambda: not service.executors.running)
    assert texts == [long]  # the second text was not tokenized


async def test_many_short_texts_are_tokenized_in_a_thread(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_the_loop: list[bool] = []
    encode, loop_thread = Classifier.encode, threading.current_thread()

    def noted(self: Classifier, *arguments: Any) -> Encoded:
        on_the_loop.append(threading.current_thread() is loop_thread)
        return encode(self, *arguments)

    monkeypatch.setattr(Classifier, "encode", noted)
    async with client_of(artifact) as (client, _):
        for count, expected in ((2, True), (200, False)):
            on_the_loop.clear()
            assert (
                await client.post("/classify", json={"input": ["a"] * count})
            ).status_code == 200
            assert on_the_loop == [expected] * count
