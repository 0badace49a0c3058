"""
HTTP: which path is answered by what. Classifications are in classify.py, one for each dialect; here is everything around them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from random import getrandbits
from typing import Any

from fastapi import FastAPI, Request
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, PlainTextResponse, Response
from fastapi.staticfiles import StaticFiles
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.classify import Around, Classify
from service.dialects import huggingface, kserve, open_inference, plain_refusal, tei
from service.dialects.huggingface import HuggingFace
from service.dialects.infinity import Infinity
from service.dialects.kserve import KServe
from service.dialects.native import Native
from service.dialects.open_inference import OpenInference, metadata
from service.dialects.tei import Tei
from service.errors import WANTS_A_KEY, ServiceError, Unauthorized
from service.keys import Keys
from service.models import Models
from service.schemas import ClassifyAnswer, ClassifyRequest


def build_app(models: Models, around: Around = Around()) -> ASGIApp:    # noqa: B008  it is frozen
    """The ASGI application over `models`, which may still be loading; where there are keys, for whoever brings one."""
    app = FastAPI(title="DrBERT Serve", version=models.version, docs_url=None, redoc_url=None)
    metrics = models.metrics
    app.mount("/page", StaticFiles(directory=PAGE), name="page")
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
        raise AssertionError(ANSWERED_BEFORE)

    async def answered_before(request: Request) -> Response:
        raise AssertionError(ANSWERED_BEFORE)

    for path, (about_it, schema) in DIALECTS.items():
        app.post(path, summary=about_it, operation_id=re.sub(r"\W+", "_", path), responses={s: {"description": t} for s, t in REFUSALS.items()}, openapi_extra={
            "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
        })(answered_before)

    @app.get("/livez", response_class=PlainTextResponse)
    async def livez() -> str:
        """200 while the process answers."""
        return "ok\n"

    async def readyz() -> Response:
        """200 while the service takes requests, else 503 and why."""
        try:
            models.check_ready()
            models.check_not_saturated()
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
        """The loaded models, in OpenAI's form and in KServe's."""
        return {"object": "list", "data": [
            {"id": name, "object": "model", "created": models.started, "owned_by": "drbert-serve"} for name in models.loaded
        ], "models": list(models.loaded)}

    @app.get("/v1/models/{model}")
    async def kserve_ready(model: str) -> Response:
        """KServe V1: whether a model is ready."""
        return about(model, lambda name: {"name": name, "ready": True})

    @app.get("/v2")
    async def open_inference_server() -> dict[str, Any]:
        """Open Inference Protocol: what this server is."""
        return {"name": "drbert-serve", "version": models.version, "extensions": ["classification", "binary_tensor_data"]}

    @app.get("/v2/health/live", response_class=PlainTextResponse)
    async def open_inference_live() -> str:
        """Open Inference Protocol: 200 while the process answers."""
        return "ok\n"

    app.get("/v2/health/ready", response_class=PlainTextResponse)(readyz)

    @app.get("/v2/models/{model}")
    async def open_inference_model(model: str) -> Response:
        """Open Inference Protocol: a model's inputs and outputs."""
        def told(name: str) -> dict[str, Any]:
            manifest = models.loaded[name].artifact.manifest
            return metadata(name, manifest.labels, manifest.takes_pairs)

        return about(model, told)

    @app.get("/v2/models/{model}/ready")
    async def open_inference_ready(model: str) -> Response:
        """Open Inference Protocol: whether a model is ready."""
        return about(model, lambda name: {"name": name, "ready": True})

    def about(model: str, told: Callable[[str], dict[str, Any]]) -> Response:
        try:
            name = models.using(model).name
        except ServiceError as error:
            status, headers, body = plain_refusal(error)
            return Response(body, status, {key.decode(): value.decode() for key, value in headers})
        return JSONResponse(told(name))

    if models.settings.metrics == "service":
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
    async def root(request: Request) -> Response:
        if "text/html" not in request.headers.get("accept", ""):
            return JSONResponse({"service": "drbert-serve", "classify": "POST /classify", "docs": "/docs", "info": "/info"})
        return FileResponse(PAGE / "index.html", headers=PAGE_HEADERS)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        body = {"error": {"message": f"{request.method} {request.url.path}: {error.detail}; /docs lists what there is.",
                          "type": "invalid_request_error", "param": None, "code": str(error.detail).lower().replace(" ", "_")}}
        return JSONResponse(body, error.status_code, headers=error.headers)

    whole: ASGIApp = Identified(Classifications(models, around), app, models.instance_id, around.keys)
    origins = [origin.strip() for origin in models.settings.cors_origins.split(",") if origin.strip()]
    if origins:
        whole = CORSMiddleware(
            whole, allow_origins=origins, allow_methods=["GET", "POST"], allow_headers=["*"],
            expose_headers=["X-Request-Id", "X-Instance-Id", "Server-Timing", "Retry-After"],
        )
    return whole


PAGE = Path(__file__).parent / "page"
PAGE_HEADERS = {
    "content-security-policy": "default-src 'self'; img-src data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "x-content-type-options": "nosniff", "referrer-policy": "no-referrer", "cache-control": "no-cache",
}

# Health, what a scraper reads, and pages that hold nothing of anybody's.
OPEN = re.compile(r"/(livez|readyz|health|v2/health/(live|ready)|metrics|openapi\.json|docs(/.*)?|page/.*)?$")

REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")

ANSWERED_BEFORE = "Classifications answers before FastAPI is asked; this stands here for the description."

DIALECTS: dict[str, tuple[str, dict[str, Any]]] = {
    "/predict": ("Classify, as Text Embeddings Inference does", tei.SCHEMA),
    "/": ("Classify, as Hugging Face's Inference API does", huggingface.SCHEMA),
    "/models/{model}": ("The same, with a named model", huggingface.SCHEMA),
    "/v1/models/{model}:predict": ("Classify, as KServe's V1 protocol does", kserve.SCHEMA),
    "/v2/models/{model}/infer": ("Classify, as the Open Inference Protocol does", open_inference.SCHEMA),
}

REFUSALS: dict[int | str, str] = {
    400: "not JSON, or not UTF-8",
    401: "no key, or none that is known; only where the service has keys",
    404: "unknown model",
    408: "the body was not all there in time",
    413: "the body, the list or a text is over its limit",
    422: "a field has a wrong type or value; the message names it",
    429: "the queue is full; Retry-After says when to come back",
    503: "loading or draining",
    504: "the deadline passed",
}


class Classifications:
    """The paths on which a text can be classified, each in its dialect."""

    def __init__(self, models: Models, around: Around) -> None:
        own = Infinity() if models.settings.classify_dialect == "infinity" else Native()
        hugging_face = Classify(models, around, HuggingFace(), "inputs")
        self._fixed: dict[str, ASGIApp] = {
            "/classify": Classify(models, around, own), "/predict": Classify(models, around, Tei(), "inputs"), "/": hugging_face,
        }
        self._named: list[tuple[re.Pattern[str], ASGIApp]] = [
            (re.compile(r"/models/(?P<model>[^/]+)"), hugging_face),
            (re.compile(r"/v1/models/(?P<model>[^/]+):predict"), Classify(models, around, KServe(), "instances")),
            (re.compile(r"/v2/models/(?P<model>[^/]+)(/versions/[^/]+)?/infer"), Classify(models, around, OpenInference(), "text")),
        ]

    def at(self, scope: Scope) -> ASGIApp | None:
        """What answers a POST there; the model that the path names is noted in the scope's state."""
        if scope["method"] != "POST":
            return None
        path: str = scope["path"]
        if path in self._fixed:
            return self._fixed[path]
        for pattern, app in self._named:
            if found := pattern.fullmatch(path):
                scope["state"]["model"] = found["model"]
                return app
        return None


class Identified:
    """Middleware: every answer says which request it answers and which start of the server answered.

    Where there are keys, whoever brings none sees what OPEN matches; classifications look for themselves, to refuse in their dialect.
    """

    def __init__(self, classifications: Classifications, others: ASGIApp, instance: str, keys: Keys | None) -> None:
        self._keys = keys
        self._classifications = classifications
        self._others = others
        self._instance = (b"x-instance-id", instance.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._others(scope, receive, send)
            return
        asked = dict(scope["headers"]).get(b"x-request-id")
        request_id = asked if asked is not None and REQUEST_ID.fullmatch(asked) else b"%032x" % getrandbits(128)
        scope.setdefault("state", {})["request_id"] = request_id.decode()

        async def send_identified(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-request-id", request_id), self._instance]
            await send(message)

        app = self._classifications.at(scope)
        if app is None:
            allowed = self._keys is None or OPEN.match(scope["path"]) or self._keys.admit(dict(scope["headers"]))
            app = self._others if allowed else error_answer(Unauthorized(WANTS_A_KEY))
        await app(scope, receive, send_identified)


def error_answer(error: ServiceError) -> Response:
    status, headers, body = Native().refuse(error)
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    return Response(body, status, {name.decode(): value.decode() for name, value in headers})
