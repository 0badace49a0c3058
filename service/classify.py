"""
A classification, from a request's bytes to its answer's, in whatever dialect it is asked for.

    schemas (shape) → here (deadline) → classifier.encode (tokens) → batcher.submit (a place or a refusal)
    → classifier.start (the batcher's thread) → dialect (labels, JSON)

An ASGI application of its own in front of FastAPI, whose way to a handler costs as much as all of this.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from typing import TypeVar

from starlette.types import Message, Receive, Scope, Send

from service.batcher import Row
from service.classifier import Classifier, Encoded, Truncate
from service.dialects import Answered, Called, Dialect, Headers
from service.errors import DeadlineExceeded, InvalidInput, NotReady, ServiceError, ShuttingDown, TooLarge
from service.models import Models
from service.schemas import Limits, Text

log = logging.getLogger(__name__)

Result = TypeVar("Result")

# What would take the event loop longer than so many bytes, characters or labels do, a millisecond or two, goes to a thread.
BYTES_ON_THE_LOOP = 262_144
CHARS_ON_THE_LOOP = 1_000
LABELS_ON_THE_LOOP = 1_000
# What our own request calls the texts, and each of them.
INPUT = re.compile(r"input(?=$|[\[.])")
# When it is first looked whether the client is still there.
WATCH_AFTER_S = 0.02

# Statuses of 500 and above that refuse a request rather than confess to a fault.
UNAVAILABLE = (NotReady, ShuttingDown, DeadlineExceeded)


class ClientLeft(Exception):
    """The client closed the connection before its request was answered."""


class Classify:
    """The ASGI application for one dialect; `scope["state"]` says which request it answers, and for which model if the path does."""

    def __init__(self, models: Models, dialect: Dialect, field: str = "input") -> None:
        self._models = models
        self._dialect = dialect
        self._field = field
        self._limits = Limits(texts=models.settings.max_texts, text_chars=models.settings.max_text_chars)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        models, metrics = self._models, self._models.metrics
        # A list, so that what goes wrong after the model is known is counted as that model's.
        named = [""]
        models.answering += 1
        try:
            status, headers, pieces = 200, *await self._answer(scope, receive, named)
        except ServiceError as error:
            if error.status < 500 or isinstance(error, UNAVAILABLE):
                metrics.rejected.labels(error.code).inc()
            status, headers, pieces = self._refusal(self._renamed(error))
        except ClientLeft:
            metrics.rejected.labels("client_left").inc()
            status, headers, pieces = 499, [], [b""]
        except Exception:  # The one place where a bug becomes an answer.
            log.exception("bug", extra={"request_id": scope["state"]["request_id"], "model": named[0]})
            status, headers, pieces = self._refusal(
                ServiceError("This is a bug in the service; its log has the traceback under the request's id.")
            )
        finally:
            models.answering -= 1
        metrics.count_request(named[0], status)
        headers.append((b"content-length", str(sum(map(len, pieces))).encode()))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        for number, piece in enumerate(pieces, 1):
            await send({"type": "http.response.body", "body": piece, "more_body": number < len(pieces)})

    async def _answer(self, scope: Scope, receive: Receive, named: list[str]) -> tuple[Headers, list[bytes]]:
        began = time.monotonic()
        models, settings, metrics = self._models, self._models.settings, self._models.metrics
        given, state = dict(scope["headers"]), scope["state"]
        busy_wait = read_busy_wait(given.get(b"x-busy-wait"), settings.busy_wait != "off")
        called = Called(await read_body(given.get(b"content-length", b""), receive, settings.max_body_bytes), given, state.get("model"))
        read = self._dialect.read
        asked = read(called, self._limits) if len(called.body) <= BYTES_ON_THE_LOOP else await asyncio.to_thread(read, called, self._limits)
        started = time.monotonic_ns()
        name, classifier = models.get(asked.model)
        named[0] = name
        encoded = await encode(classifier, asked.input, asked.truncate)
        tokenized = time.monotonic_ns()
        left_s = max(0.0, settings.request_timeout_s - (time.monotonic() - began))
        rows = await unless_the_client_leaves(receive, models.batcher.submit(name, encoded, left_s, busy_wait))
        answered = Answered(
            called, asked, name, classifier.manifest, encoded, rows, state["request_id"], tokenized - started, time.monotonic_ns() - started
        )
        short = len(encoded) * len(classifier.manifest.labels) <= LABELS_ON_THE_LOOP
        headers, pieces = self._dialect.write(answered) if short else await asyncio.to_thread(self._dialect.write, answered)
        finished = time.monotonic_ns()
        metrics.tokenize.labels(name).observe((tokenized - started) / 1e9)
        metrics.request.labels(name).observe((finished - started) / 1e9)
        truncated = sum([item.truncated for item in encoded])
        if truncated:
            metrics.truncated.labels(name).inc(truncated)
        timing = server_timing(tokenized - started, finished - started, rows)
        return [*headers, (b"server-timing", timing.encode())], pieces

    def _refusal(self, error: ServiceError) -> tuple[int, Headers, list[bytes]]:
        status, headers, body = self._dialect.refuse(error)
        return status, headers, [body]

    def _renamed(self, error: ServiceError) -> ServiceError:
        """The error with what it calls `input` called as this dialect does."""
        if self._field != "input" and error.param is not None and INPUT.match(error.param):
            error.message = error.message.replace("input", self._field, 1)
            error.param = self._field + error.param.removeprefix("input")
        return error


def read_busy_wait(given: bytes | None, allowed: bool) -> float:
    """The share in X-Busy-Wait by which a proof's control is to take longer, 0 to 1; InvalidInput where that is not allowed."""
    if given is None:
        return 0.0
    if not allowed:
        raise InvalidInput("X-Busy-Wait is for latency proofs and off here; DRBERT_BUSY_WAIT=loopback turns it on.", param="X-Busy-Wait")
    try:
        share = float(given)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise InvalidInput("X-Busy-Wait must be a number from 0 to 1, the share by which its batch takes longer.", param="X-Busy-Wait")
    return share


async def read_body(declared: bytes, receive: Receive, limit: int) -> bytes:
    """The body of the length that is `declared`, if it is; TooLarge as soon as it is known to pass `limit` bytes."""
    if declared.isdigit() and int(declared) > limit:
        await drain(receive, int(declared), limit)
        raise TooLarge(f"The body has {int(declared)} bytes, the limit is {limit}.", param="body")
    chunks, size = [], 0
    async for chunk in body_chunks(receive):
        size += len(chunk)
        if size > limit:
            raise TooLarge(f"The body has more than {limit} bytes, the limit.", param="body")
        chunks.append(chunk)
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


async def drain(receive: Receive, declared: int, limit: int) -> None:
    """Reads and forgets a body that is too large, within reason: most clients read no answer before they have sent all."""
    if declared <= 16 * limit:
        async for _ in body_chunks(receive):
            pass


async def body_chunks(receive: Receive) -> AsyncIterator[bytes]:
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientLeft
        yield message.get("body", b"")
        if not message.get("more_body"):
            return


async def unless_the_client_leaves(receive: Receive, work: Awaitable[Result]) -> Result:
    """What `work` returns or raises; ClientLeft, and the work cancelled, if the connection closes first.

    Nobody looks in the first WATCH_AFTER_S: most answers are there by then, and looking takes a task.
    """
    loop, this = asyncio.get_running_loop(), asyncio.current_task()
    assert this is not None, "a request is answered in a task"
    watching: asyncio.Task[Message] | None = None
    waiting, left = True, False

    def watch() -> None:
        nonlocal watching
        # After the body, the only message there can be is that the client has gone.
        watching = loop.create_task(receive())    # type: ignore[arg-type]
        watching.add_done_callback(leave)

    def leave(_: asyncio.Task[Message]) -> None:
        nonlocal left
        if waiting:
            left = True
            this.cancel()

    later = loop.call_later(WATCH_AFTER_S, watch)
    try:
        return await work
    except asyncio.CancelledError:
        if not left:
            raise
        this.uncancel()
        raise ClientLeft from None
    finally:
        waiting = False
        later.cancel()
        if watching is not None:
            watching.cancel()


async def encode(classifier: Classifier, texts: Sequence[Text], truncate: Truncate) -> list[Encoded]:
    """Tokens of every text; one that cannot be used fails the list and is named."""
    if sum([len(text.text) + len(text.pair or "") for text in texts]) <= CHARS_ON_THE_LOOP:
        return [encode_one(classifier, text, truncate) for text in texts]
    return await asyncio.to_thread(lambda: [encode_one(classifier, text, truncate, beside=True) for text in texts])


def encode_one(classifier: Classifier, text: Text, truncate: Truncate, beside: bool = False) -> Encoded:
    if text.pair is not None and not classifier.manifest.takes_pairs:
        where = f"{text.where}.text_pair"
        raise InvalidInput(f"{where}: this model takes single texts only.", param=where)
    try:
        return classifier.encode(text.text, text.pair, truncate, beside)
    except InvalidInput as error:
        raise InvalidInput(f"{text.where}: {error.message}", param=text.where) from None


def server_timing(tokenize_ns: int, total_ns: int, rows: Sequence[Row]) -> str:
    """Milliseconds with every nanosecond digit; of a list, its slowest item."""
    slowest = rows[0] if len(rows) == 1 else max(rows, key=lambda row: row.queue_ns + row.inference_ns)
    return (
        f"tokenize;dur={tokenize_ns / 1e6:.6f}, queue;dur={slowest.queue_ns / 1e6:.6f}, "
        f'inference;dur={slowest.inference_ns / 1e6:.6f};desc="b={slowest.batch_size} t={slowest.length}", '
        f"total;dur={total_ns / 1e6:.6f}"
    )
