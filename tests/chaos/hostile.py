"""
Attacks on HTTP itself, by clients without a key: endless messages, and answers that nobody reads.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping

from tests.chaos.attack import under_attack
from tests.chaos.scenarios import Row

CONNECTIONS = 8
NEVER_READERS = 100
CHUNKS_PER_S = 4 * 1024 * 1024
"""Bytes of one-byte chunks per second; that many raised the others' p50 from 39 to 1,169 ms."""
HEAD = b"POST /classify HTTP/1.1\r\nHost: chaos\r\nTransfer-Encoding: chunked\r\n\r\n"
TRAILERS = b"a:b\r\n" * 13_000
ENDLESS_TRAILER = b"a" * 65_536
CHUNKS = b"1\r\na\r\n" * 11_000
HEADERS = b"".join(b"x-%d: y\r\n" % number for number in range(12_000))
# A page that is work for the service, and 1.7 MB that are not. Lists of texts attack the queue, in
# load.py.
METRICS, SCRIPT = (
    f"GET {path} HTTP/1.1\r\nHost: chaos\r\n\r\n".encode()
    for path in ("/metrics", "/docs/files/swagger-ui-bundle.js")
)


async def trailers(seconds: float) -> Row:
    """Attack with chunked bodies whose trailers never end: many short ones, or one long one."""
    return await under_attack(
        "trailers without an end",
        f"{CONNECTIONS} connections, all of them all the time",
        send_trailers,
        seconds,
    )


async def one_byte_chunks(seconds: float) -> Row:
    """Attack with chunked bodies whose chunks hold a byte each."""
    return await under_attack(
        "chunks of one byte", f"{CONNECTIONS} connections, 4 MiB/s together", send_chunks, seconds
    )


async def header_floods(seconds: float) -> Row:
    """Attack with heads of thousands of headers."""
    return await under_attack(
        "header floods",
        f"{CONNECTIONS} connections, 12,000 headers a request",
        send_headers,
        seconds,
    )


async def never_readers(seconds: float) -> Row:
    """Attack with clients that request a lot on one connection and read nothing."""
    return await under_attack(
        "clients that never read",
        f"{NEVER_READERS} connections with 200 requests each, for /metrics or a script of 1.7 MB",
        request_and_never_read,
        seconds,
    )


async def send_trailers(port: int, seconds: float) -> Mapping[str, int]:
    """Send trailers that never end."""

    def message(number: int) -> Iterator[bytes]:
        yield HEAD + b"0\r\na: "
        while True:
            yield TRAILERS if number % 2 else ENDLESS_TRAILER

    return await send_on_all(port, seconds, message)


async def send_chunks(port: int, seconds: float) -> Mapping[str, int]:
    """Send chunks of one byte that never end."""

    def message(_: int) -> Iterator[bytes]:
        yield HEAD
        while True:
            yield CHUNKS

    return await send_on_all(port, seconds, message, CHUNKS_PER_S)


async def send_headers(port: int, seconds: float) -> Mapping[str, int]:
    """Send requests with thousands of headers."""

    def message(_: int) -> Iterator[bytes]:
        yield b"GET /livez HTTP/1.1\r\nHost: chaos\r\n" + HEADERS + b"\r\n"

    return await send_on_all(port, seconds, message)


async def send_on_all(
    port: int,
    seconds: float,
    message: Callable[[int], Iterator[bytes]],
    bytes_per_s: float = float("inf"),
) -> Mapping[str, int]:
    """Send messages on several connections; return counts of connections, KiB and answers.

    Each message is sent until the server answers or closes the connection.
    """
    counts, ends_at = Counter[str](), time.monotonic() + seconds

    async def attack(number: int) -> None:
        while time.monotonic() < ends_at:
            with contextlib.suppress(OSError):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                counts["connections"] += 1
                answer = asyncio.create_task(reader.read(12))
                for piece in message(number):
                    if answer.done() or time.monotonic() >= ends_at:
                        break
                    writer.write(piece)
                    counts["KiB"] += len(piece) // 1024
                    await writer.drain()
                    await asyncio.sleep(len(piece) * CONNECTIONS / bytes_per_s)
                with contextlib.suppress(TimeoutError, OSError):
                    status = (await asyncio.wait_for(answer, 5))[9:12].decode()
                    counts[status or "closed"] += 1
                writer.close()

    await asyncio.gather(*(attack(number) for number in range(CONNECTIONS)))
    return counts


async def request_and_never_read(port: int, seconds: float) -> Mapping[str, int]:
    """Send requests and read no answer; return the number of connections."""
    counts, ends_at = Counter[str](), time.monotonic() + seconds

    async def attack(number: int) -> None:
        while time.monotonic() < ends_at:
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                counts["connections"] += 1
                writer.transport.pause_reading()  # type: ignore[attr-defined]
                writer.write((METRICS if number % 10 else SCRIPT) * 200)
                # A client that does not read notices a reset only when it writes.
                while time.monotonic() < ends_at and not writer.transport.is_closing():
                    await asyncio.sleep(0.2)
                    writer.write(b" ")
                writer.transport.abort()

    await asyncio.gather(*(attack(number) for number in range(NEVER_READERS)))
    return counts
