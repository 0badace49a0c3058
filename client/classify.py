"""
Classifies texts from the command line: its arguments, or the lines of stdin.

    drbert-classify "a charming and often affecting journey"
    drbert-classify --model drbert --url https://reviews.example < reviews.txt > labels.tsv

It writes one line per line of input, in order: label, score and text, separated by tabs, or the
service's JSON with --json. Lines are sent in batches over several connections. A request that a
service refuses because it is full or starting is retried, with growing pauses.
"""

from __future__ import annotations

import argparse
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

RETRIED_STATUSES = (429, 502, 503, 504)
FIRST_PAUSE_S = 0.25
LONGEST_PAUSE_S = 20.0
REQUEST_TIMEOUT_S = 60.0
INPUT = re.compile(r"input(\[(\d+)\])?(?=[ :])")
"""How an error message of the service names the texts of a request, or one of them."""

Answer = dict[str, Any]
"""The service's answer for one text: its label, score and scores."""
Line = tuple[int, str]
"""Number of a line, from 1, and the line."""


def main(arguments: Sequence[str]) -> int:
    """Classify the texts of a command line; return the exit code."""
    options = _parser().parse_args(arguments)
    _check_options(options)
    if options.texts:
        lines, kind = options.texts, "text"
    else:
        lines, kind = decode_lines(sys.stdin.buffer), "line"
    key = os.environ.get("DRBERT_API_KEY")
    if key and not key.isascii():
        raise BadUsage("DRBERT_API_KEY has a character that is not ASCII; a key has none.")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    # A progress bar is of no use for a handful of texts, and does not belong in a file.
    bar = tqdm(unit=" texts", disable=bool(options.texts) or not sys.stderr.isatty())
    with (
        httpx.Client(base_url=options.url, headers=headers, timeout=REQUEST_TIMEOUT_S) as client,
        bar,
    ):
        fields = {"model": options.model, "top_k": options.top_k}
        service = Service(client, fields, options.retry_timeout)
        answers = classify_lines(service, lines, options.batch_size, options.connections, kind)
        for line, answer in answers:
            print(format_answer(line, answer, as_json=options.json))
            bar.update()
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="drbert-classify",
        description="Classify texts, or the lines of stdin, by a running service.",
    )
    parser.add_argument(
        "texts",
        nargs="*",
        metavar="TEXT",
        help="texts to classify (default: the lines of stdin)",
    )
    parser.add_argument(
        "--url",
        default="http://127.0.0.1:8000",
        help="address of the service (default: http://127.0.0.1:8000)",
    )
    parser.add_argument("--model", help="name of a loaded model (default: the service's first)")
    parser.add_argument("--top-k", type=int, help="with --json: number of labels to return")
    parser.add_argument(
        "--json",
        action="store_true",
        help="write the service's answer for each text instead of label, score and text",
    )
    parser.add_argument(
        "--batch-size", type=int, default=32, help="texts per request (default: 32)"
    )
    parser.add_argument(
        "--connections", type=int, default=4, help="concurrent requests (default: 4)"
    )
    parser.add_argument(
        "--retry-timeout",
        type=float,
        default=60.0,
        help="seconds for which a request is retried (default: 60)",
    )
    # Names of earlier releases.
    _add_alias(parser, "--at-once", "batch_size", int)
    _add_alias(parser, "--patience", "retry_timeout", float)
    return parser


def _add_alias(parser: Parser, option: str, name: str, kind: type[int | float]) -> None:
    """Accept an option by an old name, which the help does not show."""
    parser.add_argument(
        option, dest=name, type=kind, default=argparse.SUPPRESS, help=argparse.SUPPRESS
    )


def _check_options(options: argparse.Namespace) -> None:
    """Raise BadUsage for what the parser cannot check."""
    for name in ("batch_size", "connections"):
        value = getattr(options, name)
        if value < 1:
            raise BadUsage(f"--{name.replace('_', '-')} is {value}; it must be at least 1.")
    if not options.texts and sys.stdin.isatty():
        raise BadUsage(
            'There is no input. Pass texts or lines on stdin: drbert-classify "good film", or'
            " drbert-classify < texts.txt."
        )
    check_url(options.url)


def check_url(url: str) -> None:
    """Raise BadUsage unless a URL has a scheme and a host to send requests to."""
    try:
        address = httpx.URL(url)
    except httpx.InvalidURL:
        address = httpx.URL()
    if address.scheme not in ("http", "https") or not address.host:
        raise BadUsage(
            f"--url {url!r} is not the address of a service; write it as http://127.0.0.1:8000 or"
            " https://reviews.example."
        )


def decode_lines(file: Iterable[bytes]) -> Iterator[str]:
    """Yield the lines of a file; BadInput names the first one that is not UTF-8."""
    for number, line in enumerate(file, 1):
        try:
            yield line.decode().rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise BadInput(
                f"line {number} is not UTF-8 (byte {error.start + 1} of it); convert the input"
                " first, for example by iconv -f LATIN1 -t UTF-8."
            ) from None


@dataclass(frozen=True)
class Service:
    """A running service; requests that it cannot take now are retried."""

    client: httpx.Client
    """The connections to the service."""
    fields: dict[str, Any]
    """Fields of each request besides its texts; None leaves a field out."""
    retry_timeout_s: float
    """Seconds after which a request is not retried."""
    stopped: threading.Event = field(default_factory=threading.Event)
    """Set when no answer is needed any more; it ends all retries."""
    reported: threading.Event = field(default_factory=threading.Event)
    """Set when the user knows that requests are retried."""

    def classify(self, texts: Sequence[str], names: Sequence[str] = ()) -> list[Answer]:
        """Return one answer per text.

        BadInput if the service rejects the request; the message names a text by its entry in
        `names`. Unavailable if there is no answer before the retry timeout.
        """
        deadline = time.monotonic() + self.retry_timeout_s
        longest_s = FIRST_PAUSE_S
        while True:
            retry_after_s = 0.0
            try:
                response = self.client.post("/v1/classify", json=self._body(texts))
            except httpx.TransportError as error:
                reason = str(error) or type(error).__name__
            else:
                if response.is_success:
                    return _answers(response)
                reason = _message(response)
                if response.status_code not in RETRIED_STATUSES:
                    raise BadInput(f"{self.client.base_url} refused: {_with_names(reason, names)}")
                retry_after_s = _retry_after_s(response)
            self._report_retries(reason)
            # Full jitter: clients that were refused together do not return together.
            # https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/
            pause_s = random.uniform(0, longest_s) + retry_after_s
            if time.monotonic() + pause_s > deadline:
                raise Unavailable(
                    f"{self.client.base_url} did not answer within {self.retry_timeout_s:g} s:"
                    f" {reason}"
                )
            if self.stopped.wait(pause_s):
                raise Unavailable(f"The retries of {self.client.base_url} were stopped: {reason}")
            longest_s = min(LONGEST_PAUSE_S, 2 * longest_s)

    def _report_retries(self, reason: str) -> None:
        """Print once that requests are retried: a minute of silence looks like a hang."""
        if not self.reported.is_set():
            self.reported.set()
            print(
                f"drbert-classify: {self.client.base_url}: {reason}; retrying for up to"
                f" {self.retry_timeout_s:g} s",
                file=sys.stderr,
            )

    def _body(self, texts: Sequence[str]) -> dict[str, Any]:
        body: dict[str, Any] = {"input": list(texts)}
        for name, value in self.fields.items():
            if value is not None:
                body[name] = value
        return body


def _answers(response: httpx.Response) -> list[Answer]:
    """Return the answers of a response; BadInput if another program has sent it."""
    try:
        answers: list[Answer] = response.json()["data"]
    except (ValueError, KeyError, TypeError):
        raise BadInput(
            f"{response.url} does not answer as DrBERT Serve does; give --url another address."
        ) from None
    return answers


def classify_lines(
    service: Service, lines: Iterable[str], batch_size: int, connections: int, kind: str = "line"
) -> Iterator[tuple[str, Answer | None]]:
    """Yield each line with its answer, in order; an empty line has none.

    At most one batch per connection is read ahead. An error names a line by its `kind` and number.
    """
    numbered = enumerate(lines, 1)
    with ThreadPoolExecutor(connections) as pool:
        pending: deque[tuple[list[Line], Future[list[Answer]]]] = deque()
        try:
            while True:
                while len(pending) < connections:
                    batch = list(islice(numbered, batch_size))
                    if not batch:
                        break
                    pending.append((batch, pool.submit(_classify_batch, service, batch, kind)))
                if not pending:
                    return
                batch, future = pending.popleft()
                answers = iter(future.result())
                for _, line in batch:
                    yield line, next(answers) if line.strip() else None
        finally:
            service.stopped.set()
            for _, future in pending:
                future.cancel()


def format_answer(line: str, answer: Answer | None, *, as_json: bool) -> str:
    """Return a line of output: empty without an answer, or null as JSON."""
    if as_json:
        return json.dumps(answer, ensure_ascii=False)
    if answer is None:
        return ""
    return f"{answer['label']}\t{answer['score']:.4f}\t{line}"


def _classify_batch(service: Service, batch: Sequence[Line], kind: str) -> list[Answer]:
    """Return one answer per line that is not empty."""
    texts: dict[str, str] = {}
    for number, line in batch:
        if line.strip():
            texts[f"{kind} {number}"] = line
    return service.classify(list(texts.values()), list(texts)) if texts else []


def _with_names(message: str, names: Sequence[str]) -> str:
    """Replace `input` at the front of a service's message by the names of the texts it means."""
    match = INPUT.match(message)
    if match is None or int(match[2] or 0) >= len(names):
        return message
    name = names[int(match[2])] if match[2] else f"{names[0]} to {names[-1]}"
    return name + message[match.end() :]


def _retry_after_s(response: httpx.Response) -> float:
    """Return the seconds of the header Retry-After; 0 without one, or where it holds a date."""
    value = response.headers.get("retry-after", "")
    return float(value) if value.isdigit() else 0.0


def _message(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"it answered with status {response.status_code}"
