"""
Callers whose requests keep every limit, or are refused, and cost as much as such requests can: JSON
that is dear to parse, texts that are dear to tokenize, and the metrics' page.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence

from tests.chaos.attack import under_attack
from tests.chaos.caller import Seen, closed, for_seconds, request
from tests.chaos.scenarios import Row

CALLERS = 64
BODY_BYTES = 4 * 2**20 - 64
LONG_CALLERS = 12
TEXT_CHARS = 131_072
SCRAPE = b"GET /metrics HTTP/1.1\r\nHost: chaos\r\n\r\n"


def filled(begin: bytes, piece: bytes, end: bytes, size: int) -> bytes:
    """A document of nearly so many bytes: a beginning, as many pieces as fit, an end."""
    return begin + piece * ((size - len(begin) - len(end)) // len(piece)) + end


def json_bombs(size: int) -> list[bytes]:
    """Documents that no request is, and that take the parser as long as so many bytes can."""
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
    """Lists of 30 texts, each as long as a text may be, of words, of one letter, of Chinese,
    without white space, and by windows.
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


async def ask(
    port: int, messages: Sequence[bytes], callers: int, seconds: float
) -> Mapping[str, int]:
    """So many callers with one request under way each; how many answers of each status they had."""
    seen = Seen()
    await closed(port, messages, callers, for_seconds(seconds), seen)
    counts: Counter[str] = Counter(
        {f"{status}s": count for status, count in sorted(seen.statuses.items())}
    )
    slowest = max(itertools.chain.from_iterable(seen.seconds.values()), default=0.0)
    return counts | {
        "without an answer": seen.unanswered,
        "hung": seen.hung,
        "slowest answer in ms": round(1000 * slowest),
    }


async def send_bombs(port: int, seconds: float) -> Mapping[str, int]:
    return await ask(port, json_bombs(BODY_BYTES), CALLERS, seconds)


async def send_small_bombs(port: int, seconds: float) -> Mapping[str, int]:
    return await ask(port, json_bombs(65_000), CALLERS, seconds)


async def send_long_texts(port: int, seconds: float) -> Mapping[str, int]:
    return await ask(port, long_texts(), LONG_CALLERS, seconds)


async def scrape(port: int, seconds: float) -> Mapping[str, int]:
    return await ask(port, [SCRAPE], CALLERS, seconds)


async def bombs(seconds: float) -> Row:
    return await under_attack(
        "JSON bombs",
        f"{CALLERS} callers with bodies of 4 MiB that are dear to parse",
        send_bombs,
        seconds,
    )


async def small_bombs(seconds: float) -> Row:
    return await under_attack(
        "small JSON bombs",
        f"{CALLERS} callers with such bodies of 65 kB",
        send_small_bombs,
        seconds,
    )


async def slow_texts(seconds: float) -> Row:
    return await under_attack(
        "slow long texts",
        f"{LONG_CALLERS} callers with 30 texts of {TEXT_CHARS:,} characters each",
        send_long_texts,
        seconds,
    )


async def scrapers(seconds: float) -> Row:
    return await under_attack(
        "metrics scrapers",
        f"{CALLERS} callers of /metrics, one request after the other",
        scrape,
        seconds,
    )
