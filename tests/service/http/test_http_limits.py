"""Every part of an HTTP message has a limit, and messages within the limits are answered."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import signal
import socket
import ssl
import struct
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trustme
import uvloop
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from service import server
from service.artifact import Artifact
from service.http.admin import build_admin
from service.http.context import HttpContext, RequestHooks
from service.http.keys import Keys
from service.http.routes import build_app
from service.http.transport import exchange, protocol
from service.http.transport.exchange import ConnectionPolicy, Exchange
from service.http.transport.protocol import LimitedHttpProtocol
from service.http.transport.request import (
    ClientDisconnected,
    cancel_on_disconnect,
    exchange_of,
)
from service.settings import Settings
from service.state import ServiceState
from tests.service.http.test_protocol import listening
from tests.service.http.test_routes import stuck, until
from tests.service.test_server import running

Connect = Callable[[], Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]
HOST = b"Host: localhost\r\n"


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with the names of the headers, and the size and end of the body."""
    try:
        body = await Request(scope, receive).body()
    except ClientDisconnect:
        return
    headers = [name.decode("latin-1") for name, _ in scope["headers"]]
    await JSONResponse(
        {
            "headers": headers,
            "bytes": len(body),
            "end": body[-20:].decode("latin-1"),
            "path": scope["path"],
        }
    )(scope, receive, send)


async def no(scope: Scope, receive: Receive, send: Send) -> None:
    """Refuse without reading the body."""
    await PlainTextResponse("no", 401)(scope, receive, send)


async def answer_of(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
    """Return the status, headers and body of the next answer."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    lines = head.split("\r\n")
    headers = {
        name.lower(): value.strip()
        for name, _, value in (line.partition(":") for line in lines[1:] if line)
    }
    return (
        int(lines[0].split()[1]),
        headers,
        await reader.readexactly(int(headers["content-length"])),
    )


async def tell(connect: Connect, *segments: bytes) -> tuple[int, dict[str, str], bytes]:
    """Send segments over a new connection, and return the answer."""
    reader, writer = await connect()
    for segment in segments:
        writer.write(segment)
        await writer.drain()
        await asyncio.sleep(0.01)
    return await answer_of(reader)


async def sent_until_refused(
    connect: Connect, head: bytes, endless: bytes, most: int
) -> tuple[int, bytes]:
    """Send an endless message until the connection is closed, at most `most` bytes.

    Return the bytes sent, and the answer if it could be read.
    """
    reader, writer = await connect()
    writer.write(head)
    sent = 0
    with contextlib.suppress(ConnectionError):
        while sent < most:
            writer.write(endless)
            sent += len(endless)
            await writer.drain()
            await asyncio.sleep(0)
    answer = b""
    with contextlib.suppress(ConnectionError):
        answer = await reader.read()
    return sent, answer


def chunked(*chunks: bytes, trailers: bytes = b"") -> bytes:
    return (
        b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks)
        + b"0\r\n"
        + trailers
        + b"\r\n"
    )


CHUNKED_HEAD = b"POST /classify HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n"
TRAILERS = (
    b"X-API-Key: secret\r\nX-Request-Id: mine\r\nX-Request-Timeout-Ms: 0.001\r\nX-Busy-Wait: 1\r\n"
)


# Trailers


@pytest.mark.parametrize("segments", [1, 2, 3])
async def test_trailers_are_dropped_wherever_the_packets_end(segments: int) -> None:
    async with listening(echo) as connect:
        body = chunked(b"abc", trailers=TRAILERS)
        cut = [(CHUNKED_HEAD + body,), (CHUNKED_HEAD, body), (CHUNKED_HEAD, body[:20], body[20:])][
            segments - 1
        ]
        status, _, answer = await tell(connect, *cut)
    assert status == 200
    assert json.loads(answer) == {
        "headers": ["host", "transfer-encoding"],
        "bytes": 3,
        "end": "abc",
        "path": "/classify",
    }


async def test_the_last_trailer_is_not_a_header_of_the_next_request() -> None:
    async with listening(echo) as connect:
        reader, writer = await connect()
        writer.write(
            CHUNKED_HEAD
            + chunked(b"abc", trailers=TRAILERS)
            + b"GET /next HTTP/1.1\r\n"
            + HOST
            + b"\r\n"
        )
        await answer_of(reader)
        assert json.loads((await answer_of(reader))[2])["headers"] == ["host"]


@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize("together", [False, True])
async def test_an_api_key_in_a_trailer_is_ignored(
    artifact: Artifact, tmp_path: Path, private: bool, together: bool
) -> None:
    (tmp_path / "keys").write_text("secret\n")
    keys = Keys(tmp_path / "keys")
    service = ServiceState({"reviews": artifact}, Settings(warm_up_s=0))
    service.lifecycle.load()
    app = (
        build_admin(HttpContext(service), keys)
        if private
        else build_app(HttpContext(service, RequestHooks(keys=keys)))
    )
    target = b"POST /models/reviews" if private else b"POST /classify"
    head = (
        target
        + b" HTTP/1.1\r\n"
        + HOST
        + b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    async with listening(app) as connect:
        body = chunked(b"{}" if private else b'{"input": "good"}', trailers=TRAILERS)
        assert (await tell(connect, *((head + body,) if together else (head, body))))[0] == 401
        with_key = head.replace(HOST, HOST + b"X-API-Key: secret\r\n")
        wrong = body.replace(b"X-API-Key: secret", b"X-API-Key: wrong!")
        assert (await tell(connect, *((with_key + wrong,) if together else (with_key, wrong))))[
            0
        ] == 200
    await service.lifecycle.drain()


@pytest.mark.parametrize(
    "endless",
    [b"a:b\r\n" * 4000, b"a" * 20_000, b"Name: " + b"a" * 20_000 + b"\r\n"],
    ids=["many", "one without an end", "long ones"],
)
@pytest.mark.parametrize("app", [echo, no])
async def test_trailers_without_an_end_are_refused(endless: bytes, app: ASGIApp) -> None:
    async with listening(app, ConnectionPolicy(linger_bytes=100_000)) as connect:
        sent, answer = await sent_until_refused(
            connect, CHUNKED_HEAD + b"0\r\nName: ", endless, 64 * 1024 * 1024
        )
    assert sent < 16 * 1024 * 1024  # no more than both sides' socket buffers
    assert not answer or answer.startswith((b"HTTP/1.1 4",))


async def test_trailers_have_at_most_as_many_lines_as_a_head() -> None:
    async with listening(echo) as connect:
        assert (await tell(connect, CHUNKED_HEAD + chunked(b"a", trailers=b"a: b\r\n" * 100)))[
            0
        ] == 200
        status, headers, body = await tell(
            connect, CHUNKED_HEAD + chunked(b"a", trailers=b"a: b\r\n" * 101)
        )
    assert (status, headers["connection"]) == (431, "close")
    assert json.loads(body)["error"]["code"] == "headers_too_large"


# Chunks


@pytest.mark.parametrize("size", [1, 2, 7])
async def test_a_small_body_may_come_in_chunks_of_any_size(size: int) -> None:
    body = b"0123456789" * 1000
    async with listening(echo) as connect:
        whole = CHUNKED_HEAD + chunked(*(body[at : at + size] for at in range(0, len(body), size)))
        for segments in ((whole,), (whole[:333], whole[333:5000], whole[5000:])):
            status, _, answer = await tell(connect, *segments)
            assert (status, json.loads(answer)["bytes"]) == (200, 10_000)


async def test_a_large_body_may_come_in_chunks_of_ten_bytes() -> None:
    async with listening(echo) as connect:
        status, _, answer = await tell(connect, CHUNKED_HEAD + chunked(*[b"0123456789"] * 100_000))
    assert (status, json.loads(answer)["bytes"]) == (200, 1_000_000)


@pytest.mark.parametrize(
    "endless",
    [
        b"1\r\na\r\n" * 3000,
        b"1;" + b"x" * 5000 + b"\r\na\r\n",
        b"2;a=b;c=d;e=f\r\nab\r\n" * 1000,
        b"0" * 20_000,
    ],
    ids=["chunks of one byte", "long extensions", "short extensions", "zeros before a size"],
)
async def test_a_body_of_mostly_framing_is_refused(endless: bytes) -> None:
    async with listening(echo, ConnectionPolicy(linger_bytes=100_000)) as connect:
        sent, answer = await sent_until_refused(connect, CHUNKED_HEAD, endless, 64 * 1024 * 1024)
    assert sent < 16 * 1024 * 1024
    assert not answer or answer.startswith(b"HTTP/1.1 400")


async def test_an_extension_without_an_end_is_refused_with_its_reason() -> None:
    async with listening(echo) as connect:
        status, headers, body = await tell(connect, CHUNKED_HEAD + b"1;" + b"x" * 70_000)
    assert (status, headers["connection"], headers["content-type"]) == (
        400,
        "close",
        "application/json",
    )
    assert json.loads(body)["error"] == {
        "message": (
            "The sizes, extensions and trailers of the body's chunks take more than 65536 bytes and"
            " as many as its data; send larger chunks."
        ),
        "type": "invalid_request_error",
        "param": None,
        "code": "invalid_request",
    }


async def test_a_body_in_segments_of_one_byte_wakes_its_reader_only_a_few_times() -> None:
    wakes = 0

    async def counting(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal wakes
        more = True
        while more:
            more = (await receive())["more_body"]
            wakes += 1
        await PlainTextResponse("yes")(scope, receive, send)

    async with listening(counting) as connect:
        reader, writer = await connect()
        writer.write(b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: 300\r\n\r\n")
        for _ in range(300):
            writer.write(b"a")
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        assert (await answer_of(reader))[0] == 200
    assert wakes <= 3


# Heads


@pytest.mark.parametrize("pieces", [1, 7])
async def test_the_head_limit_holds_also_for_a_head_in_one_read(pieces: int) -> None:
    def head(size: int) -> bytes:
        begun = b"GET / HTTP/1.1\r\n" + HOST
        lines = [b"X: " + b"a" * 4000 + b"\r\n"] * 15
        rest = size - len(begun) - sum(map(len, lines)) - 7
        return begun + b"".join(lines) + b"X: " + b"a" * rest + b"\r\n\r\n"

    async with listening(echo) as connect:
        for size, expected in ((65_536, 200), (65_537, 431), (70_000, 431), (200_000, 431)):
            whole = head(size)
            assert len(whole) == size
            step = len(whole) // pieces + 1
            status, headers, body = await tell(
                connect, *(whole[at : at + step] for at in range(0, size, step))
            )
            assert status == expected, size
        assert headers["connection"] == "close"
        assert json.loads(body)["error"]["message"] == "The head is longer than 65536 bytes."


@pytest.mark.parametrize(
    "filler",
    [b"X:" + b" " * 70_000 + b"a\r\n", b"\r\n" * 35_000],
    ids=["white space", "empty lines before it"],
)
async def test_white_space_and_empty_lines_count_towards_the_head_limit(filler: bytes) -> None:
    whole = (
        filler + b"GET / HTTP/1.1\r\n" + HOST + b"\r\n"
        if filler.startswith(b"\r")
        else b"GET / HTTP/1.1\r\n" + HOST + filler + b"\r\n"
    )
    async with listening(echo) as connect:
        assert (await tell(connect, whole))[0] == 431


async def test_each_head_in_one_read_has_its_own_limit() -> None:
    small, large = (
        b"GET /small HTTP/1.1\r\n" + HOST + b"\r\n",
        b"GET /large HTTP/1.1\r\n" + HOST + b"X: " + b"a" * 70_000 + b"\r\n\r\n",
    )
    async with listening(echo) as connect:
        reader, writer = await connect()
        writer.write(small * 5 + large + small)
        statuses = [(await answer_of(reader))[0] for _ in range(6)]
        assert statuses == [200] * 5 + [431]
        assert await reader.read() == b""


async def test_a_head_has_at_most_a_hundred_lines() -> None:
    async with listening(echo) as connect:
        for more, expected in ((99, 200), (100, 431), (20_000, 431)):
            status, _, body = await tell(
                connect, b"GET / HTTP/1.1\r\n" + HOST + b"a: b\r\n" * more + b"\r\n"
            )
            assert status == expected, more
    assert json.loads(body)["error"]["code"] == "headers_too_large"


async def test_a_target_has_a_limit() -> None:
    async with listening(echo) as connect:
        for size, expected in ((8_192, 200), (8_193, 414), (60_000, 414)):
            status, _, body = await tell(
                connect, b"GET /" + b"a" * (size - 1) + b" HTTP/1.1\r\n" + HOST + b"\r\n"
            )
            assert status == expected, size
    assert json.loads(body)["error"]["code"] == "target_too_long"


@pytest.mark.parametrize(
    ("version", "hosts", "expected"),
    [
        (b"1.1", [], 400),
        (b"1.0", [], 200),
        (b"1.1", [b"a", b"a"], 400),
        (b"1.1", [b"a", b"b"], 400),
        (b"1.0", [b"a", b"b"], 400),
        (b"1.1", [b"a"], 200),
        (b"1.1", [b""], 200),
        (b"1.1", [b"a:"], 200),
        (b"1.1", [b"a.example:8000"], 200),
        (b"1.1", [b"127.0.0.1:80"], 200),
        (b"1.1", [b"[::1]:8000"], 200),
        (b"1.1", [b"[::1"], 400),
        (b"1.1", [b"[a]"], 400),
        (b"1.1", [b"[::1]x"], 400),
        (b"1.1", [b"[fe80::1%eth0]"], 400),
        (b"1.1", [b"[v1.a:b]"], 200),
        (b"1.1", [b"my_pod-1"], 200),
        (b"1.1", [b"a%20b"], 200),
        (b"1.1", [b"a%2"], 400),
        (b"1.1", [b"a b"], 400),
        (b"1.1", [b"a/b"], 400),
        (b"1.1", [b"u@a"], 400),
        (b"1.1", [b"a:b"], 400),
        (b"1.1", [b"a:80:80"], 400),
        (b"1.1", [b"\xc3\xa4"], 400),
        (b"1.1", [b"a?b"], 400),
        (b"1.1", [b"a#b"], 400),
        (b"1.1", [b"http://a"], 400),
        (b"1.0", [b"a b"], 400),
    ],
)
async def test_a_request_has_one_valid_host(
    version: bytes, hosts: list[bytes], expected: int
) -> None:
    lines = b"".join(b"Host: %b\r\n" % host for host in hosts)
    async with listening(echo) as connect:
        status, headers, body = await tell(connect, b"GET / HTTP/%b\r\n%b\r\n" % (version, lines))
    assert status == expected
    if expected == 400:
        assert headers["connection"] == "close"
        error = json.loads(body)["error"]
        assert error["code"] == "invalid_request"
        assert (
            not hosts or not hosts[0] or hosts[0].decode("latin-1") not in error["message"].split()
        )


async def test_the_second_request_of_a_connection_has_its_own_host() -> None:
    async with listening(echo) as connect:
        reader, writer = await connect()
        for lines, expected in ((HOST, 200), (HOST, 200), (b"", 400)):
            writer.write(b"GET / HTTP/1.1\r\n" + lines + b"\r\n")
            assert (await answer_of(reader))[0] == expected


# Pipelined requests


def held_exchanges(policy: ConnectionPolicy) -> int:
    """Return the number of exchanges in memory that belong to a server of this policy."""
    # Not isinstance, which reads an attribute of every object: some of torch's then warn.
    return sum(
        issubclass(type(each), Exchange) and each.connection.policy is policy
        for each in gc.get_objects()
    )


def held_connections(policy: ConnectionPolicy) -> int:
    """Return the number of connections in memory that belong to a server of this policy."""
    return sum(
        issubclass(type(each), LimitedHttpProtocol) and each.policy is policy
        for each in gc.get_objects()
    )


@pytest.mark.parametrize("body", [b"", b"abc", b"a" * 3000])
async def test_a_thousand_pipelined_requests_are_answered_in_order_and_few_are_in_memory(
    body: bytes,
) -> None:
    go_on, policy = asyncio.Event(), ConnectionPolicy()

    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        await go_on.wait()
        await echo(scope, receive, send)

    async with listening(slow, policy) as connect:
        reader, writer = await connect()
        writer.write(
            b"".join(
                b"POST /%d HTTP/1.1\r\n%bContent-Length: %d\r\n\r\n%b"
                % (number, HOST, len(body), body)
                for number in range(1000)
            )
        )
        await asyncio.sleep(0.3)
        held = held_exchanges(policy)
        go_on.set()
        for number in range(1000):
            status, _, answer = await answer_of(reader)
            assert (status, json.loads(answer)["path"], json.loads(answer)["bytes"]) == (
                200,
                f"/{number}",
                len(body),
            )
    assert 1 <= held <= 50


async def test_chunked_requests_are_pipelined_too() -> None:
    async with listening(echo) as connect:
        reader, writer = await connect()
        writer.write((CHUNKED_HEAD + chunked(b"abc", b"d" * 2000, trailers=b"a: b\r\n")) * 200)
        for _ in range(200):
            status, _, answer = await answer_of(reader)
            assert (status, json.loads(answer)["bytes"]) == (200, 2003)


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("private", [False, True])
async def test_a_client_that_pipelines_and_disconnects_causes_no_traceback(
    artifact: Artifact, caplog: pytest.LogCaptureFixture, reset: bool, private: bool
) -> None:
    service = ServiceState({"reviews": artifact}, Settings(warm_up_s=0, admin_port=0))
    service.lifecycle.load()
    body = b'{"input": "good"}'
    request = (
        b"POST /classify HTTP/1.1\r\n" + HOST + b"Content-Length: %d\r\n\r\n" % len(body) + body
    )
    if private:
        request = (
            b"POST /models/nothing HTTP/1.1\r\n"
            + HOST
            + b"Content-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
        )
    policy = ConnectionPolicy()
    async with listening(
        build_admin(HttpContext(service), None) if private else build_app(HttpContext(service)),
        policy,
    ) as connect:
        for _ in range(20):
            reader, writer = await connect()
            writer.write(request * 50 + request[:-1])
            await reader.read(100)
            if reset:
                writer.get_extra_info("socket").setsockopt(
                    socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
                )
            writer.close()
        await until(
            lambda: (
                service.lifecycle.active_requests == 0
                and service.batcher.waiting == 0
                and held_connections(policy) == 0
            )
        )
    await service.lifecycle.drain()
    assert not [
        record for record in caplog.records if record.exc_info or record.levelname == "ERROR"
    ]


async def test_an_invalid_request_is_refused_after_the_answers_to_earlier_requests() -> None:
    go_on = asyncio.Event()

    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        await send(
            {"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"6")]}
        )
        await send({"type": "http.response.body", "body": b"abc", "more_body": True})
        await go_on.wait()
        await send({"type": "http.response.body", "body": b"def"})

    async with listening(slow) as connect:
        reader, writer = await connect()
        writer.write((b"GET / HTTP/1.1\r\n" + HOST + b"\r\n") * 2)
        await reader.readuntil(b"abc")
        writer.write(b"no request\r\n\r\n")
        await asyncio.sleep(0.05)
        go_on.set()
        assert await reader.readexactly(3) == b"def"
        assert (await answer_of(reader))[2] == b"abcdef"
        status, headers, body = await answer_of(reader)
        assert (status, headers["connection"], json.loads(body)["error"]["message"]) == (
            400,
            "close",
            "Invalid HTTP request received.",
        )
        assert await reader.read() == b""


async def test_an_idle_connection_is_closed_and_an_active_one_stays_open(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(server, "KEEP_ALIVE_S", 0.4)
    async with listening(echo) as connect:
        (idle, writer), (used, user) = await connect(), await connect()
        writer.write(b"GET / HTTP/1.1\r\n" + HOST + b"\r\n")
        await answer_of(idle)
        for _ in range(6):
            user.write(b"GET / HTTP/1.1\r\n" + HOST + b"\r\n")
            assert (await answer_of(used))[0] == 200
            await asyncio.sleep(0.15)
        assert await asyncio.wait_for(idle.read(), 5) == b""
        user.write(b"GET / HTTP/1.1\r\n" + HOST + b"\r\n")
        assert (await answer_of(used))[0] == 200
        assert await asyncio.wait_for(used.read(), 5) == b""


async def test_a_body_is_read_only_as_the_application_asks_for_it() -> None:
    exchanges: list[Exchange] = []
    go_on = asyncio.Event()

    async def waiting(scope: Scope, receive: Receive, send: Send) -> None:
        exchanges.append(exchange_of(receive) or pytest.fail("no exchange"))
        await go_on.wait()
        await echo(scope, receive, send)

    async with listening(waiting) as connect:
        reader, writer = await connect()
        writer.write(
            b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: 4000000\r\n\r\n" + bytes(1_000)
        )
        await until(lambda: bool(exchanges) and len(exchanges[0].body) > 0)
        writer.write(bytes(3_999_000))
        await asyncio.sleep(0.1)
        assert len(exchanges[0].body) == 1_000
        go_on.set()
        assert json.loads((await answer_of(reader))[2])["bytes"] == 4_000_000
        # By now the system takes more of this connection at once.
        go_on.clear()
        writer.write(
            b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: 4000000\r\n\r\n" + bytes(4_000_000)
        )
        await until(lambda: len(exchanges) == 2)
        await asyncio.sleep(0.1)
        assert len(exchanges[1].body) <= exchange.READ_BYTES
        go_on.set()
        assert json.loads((await answer_of(reader))[2])["bytes"] == 4_000_000


async def test_the_head_of_an_answer_is_sent_with_the_first_piece_of_its_body() -> None:
    go_on = asyncio.Event()

    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        await send(
            {"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"6")]}
        )
        await go_on.wait()
        await send({"type": "http.response.body", "body": b"abc", "more_body": True})
        await send({"type": "http.response.body", "body": b"def"})

    async with listening(slow) as connect:
        reader, writer = await connect()
        writer.write(b"GET / HTTP/1.1\r\n" + HOST + b"\r\n")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.read(1), 0.05)
        go_on.set()
        assert (await answer_of(reader))[2] == b"abcdef"


@pytest.mark.parametrize(("method", "status", "body"), [(b"GET", 204, b""), (b"HEAD", 200, b"abc")])
async def test_an_answer_without_a_body_is_sent_as_its_head(
    method: bytes, status: int, body: bytes
) -> None:
    async def brief(scope: Scope, receive: Receive, send: Send) -> None:
        await send(
            {
                "type": "http.response.start",
                "status": status,
                "headers": [(b"content-length", b"%d" % len(body))] if body else [],
            }
        )
        await send({"type": "http.response.body", "body": body})

    async with listening(brief) as connect:
        reader, writer = await connect()
        writer.write(2 * (method + b" / HTTP/1.1\r\n" + HOST + b"\r\n"))
        for _ in range(2):
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 %d " % status)
        writer.write(method + b" / HTTP/1.0\r\n" + HOST + b"\r\n")
        assert (await reader.read()).startswith(b"HTTP/1.1 %d " % status)


async def test_an_answer_that_breaks_off_after_its_head_closes_the_connection(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        await send(
            {"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"6")]}
        )
        raise RuntimeError("a bug")

    async with listening(broken) as connect:
        reader, writer = await connect()
        writer.write(b"GET / HTTP/1.1\r\n" + HOST + b"\r\n")
        assert (await reader.read()).endswith(b"content-length: 6\r\n\r\n")
    assert "a bug" in caplog.text


async def test_no_work_is_done_for_a_client_that_disconnected_before_it_began() -> None:
    outcomes: list[str] = []

    async def late(scope: Scope, receive: Receive, send: Send) -> None:
        owner = exchange_of(receive)
        assert owner is not None
        await until(lambda: owner.disconnected)
        try:
            await cancel_on_disconnect(receive, asyncio.Event().wait())
        except ClientDisconnected:
            outcomes.append("disconnected")

    async with listening(late) as connect:
        _, writer = await connect()
        writer.write(b"GET / HTTP/1.1\r\n" + HOST + b"\r\n")
        await asyncio.sleep(0.05)
        writer.transport.abort()
        await until(lambda: outcomes == ["disconnected"])


async def test_an_invalid_chunk_is_refused_and_the_application_sees_a_disconnect() -> None:
    messages: list[Any] = []

    async def reading(scope: Scope, receive: Receive, send: Send) -> None:
        while not messages or messages[-1]["type"] == "http.request":
            messages.append(await receive())

    async with listening(reading) as connect:
        status, _, body = await tell(connect, CHUNKED_HEAD + b"3\r\nabc\r\n", b"no size\r\n")
        await until(lambda: messages[-1] == {"type": "http.disconnect"})
    assert (status, json.loads(body)["error"]["code"]) == (400, "invalid_request")


async def test_half_a_body_on_the_private_port_causes_no_traceback(
    artifact: Artifact, caplog: pytest.LogCaptureFixture
) -> None:
    service = ServiceState({"reviews": artifact}, Settings(warm_up_s=0))
    service.lifecycle.load()
    policy = ConnectionPolicy()
    async with listening(build_admin(HttpContext(service), None), policy) as connect:
        head = (
            b"POST /models/reviews HTTP/1.1\r\n"
            + HOST
            + b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{\r\n"
        )
        for rest, expected in ((b"no size\r\n", 400), (b"", None)):
            reader, writer = await connect()
            writer.write(head)
            await asyncio.sleep(0.05)
            writer.write(rest)
            if expected is not None:
                assert (await answer_of(reader))[0] == expected
            writer.close()
        await until(lambda: held_connections(policy) == 0)
    await service.lifecycle.drain()
    assert not [
        record for record in caplog.records if record.exc_info or record.levelname == "ERROR"
    ]


# Early answers


@pytest.mark.parametrize("size", [100_000, 8_000_000])
async def test_a_client_that_sends_before_it_reads_reads_an_early_answer(size: int) -> None:
    async with listening(no) as connect:
        reader, writer = await connect()
        writer.write(b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: %d\r\n\r\n" % size)
        for _ in range(size // 10_000):
            writer.write(b"a" * 10_000)
            await writer.drain()
            await asyncio.sleep(0)
        status, headers, body = await answer_of(reader)
        assert (status, headers["connection"], body) == (401, "close", b"no")
        assert await reader.read() == b""


@pytest.mark.parametrize("without_key", [False, True])
async def test_every_refusal_of_an_unread_body_closes_the_connection(
    artifact: Artifact, tmp_path: Path, without_key: bool
) -> None:
    (tmp_path / "keys").write_text("secret\n")
    service = ServiceState({"reviews": artifact}, Settings(warm_up_s=0, max_body_bytes=100))
    service.lifecycle.load()
    async with listening(
        build_app(
            HttpContext(
                service,
                RequestHooks(keys=Keys(tmp_path / "keys")) if without_key else RequestHooks(),
            )
        )
    ) as connect:
        paths = [
            "/classify",
            "/predict",
            "/",
            "/models/reviews",
            "/v1/models/reviews:predict",
            "/v2/models/reviews/infer",
            "/nowhere",
        ]
        for path in paths:
            head = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Length: 200\r\n\r\n".encode()
            status, headers, _ = await tell(connect, head + b"a" * 50)
            assert status == (401 if without_key else 404 if path == "/nowhere" else 413)
            assert headers["connection"] == "close", path
        whole = b"POST /classify HTTP/1.1\r\n" + HOST + b"Content-Length: 3\r\n\r\nabc"
        status, headers, _ = await tell(connect, whole)
        assert status == (401 if without_key else 400)
        assert "connection" not in headers
    await service.lifecycle.drain()


async def test_lingering_after_an_early_answer_is_limited_in_bytes() -> None:
    async with listening(no, ConnectionPolicy(linger_bytes=1_000_000)) as connect:
        sent, _ = await sent_until_refused(
            connect,
            b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: 999999999\r\n\r\n",
            b"a" * 65_536,
            256 * 1024 * 1024,
        )
    assert sent < 32 * 1024 * 1024


async def test_lingering_after_an_early_answer_is_limited_in_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(protocol, "LINGER_S", 0.2)
    policy = ConnectionPolicy()
    async with listening(no, policy) as connect:  # which gives up after a while
        _, writer = await connect()
        writer.write(b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: 999999999\r\n\r\n")
        await until(lambda: policy.lingering == 1)
        with contextlib.suppress(ConnectionError):
            while policy.lingering:
                writer.write(b"a")
                await writer.drain()
                await asyncio.sleep(0.01)


async def test_the_number_of_lingering_connections_is_limited(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(protocol, "MAX_LINGERING", 3)
    policy = ConnectionPolicy()
    async with listening(no, policy) as connect:
        for _ in range(10):
            assert (
                await tell(connect, b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: 10\r\n\r\n")
            )[0] == 401
        assert policy.lingering == 3


async def test_a_body_without_a_limit_of_the_application_is_408_in_the_end(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with listening(echo, ConnectionPolicy(body_timeout_s=0.2)) as connect:
        status, headers, body = await tell(
            connect, b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: 10\r\n\r\n", b"abc"
        )
    assert (status, headers["connection"]) == (408, "close")
    assert (
        json.loads(body)["error"]["message"]
        == "The body was not complete after 0.2 s; 3 bytes of it arrived."
    )


# Half-closed and closed connections


@pytest.mark.parametrize("requests", [1, 3])
@pytest.mark.parametrize("at_once", [False, True])
async def test_a_client_that_half_closes_gets_its_answers(requests: int, at_once: bool) -> None:
    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(0 if at_once else 0.15)  # longer than until the first probe for a reset
        await echo(scope, receive, send)

    async with listening(slow) as connect:
        reader, writer = await connect()
        writer.write((b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: 3\r\n\r\nabc") * requests)
        writer.write_eof()
        for _ in range(requests):
            status, _, answer = await answer_of(reader)
            assert (status, json.loads(answer)["end"]) == (200, "abc")
        assert await reader.read() == b""


async def test_a_half_closed_client_is_answered_by_the_service(artifact: Artifact) -> None:
    service = ServiceState({"reviews": artifact}, Settings(warm_up_s=0))
    service.lifecycle.load()
    body = b'{"input": "good"}'
    async with listening(build_app(HttpContext(service))) as connect:
        reader, writer = await connect()
        async with stuck(service):
            writer.write(
                b"POST /classify HTTP/1.1\r\n"
                + HOST
                + b"Content-Length: %d\r\n\r\n" % len(body)
                + body
            )
            writer.write_eof()
            await until(lambda: service.lifecycle.active_requests == 1)
            await asyncio.sleep(0.2)
            assert service.lifecycle.active_requests == 1
        status, _, answer = await answer_of(reader)
        assert (status, json.loads(answer)["data"][0]["label"]) == (200, "POSITIVE")
    await service.lifecycle.drain()


async def test_a_request_of_a_client_that_closes_is_not_computed(artifact: Artifact) -> None:
    service = ServiceState({"reviews": artifact}, Settings(warm_up_s=0))
    service.lifecycle.load()
    body = b'{"input": "good"}'
    async with listening(build_app(HttpContext(service))) as connect, stuck(service):
        for _ in range(3):
            _, writer = await connect()
            writer.write(
                b"POST /classify HTTP/1.1\r\n"
                + HOST
                + b"Content-Length: %d\r\n\r\n" % len(body)
                + body
            )
        await until(lambda: service.lifecycle.active_requests == 3)
        _, writer = await connect()
        writer.write(
            b"POST /classify HTTP/1.1\r\n" + HOST + b"Content-Length: %d\r\n\r\n" % len(body) + body
        )
        await until(lambda: service.lifecycle.active_requests == 4)
        writer.close()
        await until(
            lambda: service.lifecycle.active_requests == 3
        )  # while the engine is still stuck: it was not waited for
    await service.lifecycle.drain()


async def test_a_half_closed_connection_with_half_a_request_is_closed() -> None:
    async with listening(echo) as connect:
        for half in (
            b"POST / HT",
            b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: 10\r\n\r\nabc",
        ):
            reader, writer = await connect()
            writer.write(half)
            writer.write_eof()
            assert await reader.read() == b""


# Unread answers


async def test_a_connection_whose_answer_is_not_read_is_aborted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    reasons: list[str] = []
    ended = 0

    async def large(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal ended
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(500):
            await send({"type": "http.response.body", "body": b"a" * 100_000, "more_body": True})
        await send({"type": "http.response.body", "body": b""})
        ended += 1

    async with listening(
        large, ConnectionPolicy(write_timeout_s=0.4, count=reasons.append)
    ) as connect:
        sockets = []
        for _ in range(3):
            _, writer = await connect()
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            writer.write(b"GET / HTTP/1.1\r\n" + HOST + b"\r\n")
            sockets.append(writer)
        await until(lambda: ended == 3)
    assert reasons == ["unread_answer"] * 3
    assert [record.getMessage() for record in caplog.records] == [
        "A client read nothing of its answer for 0.4 s; its connection was aborted."
    ]


async def test_an_answer_that_is_read_slowly_is_sent_to_its_end() -> None:
    async def large(scope: Scope, receive: Receive, send: Send) -> None:
        await PlainTextResponse("a" * 20_000_000)(scope, receive, send)

    async with listening(large, ConnectionPolicy(write_timeout_s=1.0)) as connect:
        reader, writer = await connect()
        writer.write(b"GET / HTTP/1.1\r\n" + HOST + b"\r\n")
        await reader.readuntil(b"\r\n\r\n")
        size = 0
        for _ in range(20):  # for longer than the limit
            await asyncio.sleep(0.1)
            size += len(await reader.readexactly(1_000_000))
    assert size == 20_000_000


# Logs and counts of refusals


async def test_every_refusal_is_counted_and_few_are_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    reasons: list[str] = []
    monkeypatch.setattr(exchange, "REPORT_EVERY_S", 1000.0)
    async with listening(echo, ConnectionPolicy(count=reasons.append)) as connect:
        for _ in range(5):
            assert (await tell(connect, b"no request\r\n\r\n"))[0] == 400
    assert reasons == ["invalid_request"] * 5
    assert len(caplog.records) == 1


# The service runs on uvloop if it is installed. Its transports close, pause and count differently
# from asyncio's, which the tests above use.


@pytest.mark.parametrize(
    "scenario",
    [
        partial(test_trailers_are_dropped_wherever_the_packets_end, 3),
        partial(test_trailers_without_an_end_are_refused, b"a:b\r\n" * 4000, echo),
        partial(test_trailers_without_an_end_are_refused, b"a" * 20_000, no),
        partial(test_a_small_body_may_come_in_chunks_of_any_size, 1),
        partial(test_the_head_limit_holds_also_for_a_head_in_one_read, 7),
        partial(
            test_a_thousand_pipelined_requests_are_answered_in_order_and_few_are_in_memory, b"abc"
        ),
        test_an_invalid_request_is_refused_after_the_answers_to_earlier_requests,
        test_an_invalid_chunk_is_refused_and_the_application_sees_a_disconnect,
        test_a_body_is_read_only_as_the_application_asks_for_it,
        test_the_head_of_an_answer_is_sent_with_the_first_piece_of_its_body,
        partial(test_an_answer_without_a_body_is_sent_as_its_head, b"HEAD", 200, b"abc"),
        test_no_work_is_done_for_a_client_that_disconnected_before_it_began,
        partial(test_a_client_that_sends_before_it_reads_reads_an_early_answer, 8_000_000),
        test_lingering_after_an_early_answer_is_limited_in_bytes,
        partial(test_a_client_that_half_closes_gets_its_answers, 1, False),
        partial(test_a_client_that_half_closes_gets_its_answers, 3, False),
        partial(test_a_client_that_half_closes_gets_its_answers, 3, True),
        test_a_half_closed_connection_with_half_a_request_is_closed,
        test_an_answer_that_is_read_slowly_is_sent_to_its_end,
    ],
    ids=lambda scenario: (
        f"{scenario.func.__name__}-{scenario.args}"[5:60]
        if isinstance(scenario, partial)
        else scenario.__name__[5:]
    ),
)
def test_the_same_holds_on_uvloop(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    on_uvloop(scenario)


def test_the_same_holds_for_the_service_on_uvloop(artifact: Artifact) -> None:
    on_uvloop(partial(test_a_half_closed_client_is_answered_by_the_service, artifact))
    on_uvloop(partial(test_a_request_of_a_client_that_closes_is_not_computed, artifact))


@pytest.mark.parametrize("reset", [False, True])
def test_a_client_that_pipelines_and_disconnects_causes_no_traceback_on_uvloop(
    artifact: Artifact, caplog: pytest.LogCaptureFixture, reset: bool
) -> None:
    on_uvloop(
        partial(
            test_a_client_that_pipelines_and_disconnects_causes_no_traceback,
            artifact,
            caplog,
            reset,
            False,
        )
    )


def test_a_connection_whose_answer_is_not_read_is_aborted_on_uvloop(
    caplog: pytest.LogCaptureFixture,
) -> None:
    on_uvloop(partial(test_a_connection_whose_answer_is_not_read_is_aborted, caplog))


def on_uvloop(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(scenario())


async def refused_and_closed() -> int:
    """Return the number of refused and closed connections that are still in memory.

    The garbage collector is off.
    """
    policy = ConnectionPolicy()
    gc.disable()
    try:
        async with listening(echo, policy) as connect:
            for sent in (
                b"no request\r\n\r\n",
                CHUNKED_HEAD + b"1;" + b"x" * 70_000,
                b"GET / HTTP/1.1\r\n" + HOST + b"a: b\r\n" * 200 + b"\r\n",
                b"GET / HTTP/1.1\r\n" + HOST + b"\r\n",
            ):
                for _ in range(5):
                    reader, writer = await connect()
                    writer.write(sent)
                    await answer_of(reader)
                    writer.close()
            await asyncio.sleep(0.2)
            return held_connections(policy) + held_exchanges(policy)
    finally:
        gc.enable()


def test_a_refused_connection_is_freed_at_once() -> None:
    """A read that stays in memory has up to 256 KiB.

    The garbage collector runs only once in a hundred thousand objects.
    """
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(refused_and_closed()) == 0


# Over TLS


def test_over_tls_an_early_answer_is_received_and_an_unread_one_aborted(
    artifact: Artifact, tmp_path: Path
) -> None:
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    certificate.private_key_pem.write_to_path(tmp_path / "key.pem")
    certificate.cert_chain_pems[0].write_to_path(tmp_path / "certificate.pem")
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    files = {
        "DRBERT_TLS_CERTIFICATE": str(tmp_path / "certificate.pem"),
        "DRBERT_TLS_KEY": str(tmp_path / "key.pem"),
    }
    with running(
        f"reviews={artifact.directory}", scheme="https", **files, DRBERT_WRITE_TIMEOUT_S="1"
    ) as (url, process):
        address = ("127.0.0.1", int(url.rpartition(":")[2]))
        with trusting.wrap_socket(
            socket.create_connection(address, timeout=30), server_hostname="127.0.0.1"
        ) as client:
            client.sendall(b"POST /classify HTTP/1.1\r\nHost: a\r\nContent-Length: 8000000\r\n\r\n")
            for _ in range(800):
                client.sendall(b"a" * 10_000)
            assert client.recv(12) == b"HTTP/1.1 413"
        with trusting.wrap_socket(
            socket.create_connection(address, timeout=30), server_hostname="127.0.0.1"
        ) as client:
            client.sendall(b"GET /docs/files/swagger-ui-bundle.js HTTP/1.1\r\nHost: a\r\n\r\n" * 20)
            assert process.stdout is not None
            while "A client read nothing of its answer for 1 s" not in process.stdout.readline():
                assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert "Traceback" not in process.communicate(timeout=60)[0]
        assert process.returncode == 0
