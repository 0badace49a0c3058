"""
A classification, from the bytes of a request to the bytes of its answer, in any dialect.

    transport (body, deadline) → dialect (request) → tokenization (tokens)
    → batcher.submit (results) → dialect (labels, JSON)

It is an ASGI application of its own, because the way through FastAPI to a handler takes longer than
all of this (service/http/router.py).
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from starlette.types import Receive, Scope, Send

from service.artifact import Manifest
from service.batching.requests import Item, Result
from service.errors import (
    KEY_REQUIRED,
    BodyTooSlow,
    DeadlineExceeded,
    NotReady,
    Overloaded,
    ServiceError,
    ShuttingDown,
    TooLarge,
    Unauthorized,
)
from service.http.context import HttpContext
from service.http.dialects import Completed, Dialect, Headers, RawRequest
from service.http.transport.bodies import SMALL_BYTES, LargeBody
from service.http.transport.compression import decompressed, is_compressed
from service.http.transport.request import (
    ClientDisconnected,
    cancel_on_disconnect,
    read_body,
    read_injected_delay,
    read_timeout,
)
from service.registry import LoadedModel
from service.requests.heads import check_heads
from service.schemas import ClassifyRequest
from service.telemetry.tracing import RequestStats
from service.tokenization.encoding import Items, encode, merge_windows

log = logging.getLogger(__name__)

Value = TypeVar("Value")

# Answers with more labels take the event loop a millisecond or two, so a thread writes them.
MAX_LABELS_ON_LOOP = 1_000
# The same of labels of tokens, by their tokens and by the scores of these.
MAX_TOKENS_ON_LOOP = 128
MAX_TOKEN_SCORES_ON_LOOP = 4_000
# Matches `input`, `input[3]` and `input.text`: our own format's names in an error's `param`.
INPUT = re.compile(r"input(?=$|[\[.])")
# Errors that count texts in their message.
LIMITS = (TooLarge, Overloaded, DeadlineExceeded)
TEXTS = re.compile(r"\btexts\b")
# Errors of status 500 and above that count as refusals, not as failures.
UNAVAILABLE = (NotReady, ShuttingDown, DeadlineExceeded)


@dataclass(slots=True)  # not frozen: several are made per request, and that costs more
class _Call:
    """What one call of the endpoint carries from step to step."""

    scope: Scope
    receive: Receive
    headers: dict[bytes, bytes]
    stats: RequestStats
    deadline: float
    """In seconds of time.monotonic()."""
    injected_delay: float
    guard: LargeBody | None
    """The memory reserved for a large body; None for a small one."""


class ClassifyEndpoint:
    """The ASGI application of one dialect.

    `scope["state"]` holds the request's id, and the model if the path names one. It gets the
    request's `stats` and the `error_code` of a refusal, for the access log.
    """

    def __init__(self, context: HttpContext, dialect: Dialect) -> None:
        self._context = context
        self._service = context.service
        self._dialect = dialect

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        metrics, lifecycle = self._service.metrics, self._service.lifecycle
        # Filled in step by step: once the model is known, a failure counts under its name.
        stats = RequestStats()
        scope["state"]["stats"] = stats
        wall_started_ns = time.time_ns()
        lifecycle.active_requests += 1
        try:
            headers, pieces = await self._answer(scope, receive, stats)
            status = 200
        except ServiceError as error:
            if error.status < 500 or isinstance(error, UNAVAILABLE):
                metrics.rejected.labels(error.code).inc()
            status, headers, pieces = self._refusal(self._with_dialect_names(error), scope)
        except ClientDisconnected:
            metrics.rejected.labels("client_left").inc()
            scope["state"]["error_code"] = "client_left"
            status, headers, pieces = 499, [], [b""]
        except Exception:  # The one place where a bug becomes an answer.
            log.exception(
                "bug", extra={"request_id": scope["state"]["request_id"], "model": stats.model}
            )
            status, headers, pieces = self._refusal(
                ServiceError(
                    "This is a bug in the service; its log has the traceback under the"
                    " request's id."
                ),
                scope,
            )
        finally:
            lifecycle.active_requests -= 1
        metrics.count_request(stats.model, status)
        headers.append((b"content-length", str(sum(map(len, pieces))).encode()))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        for number, piece in enumerate(pieces, 1):
            await send(
                {"type": "http.response.body", "body": piece, "more_body": number < len(pieces)}
            )
        if self._context.hooks.tracing is not None:
            self._context.hooks.tracing.record(
                scope, stats, status, wall_started_ns, time.time_ns()
            )

    async def _answer(
        self, scope: Scope, receive: Receive, stats: RequestStats
    ) -> tuple[Headers, list[bytes]]:
        """Check the headers, read the body, and answer it."""
        settings, headers = self._service.settings, dict(scope["headers"])
        # Under overload it may be seconds from then until this runs.
        head_read_at = scope["state"].get("began") or time.monotonic()
        delay = read_injected_delay(headers.get(b"x-busy-wait"), settings.busy_wait != "off")
        timeout_s = read_timeout(headers.get(b"x-request-timeout-ms"), settings.request_timeout_s)
        keys = self._context.hooks.keys
        if keys is not None and not keys.admit(headers):
            raise Unauthorized(KEY_REQUIRED)
        length = headers.get(b"content-length", b"")
        guard = self._context.large_bodies.guard(
            length,
            receive,
            settings.max_body_bytes,
            timeout_s / 2,
            is_compressed(headers.get(b"content-encoding", b"")),
        )
        call = _Call(scope, receive, headers, stats, head_read_at + timeout_s, delay, guard)
        try:
            # The body is passed on directly: a variable here would keep it alive until the answer.
            return await self._answer_body(
                call,
                await read_body(
                    length,
                    guard or receive,
                    settings.max_body_bytes,
                    settings.request_timeout_s,
                    self._context.body_budget,
                ),
            )
        finally:
            if guard is not None:
                guard.release()

    async def _answer_body(self, call: _Call, body: bytes) -> tuple[Headers, list[bytes]]:
        """Decompress and parse the body, and answer with the model that it names."""
        budget_bytes = len(body)
        try:
            # Checked first: under overload, a refusal must not cost a parse.
            self._service.batcher.check_capacity(call.deadline)
            if is_compressed(encoding := call.headers.get(b"content-encoding", b"")):
                body = await self._decompressed(body, encoding, call.deadline)
                budget_bytes += len(body)
                if call.guard is not None and len(body) <= SMALL_BYTES:
                    call.guard.release()
            state = call.scope["state"]
            raw = RawRequest(
                body, call.headers, state.get("model"), state.get("version"), state["request_id"]
            )
            del body
            request = await self._parse(call, raw)
            if budget_bytes > SMALL_BYTES:
                raw = replace(raw, body=b"")  # The request's texts hold its content now.
            with self._service.acquire(request.model) as model:
                call.stats.model = model.name
                if request.heads is not None:
                    check_heads(model.artifact.manifest, request.heads)
                answering = model.main if request.heads is None else model
                self._dialect.check(answering.artifact.manifest, raw)
                if request.question is not None:
                    request.question.places(answering.artifact.manifest)  # raises if there are none
                return await self._classify(call, answering, model.full_name, raw, request)
        finally:
            self._context.body_budget.release(budget_bytes)

    async def _decompressed(self, body: bytes, encoding: bytes, deadline: float) -> bytes:
        """Return a compressed body's content, charged to the body budget.

        A thread does it, because a small body may expand to a large one.
        """
        limit = self._service.settings.max_body_bytes
        try:
            work = partial(decompressed, body, encoding, limit)
            content = await self._in_parsing_thread(work, deadline, "decompressed")
        except ServiceError:
            # A client that sends bad bodies in a tight loop delays no other.
            await self._context.refusal_pacer.wait()
            raise
        self._context.body_budget.acquire(len(content))
        return content

    async def _parse(self, call: _Call, raw: RawRequest) -> ClassifyRequest:
        """Return the request in our own format; a large body is parsed in a thread."""
        work = partial(self._dialect.read, raw, self._context.limits)
        try:
            if len(raw.body) <= SMALL_BYTES:
                return work()
            return await self._in_parsing_thread(work, call.deadline, "parsed")
        except ServiceError:
            name = raw.model or raw.state.get("model")
            named = self._service.registry.names().get(name) if isinstance(name, str) else None
            if named is not None:
                call.stats.model = named.name
            # A client that sends bad bodies in a tight loop delays no other.
            await self._context.refusal_pacer.wait()
            raise

    async def _in_parsing_thread(
        self, work: Callable[[], Value], deadline: float, done: str
    ) -> Value:
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                return await self._service.executors.parsing.run(work)
        except TimeoutError:
            raise DeadlineExceeded(
                f"The body was not {done} within the request's time limit."
            ) from None

    async def _classify(
        self,
        call: _Call,
        model: LoadedModel,
        name: str,
        raw: RawRequest,
        request: ClassifyRequest,
    ) -> tuple[Headers, list[bytes]]:
        """Tokenize the texts, wait for their results, and write the answer of the model `name`."""
        stats, manifest = call.stats, model.artifact.manifest
        started_ns = time.monotonic_ns()
        items, results = await cancel_on_disconnect(
            call.receive, self._compute(call, model, request)
        )
        pool = request.window.pool if request.window else "first"
        # The windows' logits are those of all heads.
        whole = (model.whole or model).artifact.manifest
        if items.whole is None or _is_small(whole, items.items):
            encoded, results = merge_windows(items, results, pool)
        else:
            merge = partial(merge_windows, items, results, pool)
            encoded, results = await self._service.executors.writing.run(merge)
        results = model.results_of_head(results)
        slowest = results[0]
        if len(results) > 1:
            slowest = max(results, key=lambda result: result.queue_ns + result.inference_ns)
        completed = Completed(
            raw,
            request,
            name,
            manifest,
            encoded,
            results,
            stats.tokenize_ns,
            time.monotonic_ns() - started_ns,
            model.is_on_gpu,
            model.classifier.vocabulary,
        )
        write = partial(self._dialect.write, completed)
        if _is_small(manifest, encoded):
            headers, pieces = write()
        else:
            headers, pieces = await self._service.executors.writing.run(write)
        finished_ns = time.monotonic_ns()
        if finished_ns > call.deadline * 1e9:
            raise DeadlineExceeded("The answer was ready after the request's time limit.")
        stats.tokens, stats.batch_size = completed.tokens, slowest.batch_size
        stats.queue_ns, stats.inference_ns = slowest.queue_ns, slowest.inference_ns
        self._count(model, completed, finished_ns - started_ns)
        timing = server_timing(stats.tokenize_ns, finished_ns - started_ns, slowest)
        return [*headers, (b"server-timing", timing.encode())], pieces

    async def _compute(
        self, call: _Call, model: LoadedModel, request: ClassifyRequest
    ) -> tuple[Items, list[Result]]:
        """Return the request's items and their results."""
        started_ns, batcher = time.monotonic_ns(), self._service.batcher
        max_tokens = None if request.window else model.artifact.manifest.max_tokens
        chars = [len(text.text) + len(text.pair or "") for text in request.input]
        # Admitted first: tokenizing costs more than a refusal should.
        with batcher.reserve(model.key, chars, max_tokens, call.deadline) as reservation:
            encoded = await encode(
                model.classifier,
                request,
                self._context.limits,
                self._service.executors,
                call.deadline,
            )
            call.stats.texts = len(request.input)
            call.stats.tokenize_ns = time.monotonic_ns() - started_ns
            timeout_s = max(0.0, call.deadline - time.monotonic())
            cache = self._service.answer_cache
            if cache is not None and not call.injected_delay:
                results = await cache.submit(model, encoded.items, timeout_s, reservation)
            else:
                results = await batcher.submit(
                    model.key,
                    encoded.items,
                    timeout_s,
                    call.injected_delay,
                    reservation=reservation,
                )
            return encoded, results

    def _count(self, model: LoadedModel, completed: Completed, total_ns: int) -> None:
        """Update the metrics, and show the answer to a shadow model if there is one."""
        metrics = self._service.metrics
        metrics.tokenize.labels(model.name).observe(completed.tokenize_ns / 1e9)
        metrics.request.labels(model.name).observe(total_ns / 1e9)
        truncated = sum([item.truncated for item in completed.encoded])
        if truncated:
            metrics.truncated.labels(model.name).inc(truncated)
        shadow = self._context.hooks.shadow
        if shadow is not None:
            results = model.main.results_of_head(completed.results) if model.heads else None
            shadow.consider(model.main, completed.request, results or completed.results)

    def _refusal(self, error: ServiceError, scope: Scope) -> tuple[int, Headers, list[bytes]]:
        scope["state"]["error_code"] = error.code
        status, headers, body = self._dialect.refuse(error)
        if isinstance(error, Unauthorized):
            headers.append((b"www-authenticate", b"Bearer"))
        if isinstance(error, BodyTooSlow | ShuttingDown):
            headers.append((b"connection", b"close"))
        return status, headers, [body]

    def _with_dialect_names(self, error: ServiceError) -> ServiceError:
        """Rename `input` in an error to the dialect's name, and return it.

        The texts of a limit are documents where the dialect calls them so.
        """
        name = self._dialect.input_field
        if name == "documents" and isinstance(error, LIMITS):
            error.message = TEXTS.sub(name, error.message)
        if name != "input" and error.param is not None and INPUT.match(error.param):
            error.message = error.message.replace("input", name, 1)
            error.param = name + error.param.removeprefix("input")
        return error


def _is_small(manifest: Manifest, texts: Sequence[Item]) -> bool:
    """Return whether the event loop may write an answer about these texts by itself."""
    labels = len(manifest.labels)
    if not manifest.labels_tokens:
        return len(texts) * labels <= MAX_LABELS_ON_LOOP
    tokens = sum([text.tokens for text in texts])
    return tokens <= MAX_TOKENS_ON_LOOP and tokens * labels <= MAX_TOKEN_SCORES_ON_LOOP


def server_timing(tokenize_ns: int, total_ns: int, slowest: Result) -> str:
    """Return a Server-Timing header, in milliseconds with six decimals.

    `queue`, `inference`, `cpu` and `batch` are those of the slowest text. `total` is from the start
    of tokenization until the answer is written.
    """
    return (
        f"tokenize;dur={tokenize_ns / 1e6:.6f}, queue;dur={slowest.queue_ns / 1e6:.6f}, "
        f'inference;dur={slowest.inference_ns / 1e6:.6f};desc="b={slowest.batch_size}'
        f' t={slowest.length}", '
        f"cpu;dur={slowest.inference_cpu_ns / 1e6:.6f}, "
        f'batch;desc="{slowest.batch_number}{" first" if slowest.is_first_of_shape else ""}", '
        f"total;dur={total_ns / 1e6:.6f}"
    )
