"""
HTTP: which path is answered by what. POST /classify is in classify.py; here is everything around it.
"""

from __future__ import annotations

import re
from importlib import resources
from random import getrandbits
from typing import Any

from fastapi import FastAPI, Request
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from fastapi.staticfiles import StaticFiles
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.classify import Classify, refusal
from service.errors import ServiceError
from service.models import Models
from service.schemas import ClassifyAnswer, ClassifyRequest


def build_app(models: Models) -> ASGIApp:
    """The ASGI application over `models`, which may still be loading."""
    app = FastAPI(title="DrBERT Serve", version=models.version, docs_url=None, redoc_url=None)
    metrics = models.metrics
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
        raise AssertionError("Classify answers before FastAPI is asked; this stands here for the description.")

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

    return Identified(Classify(models), app, models.instance_id)


REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")

REFUSALS: dict[int | str, str] = {
    400: "not JSON, or not UTF-8",
    404: "unknown model",
    413: "the body, the list or a text is over its limit",
    422: "a field has a wrong type or value; the message names it",
    429: "the queue is full; Retry-After says when to come back",
    503: "loading or draining",
    504: "the deadline passed",
}


class Identified:
    """Middleware: every answer says which request it answers and which start of the server answered."""

    def __init__(self, classify: ASGIApp, others: ASGIApp, instance: str) -> None:
        self._classify = classify
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

        app = self._classify if scope["path"] == "/classify" and scope["method"] == "POST" else self._others
        await app(scope, receive, send_identified)


def error_answer(error: ServiceError) -> Response:
    status, headers, body = refusal(error)
    return Response(body, status, {name.decode(): value.decode() for name, value in headers})
