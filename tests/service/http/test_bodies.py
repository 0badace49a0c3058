"""Few large bodies are in memory at a time, and JSON that is expensive to parse is not parsed."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator
from typing import Any

import httpx
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.artifact import Artifact
from service.errors import Overloaded, TooLarge
from service.http.context import HttpContext
from service.http.routes import build_app
from service.http.transport import bodies
from service.http.transport.bodies import SMALL_BYTES, LargeBodies
from service.requests import json_structure
from service.requests.json_structure import check_structure
from tests.service.http.test_protocol import listening
from tests.service.http.test_routes import classify, client_and_context, client_of, until

BOMBS = {
    "lists": b'{"input": [' + b"[]," * 100_000 + b"[]]}",
    "objects": b'{"input": [' + b'{"":0},' * 100_000 + b"{}]}",
    "fields": b"{" + b",".join(b'"%d":0' % number for number in range(100_000)) + b"}",
    "nested": b'{"input": [' + (b"[" * 900 + b"]" * 900 + b",") * 100 + b"0]}",
    "numbers": b'{"input": [' + b"0," * 100_000 + b"0]}",
    "strings": b'{"input": [' + b'"\\"",' * 100_000 + b'""]}',
    "behind a text": b'{"input": "' + b"a" * 300_000 + b'", "x": [' + b"[]," * 100_000 + b"0]}",
    "small": b'{"input": [' + b"[]," * 20_000 + b"[]]}",
    "list": b"[" + b"[]," * 100_000 + b"[]]",
}


@pytest.mark.parametrize("bomb", BOMBS)
@pytest.mark.parametrize(
    "path", ["/classify", "/predict", "/", "/v1/models/reviews:predict", "/v2/models/reviews/infer"]
)
async def test_json_that_is_expensive_to_parse_is_refused_unparsed(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch, bomb: str, path: str
) -> None:
    monkeypatch.setattr(orjson, "loads", lambda body: pytest.fail("it was parsed"))
    async with client_of(artifact) as (client, _):
        response = await client.post(path, content=BOMBS[bomb])
    assert response.status_code == 413
    assert (
        "more than 24384 values and fields; a request of 1000 texts, the limit, has fewer"
        in response.text
    )


TEXT = 'commas, brackets [[{{ and "quotes" \\ of \\" every kind: \\\\, "'


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/classify", {"input": [TEXT * 20] * 1000}),
        ("/classify", {"input": [{"text": TEXT * 20, "text_pair": TEXT}] * 1000, "top_k": 1}),
        ("/predict", {"inputs": [[TEXT, TEXT]] * 1000}),
        ("/", {"inputs": [",[{:" * 800] * 1000}),
        ("/v1/models/reviews:predict", {"instances": [TEXT] * 1000}),
        (
            "/v2/models/reviews/infer",
            {
                "inputs": [
                    {"name": name, "shape": [1000, 1], "datatype": "BYTES", "data": [[TEXT]] * 1000}
                    for name in ("text", "text_pair")
                ]
            },
        ),
    ],
)
@pytest.mark.parametrize("indent", [None, 8])
async def test_requests_at_the_size_limits_are_answered(
    artifact: Artifact, path: str, body: Any, indent: int | None
) -> None:
    # Two million tokens take a busy machine longer than the default.
    async with client_of(artifact, request_timeout_s=600) as (client, _):
        response = await client.post(path, content=json.dumps(body, indent=indent))
    assert response.status_code == 200, response.text[:300]


async def test_bytes_of_a_binary_tensor_do_not_count_as_json_structure(artifact: Artifact) -> None:
    texts = [',[{:"' * 50] * 1000
    packed = b"".join(len(text).to_bytes(4, "little") + text.encode() for text in texts)
    head = json.dumps(
        {
            "inputs": [
                {
                    "name": "text",
                    "shape": [1000],
                    "datatype": "BYTES",
                    "parameters": {"binary_data_size": len(packed)},
                }
            ]
        }
    ).encode()
    async with client_of(artifact) as (client, _):
        response = await client.post(
            "/v2/models/reviews/infer",
            content=head + packed,
            headers={"Inference-Header-Content-Length": str(len(head))},
        )
    assert response.status_code == 200


VALUES = st.recursive(
    st.none() | st.integers(-9, 9) | st.text(alphabet='"\\,[{:a\n\u00e9', max_size=12),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(alphabet='"\\,:', max_size=3), inner, max_size=3)
    ),
    max_leaves=30,
)


@given(value=VALUES, size=st.integers(1, 7), spaces=st.booleans())
def test_only_characters_outside_of_strings_count_as_structure(
    value: Any, size: int, spaces: bool
) -> None:
    body = json.dumps({"input": value}, indent=1 if spaces else None).encode()

    def marks(part: Any) -> int:
        """Return the number of opening brackets, colons, and commas between members."""
        if isinstance(part, list):
            return 1 + max(0, len(part) - 1) + sum(map(marks, part))
        if isinstance(part, dict):
            return 1 + max(0, len(part) - 1) + len(part) + sum(map(marks, part.values()))
        return 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_structure, "_SLICE_BYTES", size)
        patch.setattr(json_structure, "MIN_CHECKED_BYTES", 0)
        patch.setattr(json_structure, "MARKS_PER_TEXT", 1)
        patch.setattr(json_structure, "SPARE_MARKS", 0)
        count = marks(orjson.loads(body))
        check_structure(body, count)
        with pytest.raises(TooLarge):
            check_structure(body, count - 1)


def test_a_body_that_is_not_an_object_passes_the_structure_check() -> None:
    check_structure(b"\x1f\x8b" + random.Random(0).randbytes(4_000_000), 1)
    check_structure(b'"' + b"," * 1_000_000, 1)
    check_structure(b"\xff\xfe" + ("{" + "," * 100_000).encode("utf-16-le"), 1)


async def test_large_bodies_wait_unread_for_their_turn(artifact: Artifact) -> None:
    """Two bodies have room, and the third is read once one of them is answered.

    Small bodies never wait.
    """
    taken: list[int] = []
    go_on = asyncio.Event()
    text = json.dumps({"input": ["good"] * 10, "user": "a" * 90_000}).encode()

    async def slowly(number: int) -> AsyncIterator[bytes]:
        taken.append(number)
        yield text[:-1]
        await go_on.wait()
        yield text[-1:]

    async with client_and_context(artifact, max_body_bytes=100_000) as (client, context):
        context.large_bodies = LargeBodies(200_000)
        large = [
            asyncio.create_task(
                client.post(
                    "/classify", content=slowly(number), headers={"Content-Length": str(len(text))}
                )
            )
            for number in range(4)
        ]
        await until(lambda: len(taken) == 2)
        small = await classify(client, {"input": "good"})
        assert small.status_code == 200
        assert context.large_bodies.is_contended
        assert len(taken) == 2
        go_on.set()
        assert [(await task).status_code for task in large] == [200] * 4
        assert not context.large_bodies.is_contended
        assert context.large_bodies._free == 200_000


async def test_a_large_body_without_room_in_time_is_429(artifact: Artifact) -> None:
    hold = asyncio.Event()

    async def never() -> AsyncIterator[bytes]:
        yield b"{"
        await hold.wait()
        yield b"}"

    async with client_and_context(artifact, max_body_bytes=SMALL_BYTES + 1) as (client, context):
        context.large_bodies = LargeBodies(2 * SMALL_BYTES + 2)
        size = {"Content-Length": str(SMALL_BYTES + 1)}
        holding = [
            asyncio.create_task(client.post("/classify", content=never(), headers=size))
            for _ in range(2)
        ]
        await until(lambda: context.large_bodies._free == 0)
        refused = await client.post(
            "/classify", content=b" " * (SMALL_BYTES + 1), headers={"X-Request-Timeout-Ms": "40"}
        )
        hold.set()
        await asyncio.gather(*holding)
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
    assert "The large bodies of other requests took all of" in refused.json()["error"]["message"]


async def test_a_slow_body_makes_room_for_bodies_that_wait(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bodies, "READ_TIMEOUT_S", 0.02)
    monkeypatch.setattr(bodies, "RECHECK_S", 0.02)
    head = (
        f"POST /classify HTTP/1.1\r\nHost: a\r\nContent-Length: {SMALL_BYTES + 1}\r\n\r\n".encode()
    )
    body = json.dumps({"input": "good"}).encode().ljust(SMALL_BYTES + 1)
    async with (
        client_and_context(artifact, max_body_bytes=SMALL_BYTES + 1) as (_, context),
        listening(build_app(context)) as connect,
    ):
        context.large_bodies = LargeBodies(2 * SMALL_BYTES + 2)
        slow = [await connect() for _ in range(3)]
        for _, writer in slow[:2]:
            writer.write(head + body[:10])
        await until(lambda: context.large_bodies._free == 0)
        await asyncio.sleep(0.1)  # nothing waits for their room yet
        slow[0][1].write(body[10:])
        assert (await slow[0][0].readline()).startswith(b"HTTP/1.1 200")
        slow[2][1].write(head + body[:10])
        await until(lambda: context.large_bodies._free == 0)
        reader, writer = await connect()
        writer.write(head + body)
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        # One of the two has made room, whichever was looked at first.
        reads = [asyncio.create_task(held.readuntil(b"}}")) for held, _ in slow[1:]]
        done, others = await asyncio.wait(reads, return_when=asyncio.FIRST_COMPLETED)
        refused = done.pop().result()
        for task in others:
            task.cancel()
    assert b"HTTP/1.1 408" in refused
    assert b"10 bytes of the body arrived within 0.02 s, while others wait" in refused


async def test_a_body_without_a_length_takes_room_once_it_is_large(artifact: Artifact) -> None:
    free_bytes: list[int] = []

    async def chunks(context: HttpContext) -> AsyncIterator[bytes]:
        free_bytes.append(context.large_bodies._free)
        yield b" " * SMALL_BYTES
        yield b" " * 10
        free_bytes.append(context.large_bodies._free)
        yield b'{"input": "good"}'

    async with client_and_context(artifact, max_body_bytes=100_000) as (client, context):
        response = await client.post("/classify", content=chunks(context))
        assert response.status_code == 200
        assert free_bytes == [100_000, 0]
        assert context.large_bodies._free == 100_000


async def test_a_large_body_is_refused_at_once_if_too_many_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bodies, "MAX_WAITING", 2)
    room = LargeBodies(10)
    await room.acquire(10, 0)
    waiting = [asyncio.create_task(room.acquire(5, 30)) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(Overloaded, match="2 large bodies wait to be read, the limit"):
        await room.acquire(5, 30)
    room.release(10)
    await asyncio.gather(*waiting)


async def test_the_budget_stays_exact_when_callers_are_cancelled() -> None:
    room, draw = LargeBodies(100), random.Random(0)

    async def use_room() -> None:
        size = draw.randint(1, 100)
        await room.acquire(size, draw.choice((0.0, 0.01, 10)))
        try:
            await asyncio.sleep(draw.choice((0, 0.001)))
        finally:
            room.release(size)

    for _ in range(20):
        tasks = [asyncio.create_task(use_room()) for _ in range(20)]
        await asyncio.sleep(draw.choice((0, 0.001)))
        for task in draw.sample(tasks, 5):
            task.cancel()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(
            error is None or isinstance(error, asyncio.CancelledError | Overloaded)
            for error in done
        )
        assert (room._free, room.is_contended) == (100, False)


async def test_a_refused_request_is_counted_for_the_model_that_it_names(artifact: Artifact) -> None:
    requests: list[tuple[str, dict[str, Any]]] = [
        ("/classify", {"model": "reviews", "input": 5}),
        ("/v1/classify", {"model": "reviews", "inputs": [], "x": 1}),
        ("/models/reviews", {"inputs": 5}),
        ("/v1/models/reviews:predict", {"instances": 5}),
        ("/v2/models/reviews/infer", {}),
        ("/classify", {"model": "other", "input": 5}),
        ("/classify", {"model": ["reviews"], "input": 5}),
        ("/classify", {"input": 5}),
    ]
    async with client_of(artifact) as (client, service):
        answers: list[httpx.Response] = [
            await client.post(path, json=body) for path, body in requests
        ]
        counted = {
            (sample.labels["model"], sample.labels["code"]): sample.value
            for family in service.metrics.registry.collect()
            for sample in family.samples
            if sample.name == "drbert_requests_total" and sample.value
        }
    assert {answer.status_code for answer in answers} == {400, 422}
    assert counted == {("reviews", "422"): 4, ("reviews", "400"): 1, ("", "422"): 3}
