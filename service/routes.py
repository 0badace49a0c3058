"""
HTTP: what each path answers, and the one place where an error becomes a status.

A request's five hops: schemas (shape) → here (deadline) → classifier.encode (tokens)
→ batcher.submit (a place or a refusal) → classifier.start (the batcher's thread).
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Coroutine, Sequence
from importlib import resources
from typing import Any

from fastapi import FastAPI, Request
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from fastapi.staticfiles import StaticFiles
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service import answers
from service.batcher import Row
from service.classifier import Classifier, Encoded, Truncate
from service.errors import DeadlineExceeded, InvalidInput, NotReady, ServiceError, ShuttingDown, TooLarge
from service.models import Models
from service.schemas import ClassifyAnswer, ClassifyRequest, Limits, Text, answer_json, read_request

log = logging.getLogger(__name__)

# Shorter requests are tokenised on the event loop: a hop to a thread costs more than they do.
CHARS_ON_THE_LOOP = 4_000


def build_app(models: Models) -> ASGIApp:
    """The ASGI application over `models`, which may still be loading."""
    app = FastAPI(title="DrBERT Serve", version=models.version, docs_url=None, redoc_url=None)
    settings, metrics = models.settings, models.metrics
    limits = Limits(texts=settings.max_texts, text_chars=settings.max_text_chars)
    app.mount("/docs/files", StaticFiles(directory=str(resources.files("fastapi_swagger") / "resources")), name="docs")

    @app.post(
        "/classify",
        response_model=ClassifyAnswer,
        openapi_extra={"requestBody": {"required": True, "content": {
            "application/json": {"schema": ClassifyRequest.model_json_schema()}
        }}},
        responses={status: {"description": text} for status, text in REFUSALS.items()},
    )
    async def classify(request: Request) -> Response:
        """Classifies a text, a pair, or a list of those."""
        began = time.monotonic()
        model, models.answering = "", models.answering + 1
        metrics.inflight.inc()
        try:
            busy_wait = read_busy_wait(request, settings.busy_wait != "off")
            asked = read_request(await read_body(request, settings.max_body_bytes), limits)
            started = time.monotonic_ns()
            model, classifier = models.get(asked.model)
            encoded = await encode(classifier, asked.input, asked.truncate)
            tokenized = time.monotonic_ns()
            left_s = settings.request_timeout_s - (time.monotonic() - began)
            rows = await unless_the_client_leaves(request, models.batcher.submit(model, encoded, max(0.0, left_s), busy_wait))
            answer = answer_json(answer_of(asked, model, classifier, encoded, rows, request.state.request_id))
            finished = time.monotonic_ns()
            timing = server_timing(tokenized - started, finished - started, rows)
            response = Response(answer, media_type="application/json", headers={"Server-Timing": timing})
            metrics.tokenize.labels(model).observe((tokenized - started) / 1e9)
            metrics.request.labels(model).observe((finished - started) / 1e9)
            metrics.truncated.labels(model).inc(sum(item.truncated for item in encoded))
        except ServiceError as error:
            if error.status < 500 or isinstance(error, UNAVAILABLE):
                metrics.rejected.labels(error.code).inc()
            response = error_answer(error)
        except ClientLeft:
            metrics.rejected.labels("client_left").inc()
            response = Response(status_code=499)
        except Exception:  # The one place where a bug becomes an answer.
            log.exception("bug", extra={"request_id": request.state.request_id, "model": model})
            response = error_answer(ServiceError("This is a bug in the service; its log has the traceback under the request's id."))
        finally:
            models.answering -= 1
            metrics.inflight.dec()
        metrics.requests.labels(model, str(response.status_code)).inc()
        return response

    @app.get("/livez", response_class=PlainTextResponse)
    async def livez() -> str:
        """200 while the process answers."""
        return "ok\n"

    async def readyz() -> Response:
        """200 while the service takes requests, else 503 and why."""
        try:
            models.check_ready()
        except ServiceError as error:
            return error_answer(error)
        return PlainTextResponse("ok\n")

    for path in ("/readyz", "/health"):
        app.get(path, response_class=PlainTextResponse)(readyz)

    @app.get("/info")
    async def info() -> dict[str, Any]:
        """What is loaded, how, and under which limits."""
        return models.info()

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        """The loaded models in OpenAI's form."""
        return {"object": "list", "data": [
            {"id": name, "object": "model", "created": models.started, "owned_by": "drbert-serve"} for name in models.loaded
        ]}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics_page() -> Response:
        """Prometheus' text format."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return get_swagger_ui_html(
            openapi_url="/openapi.json", title="DrBERT Serve", swagger_js_url="/docs/files/swagger-ui-bundle.js",
            swagger_css_url="/docs/files/swagger-ui.css", swagger_favicon_url="/docs/files/favicon-32x32.png",
        )

    @app.get("/", include_in_schema=False)
    async def root() -> dict[str, str]:
        return {"service": "drbert-serve", "classify": "POST /classify", "docs": "/docs", "info": "/info"}

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        body = {"error": {"message": f"{request.method} {request.url.path}: {error.detail}; /docs lists what there is.",
                          "type": "invalid_request_error", "param": None, "code": str(error.detail).lower().replace(" ", "_")}}
        return JSONResponse(body, error.status_code, headers=error.headers)

    return Identified(app, models.instance_id)


# Statuses of 500 and above that refuse a request rather than confess to a fault.
UNAVAILABLE = (NotReady, ShuttingDown, DeadlineExceeded)

REFUSALS: dict[int | str, str] = {
    400: "not JSON, or not UTF-8",
    404: "unknown model",
    413: "the body, the list or a text is over its limit",
    422: "a field has a wrong type or value; the message names it",
    429: "the queue is full; Retry-After says when to come back",
    503: "loading or draining",
    504: "the deadline passed",
}


class ClientLeft(Exception):
    """The client closed the connection before its request was whole."""


class Identified:
    """Middleware: every answer says which request it answers and which start of the server answered."""

    def __init__(self, app: ASGIApp, instance: str) -> None:
        self.app = app
        self.instance = instance.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        asked = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
        request_id = asked if re.fullmatch(rb"[\x21-\x7e]{1,128}", asked) else uuid.uuid4().hex.encode()
        scope.setdefault("state", {})["request_id"] = request_id.decode()

        async def send_identified(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-request-id", request_id), (b"x-instance-id", self.instance)]
            await send(message)

        await self.app(scope, receive, send_identified)


def read_busy_wait(request: Request, allowed: bool) -> float:
    """The share in X-Busy-Wait by which a proof's control is to take longer, 0 to 1; InvalidInput where that is not allowed."""
    given = request.headers.get("x-busy-wait")
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


async def read_body(request: Request, limit: int) -> bytes:
    """The body, or TooLarge as soon as it is known to pass `limit` bytes."""
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit:
        await drain(request, int(declared), limit)
        raise TooLarge(f"The body has {declared} bytes, the limit is {limit}.", param="body")
    chunks, size = [], 0
    async for chunk in body_chunks(request):
        size += len(chunk)
        if size > limit:
            raise TooLarge(f"The body has more than {limit} bytes, the limit.", param="body")
        chunks.append(chunk)
    return b"".join(chunks)


async def drain(request: Request, declared: int, limit: int) -> None:
    """Reads and forgets a body that is too large, within reason: most clients read no answer before they have sent all."""
    if declared <= 16 * limit:
        async for _ in body_chunks(request):
            pass


async def body_chunks(request: Request) -> Any:
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientLeft
        yield message.get("body", b"")
        if not message.get("more_body"):
            return


async def unless_the_client_leaves(request: Request, work: Coroutine[Any, Any, list[Row]]) -> list[Row]:
    """What `work` returns or raises; ClientLeft, and the work cancelled, if the connection closes first."""
    working = asyncio.ensure_future(work)
    # After the body, the only message there can be is that the client has gone.
    leaving = asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientLeft
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()


async def encode(classifier: Classifier, texts: Sequence[Text], truncate: Truncate) -> list[Encoded]:
    """Tokens of every text; one that cannot be used fails the list and is named."""
    def encode_all() -> list[Encoded]:
        encoded = []
        for text in texts:
            if text.pair is not None and not classifier.manifest.takes_pairs:
                where = f"{text.where}.text_pair"
                raise InvalidInput(f"{where}: this model takes single texts only.", param=where)
            try:
                encoded.append(classifier.encode(text.text, text.pair, truncate))
            except InvalidInput as error:
                raise InvalidInput(f"{text.where}: {error.message}", param=text.where) from None
        return encoded

    if sum(len(text.text) + len(text.pair or "") for text in texts) <= CHARS_ON_THE_LOOP:
        return encode_all()
    return await asyncio.to_thread(encode_all)


def answer_of(
    asked: ClassifyRequest, name: str, classifier: Classifier, encoded: Sequence[Encoded], rows: Sequence[Row], request_id: str
) -> dict[str, Any]:
    activation = "none" if asked.use_activation is False else asked.activation
    tokens = sum(item.tokens for item in encoded)
    return {
        "id": asked.request_id or f"classify-{request_id}",
        "object": "list",
        "created": int(time.time()),
        "model": name,
        "data": [
            answers.classification(i, row.value, item, classifier.manifest, activation, asked.top_k, asked.threshold)
            for i, (item, row) in enumerate(zip(encoded, rows, strict=True))
        ],
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0},
    }


def server_timing(tokenize_ns: int, total_ns: int, rows: Sequence[Row]) -> str:
    """Milliseconds with every nanosecond digit; of a list, its slowest item."""
    slowest = max(rows, key=lambda row: row.queue_ns + row.inference_ns)
    return (
        f"tokenize;dur={tokenize_ns / 1e6:.6f}, queue;dur={slowest.queue_ns / 1e6:.6f}, "
        f'inference;dur={slowest.inference_ns / 1e6:.6f};desc="b={slowest.batch_size} t={slowest.length}", '
        f"total;dur={total_ns / 1e6:.6f}"
    )


def error_answer(error: ServiceError) -> Response:
    headers = {} if error.retry_after_s is None else {"Retry-After": str(error.retry_after_s)}
    return JSONResponse(error.body(), error.status, headers)
