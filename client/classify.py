"""
Classifies texts from the shell: those on the command line, or the lines of stdin.

    drbert-classify "a charming and often affecting journey"
    drbert-classify --model drbert --url https://reviews.example < reviews.txt > labels.tsv

A line of output for every line of input, in order: label, score and text with tabs in between, or
the service's answer with --json. Lists of lines are sent over several connections; a service that
is full or starting is asked again, later and later.
"""

from __future__ import annotations

import json
import os
import random
import re
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import httpx
from tqdm import tqdm

from command import BadInput, BadUsage, Parser, Unavailable

AGAIN = (429, 502, 503, 504)
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 20.0
# What a refusal calls the texts of a request, or one of them.
INPUT = re.compile(r"input(\[(\d+)\])?(?=[ :])")

Answer = dict[str, Any]


def main(arguments: Sequence[str]) -> int:
    parser = Parser(
        prog="drbert-classify",
        description="Classify texts, or the lines of stdin, by a running service.",
    )
    parser.add_argument(
        "texts",
        nargs="*",
        metavar="TEXT",
        help="texts to classify; without any, the lines of stdin",
    )
    parser.add_argument(
        "--url",
        default="http://127.0.0.1:8000",
        help="where the service is (default: http://127.0.0.1:8000)",
    )
    parser.add_argument("--model", help="a loaded model's name (default: the service's first)")
    parser.add_argument("--top-k", type=int, help="with --json: how many labels are told")
    parser.add_argument(
        "--json",
        action="store_true",
        help="write the service's answer for each text instead of label, score and text",
    )
    parser.add_argument("--at-once", type=int, default=32, help="texts in a request (default: 32)")
    parser.add_argument(
        "--connections", type=int, default=4, help="requests under way (default: 4)"
    )
    parser.add_argument(
        "--patience",
        type=float,
        default=60.0,
        help="seconds for which a request is tried again (default: 60)",
    )
    given = parser.parse_args(arguments)
    for name in ("at_once", "connections"):
        if getattr(given, name) < 1:
            raise BadUsage(f"--{name.replace('_', '-')} must be at least 1.")
    if not given.texts and sys.stdin.isatty():
        raise BadUsage(
            'Give texts, or lines on stdin: drbert-classify "good film", or drbert-classify <'
            " texts.txt."
        )
    check_address(given.url)
    lines, kind = (given.texts, "text") if given.texts else (decoded(sys.stdin.buffer), "line")
    key = os.environ.get("DRBERT_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    with httpx.Client(base_url=given.url, headers=headers, timeout=60.0) as client:
        service = Service(client, {"model": given.model, "top_k": given.top_k}, given.patience)
        # Nobody watches a bar for a handful of texts, and none belongs into a file.
        bar = tqdm(unit=" texts", disable=bool(given.texts) or not sys.stderr.isatty())
        with bar:
            for line, answer in answered(service, lines, given.at_once, given.connections, kind):
                print(written(line, answer, given.json))
                bar.update()
    return 0


def check_address(url: str) -> None:
    """BadUsage unless it is one that can be asked."""
    try:
        given = httpx.URL(url)
    except httpx.InvalidURL:
        given = httpx.URL()
    if given.scheme not in ("http", "https") or not given.host:
        raise BadUsage(
            f"--url {url!r} is no address of a service; write it as http://127.0.0.1:8000 or"
            " https://reviews.example."
        )


def decoded(file: Iterable[bytes]) -> Iterator[str]:
    """The lines of a file; BadInput names the one that is not UTF-8."""
    for number, line in enumerate(file, 1):
        try:
            yield line.decode().rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise BadInput(
                f"line {number} is not UTF-8 (byte {error.start + 1} of it); convert it first, as"
                " with iconv -f LATIN1 -t UTF-8."
            ) from None


@dataclass(frozen=True)
class Service:
    """A running service, asked until it answers, patience ends or nobody waits for it any more."""

    client: httpx.Client
    fields: dict[str, Any]
    patience_s: float
    over: threading.Event = field(default_factory=threading.Event)
    """Set when nobody waits for answers: nothing is tried again."""

    def classify(self, texts: Sequence[str], places: Sequence[str] = ()) -> list[Answer]:
        """One answer a text. BadInput says what is wrong with them, by their `places`; Unavailable
        that nobody answered in time.
        """
        body = {"input": list(texts)} | {
            name: value for name, value in self.fields.items() if value is not None
        }
        give_up = time.monotonic() + self.patience_s
        pause = FIRST_PAUSE_S
        while True:
            asked: str | None
            try:
                response = self.client.post("/v1/classify", json=body)
                if response.is_success:
                    answers: list[Answer] = response.json()["data"]
                    return answers
                if response.status_code not in AGAIN:
                    raise BadInput(
                        f"{self.client.base_url} refused: {_placed(_message(response), places)}"
                    )
                why, asked = _message(response), response.headers.get("retry-after")
            except httpx.TransportError as error:
                why, asked = str(error) or type(error).__name__, None
            # Full jitter: callers that were refused together do not come back together.
            wait = random.uniform(0, pause) + (float(asked) if asked and asked.isdigit() else 0)
            if time.monotonic() + wait > give_up:
                raise Unavailable(
                    f"{self.client.base_url} did not answer within {self.patience_s:g} s: {why}"
                )
            if self.over.wait(wait):
                raise Unavailable(f"{self.client.base_url} was given up: {why}")
            pause = min(LONGEST_PAUSE_S, 2 * pause)


def answered(
    service: Service, lines: Iterable[str], at_once: int, connections: int, kind: str = "line"
) -> Iterator[tuple[str, Answer | None]]:
    """Every line with its answer, in order; an empty line has none. Reads no further ahead than its
    connections need.

    A refusal names the `kind` of thing a line is, and its number.
    """
    rest = enumerate(lines, 1)
    with ThreadPoolExecutor(connections) as pool:
        under_way: deque[tuple[list[tuple[int, str]], Future[list[Answer]]]] = deque()
        try:
            while True:
                while len(under_way) < connections and (some := list(islice(rest, at_once))):
                    texts = {f"{kind} {number}": line for number, line in some if line.strip()}
                    under_way.append(
                        (
                            some,
                            (
                                pool.submit(service.classify, list(texts.values()), list(texts))
                                if texts
                                else _nothing()
                            ),
                        )
                    )
                if not under_way:
                    return
                some, future = under_way.popleft()
                answers = iter(future.result())
                for _, line in some:
                    yield line, next(answers) if line.strip() else None
        finally:
            service.over.set()
            for _, future in under_way:
                future.cancel()


def written(line: str, answer: Answer | None, as_json: bool) -> str:
    if as_json:
        return json.dumps(answer, ensure_ascii=False)
    return "" if answer is None else f"{answer['label']}\t{answer['score']:.4f}\t{line}"


def _nothing() -> Future[list[Answer]]:
    done: Future[list[Answer]] = Future()
    done.set_result([])
    return done


def _placed(message: str, places: Sequence[str]) -> str:
    """A refusal with what it calls `input` called by its places."""
    found = INPUT.match(message)
    if found is None or int(found[2] or 0) >= len(places):
        return message
    place = places[int(found[2])] if found[2] else f"{places[0]} to {places[-1]}"
    return place + message[found.end() :]


def _message(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"it answered {response.status_code}"
