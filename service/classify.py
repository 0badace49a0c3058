"""
POST /classify, from a request's bytes to its answer's.

    schemas (shape) → here (deadline) → classifier.encode (tokens) → batcher.submit (a place or a refusal)
    → classifier.start (the batcher's thread) → answers (labels)

An ASGI application of its own in front of FastAPI, whose way to a handler costs as much as all of this.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from typing import TypeVar

import orjson
from starlette.types import Message, Receive, Scope, Send

from service import answers
from service.batcher import Row
from service.classifier import Classifier, Encoded, Truncate
from service.errors import DeadlineExceeded, InvalidInput, NotReady, ServiceError, ShuttingDown, TooLarge
from service.models import Models
from service.schemas import ClassifyRequest, Limits, Text, read_request

log = logging.getLogger(__name__)

Headers = list[tuple[bytes, bytes]]
Result = TypeVar("Result")

# What would take the event loop longer than so many characters or labels do, a millisecond or two, goes to a thread.
CHARS_ON_THE_LOOP = 1_000
LABELS_ON_THE_LOOP = 1_000
# When it is first looked whether the client is still there.
WATCH_AFTER_S = 0.02

# Statuses of 500 and above that refuse a request rather than confess to a fault.
UNAVAILABLE = (NotReady, ShuttingDown, DeadlineExceeded)
JSON = (b"content-type", b"application/json")


class ClientLeft(Exception):
    """The client closed the connection before its request was answered."""


class Classify:
    """The ASGI application; `scope["state"]["request_id"]` says which request it answers."""

    def __init__(self, models: Models) -> None:
        self._models = models
        self._limits = Limits(texts=models.settings.max_texts, text_chars=models.settings.max_text_chars)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        models, metrics = self._models, self._models.metrics
        # A list, so that what goes wrong after the model is known is counted as that model's.
        named = [""]
        models.answering += 1
        try:
            status, headers, body = 200, *await self._answer(scope, receive, named)
        except ServiceError as error:
            if error.status < 500 or isinstance(error, UNAVAILABLE):
                metrics.rejected.labels(error.code).inc()
            status, headers, body = refusal(error)
        except ClientLeft:
            metrics.rejected.labels("client_left").inc()
            status, headers, body = 499, [], b""
        except Exception:  # The one place where a bug becomes an answer.
            log.exception("bug", extra={"request_id": scope["state"]["request_id"], "model": named[0]})
            status, headers, body = refusal(
                ServiceError("This is a bug in the service; its log has the traceback under the request's id.")
            )
        finally:
            models.answering -= 1
        metrics.count_request(named[0], status)
        headers.append((b"content-length", str(len(body)).encode()))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _answer(self, scope: Scope, receive: Receive, named: list[str]) -> tuple[Headers, bytes]:
        began = time.monotonic()
        models, settings, metrics = self._models, self._models.settings, self._models.metrics
        given = dict(scope["headers"])
        busy_wait = read_busy_wait(given.get(b"x-busy-wait"), settings.busy_wait != "off")
        asked = read_request(await read_body(given.get(b"content-length", b""), receive, settings.max_body_bytes), self._limits)
        started = time.monotonic_ns()
        name, classifier = models.get(asked.model)
        named[0] = name
        encoded = await encode(classifier, asked.input, asked.truncate)
        tokenized = time.monotonic_ns()
        left_s = max(0.0, settings.request_timeout_s - (time.monotonic() - began))
        rows = await unless_the_client_leaves(receive, models.batcher.submit(name, encoded, left_s, busy_wait))
        answer = await answer_of(asked, name, classifier, encoded, rows, scope["state"]["request_id"])
        finished = time.monotonic_ns()
        metrics.tokenize.labels(name).observe((tokenized - started) / 1e9)
        metrics.request.labels(name).observe((finished - started) / 1e9)
        truncated = sum([item.truncated for item in encoded])
        if truncated:
            metrics.truncated.labels(name).inc(truncated)
        timing = server_timing(tokenized - started, finished - started, rows)
        return [JSON, (b"server-timing", timing.encode())], answer


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


async def answer_of(
    asked: ClassifyRequest, name: str, classifier: Classifier, encoded: Sequence[Encoded], rows: Sequence[Row], request_id: str
) -> bytes:
    activation = "none" if asked.use_activation is False else asked.activation
    manifest = classifier.manifest
    tokens = sum([item.tokens for item in encoded])
    head = orjson.dumps({
        "id": asked.request_id or f"classify-{request_id}", "object": "list", "created": int(time.time()), "model": name,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0},
    })

    def each() -> list[bytes]:
        # One text's answer at a time, so that whoever else wants the interpreter gets it in between.
        return [
            orjson.dumps(answers.classification(i, row.value, item, manifest, activation, asked.top_k, asked.threshold))
            for i, (item, row) in enumerate(zip(encoded, rows, strict=True))
        ]

    short = len(encoded) * len(manifest.labels) <= LABELS_ON_THE_LOOP
    return b'%s,"data":[%s]}' % (head[:-1], b",".join(each() if short else await asyncio.to_thread(each)))


def server_timing(tokenize_ns: int, total_ns: int, rows: Sequence[Row]) -> str:
    """Milliseconds with every nanosecond digit; of a list, its slowest item."""
    slowest = rows[0] if len(rows) == 1 else max(rows, key=lambda row: row.queue_ns + row.inference_ns)
    return (
        f"tokenize;dur={tokenize_ns / 1e6:.6f}, queue;dur={slowest.queue_ns / 1e6:.6f}, "
        f'inference;dur={slowest.inference_ns / 1e6:.6f};desc="b={slowest.batch_size} t={slowest.length}", '
        f"total;dur={total_ns / 1e6:.6f}"
    )


def refusal(error: ServiceError) -> tuple[int, Headers, bytes]:
    """Status, headers and body of an error."""
    headers = [JSON] if error.retry_after_s is None else [JSON, (b"retry-after", str(error.retry_after_s).encode())]
    return int(error.status), headers, orjson.dumps(error.body())
