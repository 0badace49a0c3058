"""
The command line of drbert-compare.

    drbert-compare http://old:7997 http://new:8000 --texts texts.txt
    drbert-compare http://old:9000 http://new:8000 --texts texts.txt --require speedup=1
        --old-format '{"path": "/predict", "body": {"text": "{text}"}, "label": "label"}'
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import aiohttp
from tqdm import tqdm

from client.compare.answers import Agreement, compare_answers
from client.compare.formats import Format
from client.compare.load import ask_all
from client.compare.probing import choose_target
from client.compare.report import Comparison, Requirement, describe, to_json, write_page
from client.compare.target import LONGEST_S, Target
from client.compare.timing import SLICES, Level, time_servers
from command import BadInput, BadUsage, Parser, Unavailable
from proof.plans.dialects import read_headers

ANSWERS_SHARE = 0.25
"""Share of the time in which answers are compared."""
ANSWERS_IN_FLIGHT = 4
FEWEST_SECONDS = 5.0
SEED = 0
"""Seed of the order of the texts, which are often sorted in their file."""
BUSY_CLIENT = 0.8
"""Share of a processor from which this command itself may limit the rates."""
REQUIREMENTS: Mapping[str, str] = {
    "agreement": "least share of texts with the same answer",
    "failures": "largest share of the new server's requests that may fail",
    "speedup": "least ratio of texts per second, new ÷ old, with 32 in flight",
    "latency": "least ratio of the p50 of one request at a time, old ÷ new",
    "difference": "largest difference of a score",
}
"""What --require may name."""
UPPER_BOUNDS = ("failures", "difference")
"""Requirements that are limits from above."""
DEFAULTS: Mapping[str, float] = {"agreement": 0.99, "failures": 0.001}
"""What is required unless --require names another value."""


def main(arguments: Sequence[str]) -> int:
    """Compare two servers by command-line arguments, and return the exit code."""
    options = _parser().parse_args(arguments)
    required = {**DEFAULTS, **parse_requirements(options.require)}
    texts = read_texts(options.texts)
    for path in filter(None, (options.json, options.html)):
        check_writable(path)
    comparison = asyncio.run(_compare(options, texts, required))
    print(describe(comparison))
    if options.json is not None:
        text = json.dumps(to_json(comparison), indent=2, ensure_ascii=False)
        options.json.write_text(f"{text}\n", encoding="utf-8")
    if options.html is not None:
        write_page(comparison, options.html)
    return 0 if comparison.is_accepted else 1


def _parser() -> Parser:
    parser = Parser(
        prog="drbert-compare",
        description=(
            "Compare two running servers of one classifier: answers, latency and throughput. A"
            " quick look; drbert-prove is the proof."
        ),
        results="  0   every requirement is met\n  1   one is not",
    )
    parser.add_argument("old", metavar="OLD_URL", help="address of today's server")
    parser.add_argument("new", metavar="NEW_URL", help="address of the server to switch to")
    parser.add_argument(
        "--texts", type=Path, required=True, help="file with one text on each line, as you get them"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=60.0,
        help="how long to measure, in seconds (default: 60)",
    )
    parser.add_argument(
        "--require",
        default="",
        metavar="NAME=VALUE,…",
        help=(
            "values that decide the exit code, besides or instead of"
            f" {','.join(f'{name}={value:g}' for name, value in DEFAULTS.items())}: "
            + "; ".join(f"{name}: {meaning}" for name, meaning in REQUIREMENTS.items())
        ),
    )
    parser.add_argument(
        "--labels",
        default="",
        metavar="OLD=NEW,…",
        help="labels that the servers name differently",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers to this file")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page to this file")
    for role in ("old", "new"):
        server = parser.add_argument_group(f"the {role} server")
        server.add_argument(
            f"--{role}-format",
            metavar="FORMAT",
            help=(
                "drbert, vllm, infinity, tei, hf, kserve-v1, or a JSON mapping (path, body, label,"
                " score); by default it is found out"
            ),
        )
        server.add_argument(f"--{role}-model", metavar="NAME", help="the model to ask")
        server.add_argument(
            f"--{role}-headers",
            metavar="VARIABLE",
            help="environment variable with `Name: value` lines, such as an API key",
        )
    return parser


def parse_requirements(text: str) -> dict[str, float]:
    """Return the required values of `agreement=0.99,speedup=1`; raises BadUsage."""
    required = {}
    for part in filter(None, text.split(",")):
        name, _, value = part.strip().partition("=")
        try:
            least = float(value)
        except ValueError:
            least = math.nan
        if name not in REQUIREMENTS or not 0 <= least < math.inf:
            raise BadUsage(
                f"--require {part.strip()} is no requirement; write NAME=VALUE with one of"
                f" {', '.join(REQUIREMENTS)}, as in agreement=0.99,speedup=1."
            )
        required[name] = least
    return required


def parse_labels(text: str) -> dict[str, str]:
    """Return new names by old ones of `LABEL_0=NEGATIVE,LABEL_1=POSITIVE`; raises BadUsage."""
    renamed = {}
    for part in filter(None, text.split(",")):
        old, equals, new = part.partition("=")
        if not (old and equals and new):
            raise BadUsage(f"--labels {part} names no two labels; write OLD=NEW.")
        renamed[old.strip()] = new.strip()
    return renamed


def check_writable(path: Path) -> None:
    """Raise Unavailable if a file cannot be written: after a minute it would be too late."""
    try:
        path.open("a", encoding="utf-8").close()
    except OSError as error:
        raise Unavailable(f"{path} cannot be written ({error.strerror}).") from None


def read_texts(path: Path) -> list[tuple[int, str]]:
    """Return (line, text) of a file's lines that are not blank, in a random order.

    Raises Unavailable or BadInput.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise Unavailable(
            f"{path} cannot be read ({error.strerror}); --texts names a file."
        ) from None
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not UTF-8 (byte {error.start}); convert it.") from None
    texts = [(i, line.rstrip("\r")) for i, line in enumerate(lines, 1) if line.strip()]
    if not texts:
        raise BadInput(f"{path} has no text; write one on each line.")
    random.Random(SEED).shuffle(texts)
    return texts


async def _compare(
    options: argparse.Namespace, texts: list[tuple[int, str]], required: Mapping[str, float]
) -> Comparison:
    if options.seconds < FEWEST_SECONDS:
        raise BadUsage(
            f"--seconds {options.seconds:g} is too short for a comparison; give {FEWEST_SECONDS:g}"
            " or more."
        )
    renamed = parse_labels(options.labels)
    plain = [text for _, text in texts]
    started, cpu_started = time.monotonic(), time.process_time()
    timeout = aiohttp.ClientTimeout(total=min(LONGEST_S, max(10.0, options.seconds / 4)))
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        timeout=timeout,
        cookie_jar=aiohttp.DummyCookieJar(),
    ) as session:
        old = await _target(session, options, "old", plain)
        new = await _target(session, options, "new", plain)
        answered = await ask_all(
            session, (old, new), plain, ANSWERS_IN_FLIGHT, options.seconds * ANSWERS_SHARE
        )
        agreement = compare_answers(texts[: len(answered[0])], answered[0], answered[1], renamed)
        with tqdm(total=SLICES, unit=" slices", disable=not sys.stderr.isatty()) as bar:
            left_s = options.seconds - (time.monotonic() - started)
            levels = await time_servers(session, old, new, plain, max(left_s, 1.0), bar.update)
    seconds = time.monotonic() - started
    return Comparison(
        old=old,
        new=new,
        texts=len(texts),
        agreement=agreement,
        levels=levels,
        requirements=measure_requirements(required, agreement, levels),
        seconds=seconds,
        is_client_busy=time.process_time() - cpu_started > BUSY_CLIENT * seconds,
    )


async def _target(
    session: aiohttp.ClientSession, options: argparse.Namespace, role: str, texts: Sequence[str]
) -> Target:
    """Return one of the servers, with its format given or found out."""
    url = check_url(getattr(options, role))
    model = getattr(options, f"{role}_model")
    given = getattr(options, f"{role}_format")
    headers = read_headers(getattr(options, f"{role}_headers"), f"--{role}-headers")

    def with_format(chosen: Format) -> Target:
        return Target(role, url, chosen, headers)

    return await choose_target(session, with_format, given, model, texts)


def check_url(text: str) -> str:
    """Return an address without a slash at its end; raises BadUsage unless it is plain http(s)."""
    try:
        parts = urlsplit(text)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:
        is_address = False
    if not is_address:
        raise BadUsage(f"{text} is not an address; write it as http://host:port.")
    if parts.username is not None:
        raise BadUsage(
            "An address with a user and a password would be printed; pass them as a header, with"
            " --old-headers or --new-headers."
        )
    return urlunsplit(parts._replace(query="", fragment="")).rstrip("/")


def measure_requirements(
    required: Mapping[str, float], agreement: Agreement, levels: Sequence[Level]
) -> list[Requirement]:
    """Return each requirement with what was measured of it; NaN is never enough."""
    alone, most = levels[0], levels[-1]
    failed = agreement.failed_new + sum(level.failures[1] for level in levels)
    sent = agreement.texts + sum(level.failures[1] + level.requests[1] for level in levels)
    measured = {
        "agreement": agreement.share,
        "failures": failed / sent,
        "speedup": most.speed_up.median,
        "latency": 1 / alone.latency.median,
        "difference": agreement.largest_difference,
    }
    return [
        Requirement(name, bound, measured[name], is_upper=name in UPPER_BOUNDS)
        for name, bound in required.items()
    ]
