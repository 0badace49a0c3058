"""
A classification, from a request's bytes to its answer's, in whatever dialect it is asked for.

    connection (body, deadline) → dialect (shape) → encoding (tokens) → batcher.submit (a place or a
        refusal)
    → classifier.start (the batcher's thread) → dialect (labels, JSON)

An ASGI application of its own in front of FastAPI, whose way to a handler costs as much as all of
this.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from starlette.types import Receive, Scope, Send

from service.batching.requests import Row
from service.errors import (
    WANTS_A_KEY,
    BodyTooSlow,
    DeadlineExceeded,
    NotReady,
    ServiceError,
    ShuttingDown,
    Unauthorized,
)
from service.http.dialects import Answered, Called, Dialect, Headers
from service.http.keys import Keys
from service.http.transport.bodies import SMALL_BYTES, LargeBody
from service.http.transport.compression import decompressed, is_compressed
from service.http.transport.protocol import (
    ClientLeft,
    read_body,
    read_busy_wait,
    read_timeout,
    unless_the_client_leaves,
)
from service.registry import Loaded, Models
from service.runtimes.auto import ON_A_GPU
from service.schemas import ClassifyRequest, Limits
from service.settings import Settings
from service.shadow import Shadow
from service.telemetry.tracing import Noted, Tracing
from service.tokenization.encoding import Items, by_text, encode

log = logging.getLogger(__name__)

Result = TypeVar("Result")

# What would take the event loop longer than so many labels do, a millisecond or two at worst, goes
# to a thread.
LABELS_ON_THE_LOOP = 1_000
# What our own request calls the texts, and each of them.
INPUT = re.compile(r"input(?=$|[\[.])")
# Statuses of 500 and above that refuse a request rather than confess to a fault.
UNAVAILABLE = (NotReady, ShuttingDown, DeadlineExceeded)


@dataclass(frozen=True)
class Around:
    """What stands around every classification, where it was asked for."""

    keys: Keys | None = None
    shadow: Shadow | None = None
    tracing: Tracing | None = None


def limits_of(settings: Settings) -> Limits:
    return Limits(
        texts=settings.max_texts,
        text_chars=settings.max_text_chars,
        windows=settings.max_windows,
        tokens=settings.max_request_tokens,
        items=settings.max_queue_size,
    )


class Classify:
    """The ASGI application for one dialect; `scope["state"]` says which request it answers, and for
    which model if the path does.
    """

    def __init__(
        self, models: Models, around: Around, dialect: Dialect, field: str = "input"
    ) -> None:
        self._models = models
        self._around = around
        self._dialect = dialect
        self._field = field
        self._limits = limits_of(models.settings)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        models, metrics = self._models, self._models.metrics
        # So that what goes wrong after the model is known is counted as that model's.
        noted = Noted()
        began_ns = time.time_ns()
        models.answering += 1
        try:
            status, headers, pieces = 200, *await self._answer(scope, receive, noted)
        except ServiceError as error:
            if error.status < 500 or isinstance(error, UNAVAILABLE):
                metrics.rejected.labels(error.code).inc()
            status, headers, pieces = self._refusal(self._renamed(error))
        except ClientLeft:
            metrics.rejected.labels("client_left").inc()
            status, headers, pieces = 499, [], [b""]
        except Exception:  # The one place where a bug becomes an answer.
            log.exception(
                "bug", extra={"request_id": scope["state"]["request_id"], "model": noted.model}
            )
            status, headers, pieces = self._refusal(
                ServiceError(
                    "This is a bug in the service; its log has the traceback under the"
                    " request's id."
                )
            )
        finally:
            models.answering -= 1
        metrics.count_request(noted.model, status)
        headers.append((b"content-length", str(sum(map(len, pieces))).encode()))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        for number, piece in enumerate(pieces, 1):
            await send(
                {"type": "http.response.body", "body": piece, "more_body": number < len(pieces)}
            )
        if self._around.tracing is not None:
            self._around.tracing.record(scope, noted, status, began_ns, time.time_ns())

    async def _answer(
        self, scope: Scope, receive: Receive, noted: Noted
    ) -> tuple[Headers, list[bytes]]:
        """Reads what is asked, and finds the model that stays until it is answered."""
        # When its head was read: under overload it may be seconds until this runs.
        began = scope["state"].get("began") or time.monotonic()
        settings, given = self._models.settings, dict(scope["headers"])
        busy_wait = read_busy_wait(given.get(b"x-busy-wait"), settings.busy_wait != "off")
        timeout_s = read_timeout(given.get(b"x-request-timeout-ms"), settings.request_timeout_s)
        if self._around.keys is not None and not self._around.keys.admit(given):
            raise Unauthorized(WANTS_A_KEY)
        declared, deadline = given.get(b"content-length", b""), began + timeout_s
        encoding = given.get(b"content-encoding", b"")
        guard = self._models.large_bodies.guard(
            declared, receive, settings.max_body_bytes, timeout_s / 2, is_compressed(encoding)
        )
        try:
            # In no variable here, which would hold it until the end.
            return await self._answer_body(
                await read_body(
                    declared,
                    guard or receive,
                    settings.max_body_bytes,
                    settings.request_timeout_s,
                    self._models.room,
                ),
                scope,
                given,
                receive,
                noted,
                deadline,
                busy_wait,
                guard,
            )
        finally:
            if guard is not None:
                guard.release()

    async def _answer_body(
        self,
        body: bytes,
        scope: Scope,
        given: dict[bytes, bytes],
        receive: Receive,
        noted: Noted,
        deadline: float,
        busy_wait: float,
        guard: LargeBody | None,
    ) -> tuple[Headers, list[bytes]]:
        size = len(body)
        try:
            # Before anything is spent on what it holds: under overload the refusals must not cost
            # what the answers need.
            self._models.batcher.check_room(deadline)
            if is_compressed(encoding := given.get(b"content-encoding", b"")):
                body = await self._decompressed(body, encoding, deadline)
                size += len(body)
                if guard is not None and len(body) <= SMALL_BYTES:
                    guard.release()
            called = Called(
                body,
                given,
                scope["state"].get("model"),
                scope["state"].get("version"),
                scope["state"]["request_id"],
            )
            del body
            try:
                asked = await self._read(called, deadline)
            except ServiceError:
                named = called.model or called.kept.get("model")
                noted.model = (
                    named if isinstance(named, str) and named in self._models.loaded else ""
                )
                await self._models.refusals.wait()
                raise
            if size > SMALL_BYTES:
                called = replace(called, body=b"")  # The texts have its content now.
            with self._models.using(asked.model) as model:
                noted.model = model.name
                return await self._classify(
                    model, called, asked, receive, noted, deadline, busy_wait
                )
        finally:
            self._models.room.give_back(size)

    async def _decompressed(self, body: bytes, encoding: bytes, deadline: float) -> bytes:
        """A compressed body's content, which takes room; beside the event loop, for few bytes may
        become many.
        """
        try:
            content = await self._beside(
                partial(decompressed, body, encoding, self._models.settings.max_body_bytes),
                deadline,
                "decompressed",
            )
        except ServiceError:
            await self._models.refusals.wait()
            raise
        self._models.room.take(len(content))
        return content

    async def _read(self, called: Called, deadline: float) -> ClassifyRequest:
        if len(called.body) <= SMALL_BYTES:
            return self._dialect.read(called, self._limits)
        return await self._beside(
            partial(self._dialect.read, called, self._limits), deadline, "parsed"
        )

    async def _beside(self, work: Callable[[], Result], deadline: float, what: str) -> Result:
        """What `work` returns from the thread that parses large bodies."""
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                return await self._models.executors.parsing.run(work)
        except TimeoutError:
            raise DeadlineExceeded(
                f"The body was not {what} within the request's time limit."
            ) from None

    async def _classify(
        self,
        model: Loaded,
        called: Called,
        asked: ClassifyRequest,
        receive: Receive,
        noted: Noted,
        deadline: float,
        busy_wait: float,
    ) -> tuple[Headers, list[bytes]]:
        """From texts to tokens, rows, and the dialect's answer; `deadline` is of the monotonic
        clock.
        """
        metrics, manifest = self._models.metrics, model.artifact.manifest
        started = time.monotonic_ns()
        found, rows = await unless_the_client_leaves(
            receive, self._rows(model, asked, noted, deadline, busy_wait)
        )
        encoded, rows = by_text(found, rows, asked.window.pool if asked.window else "first")
        slowest = (
            rows[0]
            if len(rows) == 1
            else max(rows, key=lambda row: row.queue_ns + row.inference_ns)
        )
        since_ns, on_a_gpu = time.monotonic_ns() - started, model.choice.runtime in ON_A_GPU
        answered = Answered(
            called,
            asked,
            model.name,
            manifest,
            encoded,
            rows,
            noted.tokenize_ns,
            since_ns,
            on_a_gpu,
        )
        short = len(encoded) * len(manifest.labels) <= LABELS_ON_THE_LOOP
        write = partial(self._dialect.write, answered)
        headers, pieces = write() if short else await self._models.executors.writing.run(write)
        finished = time.monotonic_ns()
        if finished > deadline * 1e9:
            raise DeadlineExceeded("The answer was there after the request's time limit.")
        metrics.tokenize.labels(model.name).observe(noted.tokenize_ns / 1e9)
        metrics.request.labels(model.name).observe((finished - started) / 1e9)
        truncated = sum([item.truncated for item in encoded])
        if truncated:
            metrics.truncated.labels(model.name).inc(truncated)
        if self._around.shadow is not None:
            self._around.shadow.consider(model, asked, rows)
        noted.tokens, noted.queue_ns, noted.inference_ns, noted.batch_size = (
            answered.tokens,
            slowest.queue_ns,
            slowest.inference_ns,
            slowest.batch_size,
        )
        return [
            *headers,
            (
                b"server-timing",
                server_timing(noted.tokenize_ns, finished - started, slowest).encode(),
            ),
        ], pieces

    async def _rows(
        self, model: Loaded, asked: ClassifyRequest, noted: Noted, deadline: float, busy_wait: float
    ) -> tuple[Items, list[Row]]:
        started, batcher = time.monotonic_ns(), self._models.batcher
        most = None if asked.window else model.artifact.manifest.max_tokens
        chars = [len(text.text) + len(text.pair or "") for text in asked.input]
        # Before they are tokenized, which costs more than a refusal may.
        with batcher.reserve(model.key, chars, most, deadline) as place:
            found = await encode(
                model.classifier, asked, self._limits, self._models.executors, deadline
            )
            noted.texts, noted.tokenize_ns = len(asked.input), time.monotonic_ns() - started
            return found, await batcher.submit(
                model.key,
                found.items,
                max(0.0, deadline - time.monotonic()),
                busy_wait,
                place=place,
            )

    def _refusal(self, error: ServiceError) -> tuple[int, Headers, list[bytes]]:
        status, headers, body = self._dialect.refuse(error)
        if isinstance(error, Unauthorized):
            headers.append((b"www-authenticate", b"Bearer"))
        if isinstance(error, BodyTooSlow | ShuttingDown):
            headers.append((b"connection", b"close"))
        return status, headers, [body]

    def _renamed(self, error: ServiceError) -> ServiceError:
        """The error with what it calls `input` called as this dialect does."""
        if self._field != "input" and error.param is not None and INPUT.match(error.param):
            error.message = error.message.replace("input", self._field, 1)
            error.param = self._field + error.param.removeprefix("input")
        return error


def server_timing(tokenize_ns: int, total_ns: int, slowest: Row) -> str:
    """Milliseconds with every nanosecond digit; of a list, its slowest item."""
    return (
        f"tokenize;dur={tokenize_ns / 1e6:.6f}, queue;dur={slowest.queue_ns / 1e6:.6f}, "
        f'inference;dur={slowest.inference_ns / 1e6:.6f};desc="b={slowest.batch_size}'
        f' t={slowest.length}", '
        f"total;dur={total_ns / 1e6:.6f}"
    )
