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
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
from tqdm import tqdm

from client.compare.answers import Agreement, compare_answers
from client.compare.load import ask_all
from client.compare.report import Comparison, Requirement, describe, to_json, write_page
from client.compare.target import TIMEOUT, Format, Target, parse_format, probe
from client.compare.timing import SLICES, Level, time_servers
from command import BadInput, BadUsage, Parser, Unavailable
from proof.plans.dialects import headers_from

ANSWERS_SHARE = 0.25
"""Share of the time in which answers are compared."""
ANSWERS_IN_FLIGHT = 4
FEWEST_SECONDS = 5.0
REQUIREMENTS: Mapping[str, str] = {
    "agreement": "share of texts with the same label",
    "speedup": "texts per second of the new server ÷ the old one's, with 32 in flight",
    "latency": "p50 of the old server ÷ the new one's, one request at a time",
}
"""What --require may name; the measured value must reach the required one."""


def main(arguments: Sequence[str]) -> int:
    """Compare two servers by command-line arguments, and return the exit code."""
    options = _parser().parse_args(arguments)
    required = parse_requirements(options.require)
    texts = read_texts(options.texts)
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
        default="agreement=0.99",
        metavar="NAME=VALUE,…",
        help=(
            "values that decide the exit code (default: agreement=0.99): "
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


def read_texts(path: Path) -> list[str]:
    """Return the lines of a file that are not blank; raises Unavailable or BadInput."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise Unavailable(
            f"{path} cannot be read ({error.strerror}); --texts names a file."
        ) from None
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not UTF-8 (byte {error.start}); convert it.") from None
    texts = [line for line in lines if line.strip()]
    if not texts:
        raise BadInput(f"{path} has no text; write one on each line.")
    return texts


async def _compare(
    options: argparse.Namespace, texts: list[str], required: Mapping[str, float]
) -> Comparison:
    if options.seconds < FEWEST_SECONDS:
        raise BadUsage(
            f"--seconds {options.seconds:g} is too short for a comparison; give {FEWEST_SECONDS:g}"
            " or more."
        )
    renamed = parse_labels(options.labels)
    started = time.monotonic()
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(
        connector=connector, timeout=TIMEOUT, cookie_jar=aiohttp.DummyCookieJar()
    ) as session:
        old = await _target(session, options, "old", texts[0])
        new = await _target(session, options, "new", texts[0])
        answered = await ask_all(
            session, (old, new), texts, ANSWERS_IN_FLIGHT, options.seconds * ANSWERS_SHARE
        )
        agreement = compare_answers(texts[: len(answered[0])], answered[0], answered[1], renamed)
        with tqdm(total=SLICES, unit=" slices", disable=not sys.stderr.isatty()) as bar:
            left_s = options.seconds - (time.monotonic() - started)
            levels = await time_servers(session, old, new, texts, max(left_s, 1.0), bar.update)
    return Comparison(
        old=old,
        new=new,
        texts=len(texts),
        agreement=agreement,
        levels=levels,
        requirements=measure_requirements(required, agreement, levels),
        seconds=time.monotonic() - started,
    )


async def _target(
    session: aiohttp.ClientSession, options: argparse.Namespace, role: str, text: str
) -> Target:
    """Return one of the servers, with its format given or found out."""
    url = check_url(getattr(options, role))
    model = getattr(options, f"{role}_model")
    headers = headers_from(getattr(options, f"{role}_headers"))

    def with_format(chosen: Format) -> Target:
        return Target(role, url, chosen, headers)

    given = getattr(options, f"{role}_format")
    if given is not None:
        return with_format(parse_format(given, model))
    return await probe(session, with_format, model, text)


def check_url(text: str) -> str:
    """Return an address without a slash at its end; raises BadUsage unless it is http(s)."""
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise BadUsage(f"{text} is not an address; write it as http://host:port.")
    return text.rstrip("/")


def measure_requirements(
    required: Mapping[str, float], agreement: Agreement, levels: Sequence[Level]
) -> list[Requirement]:
    """Return each requirement with what was measured of it; NaN is never enough."""
    alone, most = levels[0], levels[-1]
    measured = {
        "agreement": agreement.share,
        "speedup": most.speed_up.median,
        "latency": 1 / alone.latency.median,
    }
    return [Requirement(name, least, measured[name]) for name, least in required.items()]
