"""
Attacks with the most expensive requests within the limits: JSON, long texts, and the metrics page.

The JSON is expensive to parse and refused afterwards; the texts are expensive to tokenise.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence

from tests.chaos.attack import under_attack
from tests.chaos.caller import Outcomes, closed_loop, for_seconds, request
from tests.chaos.scenarios import Row

CALLERS = 64
BODY_BYTES = 4 * 2**20 - 64
LONG_CALLERS = 12
TEXT_CHARS = 131_072
SCRAPE = b"GET /metrics HTTP/1.1\r\nHost: chaos\r\n\r\n"


def filled(begin: bytes, piece: bytes, end: bytes, size: int) -> bytes:
    """Return a document of at most `size` bytes: a beginning, as many pieces as fit, an end."""
    return begin + piece * ((size - len(begin) - len(end)) // len(piece)) + end


def json_bombs(size: int) -> list[bytes]:
    """Return requests with invalid documents of about `size` bytes that are slow to parse."""
    fields = b",".join(b'"%07d":0' % number for number in range(size // 12))
    return [
        request(body)
        for body in (
            filled(b'{"input":[', b"[],", b"[]]}", size),
            filled(b'{"input":[', b'{"":0},', b"{}]}", size),
            b"{" + fields + b"}",
            filled(b'{"input":[', b"[" * 900 + b"]" * 900 + b",", b"[]]}", size),
            filled(b'{"input":[', b'"",', b'""]}', size),
            filled(b'{"input":"a","x":"', b'\\"', b'"}', size),
            filled(b'{"input":"a","x":"', b"a ", b'"}', size),
            filled(b'{"input":"a","x":0.', b"1", b"}", size),
        )
    ]


def long_texts() -> list[bytes]:
    """Return requests with lists of texts of the greatest length.

    They are of words, of one letter, of Chinese, without white space, truncated and in windows.
    """
    pieces = (
        "a charming and often affecting journey ",
        "x ",
        "a" * 99 + " ",
        "\u5f88",
        "!",
        "-good",
    )
    bodies: list[dict[str, object]] = []
    for piece in pieces:
        text = (piece * (TEXT_CHARS // len(piece) + 1))[:TEXT_CHARS]
        texts = 30 if len(piece.encode()) == len(piece) else 10
        bodies += [{"input": [text] * texts, "truncate": side} for side in ("right", "left")]
        bodies.append({"input": [text] * texts, "window": {"pool": "first"}})
    return [request(json.dumps(body, ensure_ascii=False).encode()) for body in bodies]


async def send(
    port: int, messages: Sequence[bytes], callers: int, seconds: float
) -> Mapping[str, int]:
    """Run callers with one request in flight each; return their counts by outcome."""
    outcomes = Outcomes()
    await closed_loop(port, messages, callers, for_seconds(seconds), outcomes)
    counts: Counter[str] = Counter(
        {f"{status}s": count for status, count in sorted(outcomes.statuses.items())}
    )
    slowest = max(itertools.chain.from_iterable(outcomes.seconds.values()), default=0.0)
    return counts | {
        "without an answer": outcomes.unanswered,
        "hung": outcomes.hung,
        "slowest answer in ms": round(1000 * slowest),
    }


async def send_bombs(port: int, seconds: float) -> Mapping[str, int]:
    """Send documents of 4 MiB."""
    return await send(port, json_bombs(BODY_BYTES), CALLERS, seconds)


async def send_small_bombs(port: int, seconds: float) -> Mapping[str, int]:
    """Send documents of 65 kB."""
    return await send(port, json_bombs(65_000), CALLERS, seconds)


async def send_long_texts(port: int, seconds: float) -> Mapping[str, int]:
    """Send lists of long texts."""
    return await send(port, long_texts(), LONG_CALLERS, seconds)


async def scrape(port: int, seconds: float) -> Mapping[str, int]:
    """Read the metrics page."""
    return await send(port, [SCRAPE], CALLERS, seconds)


async def bombs(seconds: float) -> Row:
    """Attack with bodies of the largest allowed size that are slow to parse."""
    return await under_attack(
        "JSON bombs",
        f"{CALLERS} callers with bodies of 4 MiB that are slow to parse",
        send_bombs,
        seconds,
    )


async def small_bombs(seconds: float) -> Row:
    """Attack with small bodies that are slow to parse."""
    return await under_attack(
        "small JSON bombs",
        f"{CALLERS} callers with such bodies of 65 kB",
        send_small_bombs,
        seconds,
    )


async def slow_texts(seconds: float) -> Row:
    """Attack with texts that are slow to tokenise."""
    return await under_attack(
        "slow long texts",
        f"{LONG_CALLERS} callers with 30 texts of {TEXT_CHARS:,} characters each",
        send_long_texts,
        seconds,
    )


async def scrapers(seconds: float) -> Row:
    """Attack with requests for the metrics page."""
    return await under_attack(
        "metrics scrapers",
        f"{CALLERS} callers of /metrics, one request after the other",
        scrape,
        seconds,
    )
