"""
HTTP: which path is answered by what. Texts are classified in classify.py; here is everything around
that.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable
from random import getrandbits
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import WANTS_A_KEY, ServiceError, ShuttingDown, Unauthorized
from service.http.dialects import plain_refusal
from service.http.dialects.native import Native
from service.http.endpoint import Around
from service.http.keys import Keys
from service.http.model_endpoints import add_protocols, check_ready
from service.http.openapi import OPEN, PLAIN, REFUSALS, describe
from service.http.pages import add_pages
from service.http.router import Classifications
from service.registry import Models

REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")


def build_app(models: Models, around: Around = Around()) -> ASGIApp:  # noqa: B008  it is frozen
    """The ASGI application over `models`, which may still be loading; where there are keys, for
    whoever brings one.
    """
    # Without redirects: behind a proxy they would lose its scheme, host and prefix, and a POST its
    # body.
    app = FastAPI(
        title="DrBERT Serve",
        version=models.version,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    describe(
        app,
        models.settings.classify_dialect,
        models.settings.root_dialect,
        keyed=around.keys is not None,
    )
    add_operation(app, models)
    add_protocols(app, models)
    add_pages(app)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}; /docs lists what there is."
        body: dict[str, object] = {
            "error": {
                "message": message,
                "type": "invalid_request_error",
                "param": None,
                "code": str(error.detail).lower().replace(" ", "_"),
            }
        }
        if PLAIN.match(request.url.path):
            body = {"error": message}
        headers = (
            {"allow": allowed_methods(app, request.scope)}
            if error.status_code == 405
            else error.headers
        )
        return JSONResponse(body, error.status_code, headers=headers)

    whole: ASGIApp = Identified(
        Classifications(models, around), HeadAsGet(app), models.instance_id, around.keys
    )
    origins = [
        origin.strip() for origin in models.settings.cors_origins.split(",") if origin.strip()
    ]
    if origins:
        whole = CORSMiddleware(
            whole,
            allow_origins=origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "X-Instance-Id", "Server-Timing", "Retry-After"],
        )
    return whole


def add_operation(app: FastAPI, models: Models) -> None:
    """Health, what is loaded, and metrics."""

    @app.get("/livez", response_class=PlainTextResponse)
    async def livez() -> str:
        """200 while the process answers."""
        return "ok\n"

    async def readyz() -> Response:
        """200 while the service takes requests, else 503 and why."""
        try:
            check_ready(models)
        except ServiceError as error:
            return error_answer(error)
        return PlainTextResponse("ok\n")

    for path in (
        "/readyz",
        *(("/health",) if models.settings.classify_dialect == "native" else ()),
    ):
        app.get(
            path, response_class=PlainTextResponse, responses={503: {"description": REFUSALS[503]}}
        )(readyz)

    @app.get("/info")
    async def info() -> dict[str, Any]:
        """What is loaded, how, and under which limits."""
        return models.info()

    if models.settings.metrics == "service":

        @app.get("/metrics", response_class=PlainTextResponse)
        async def metrics_page(request: Request) -> Response:
            """Prometheus' text format, at most a second old."""
            return await models.metrics_page.respond(request)


class HeadAsGet:
    """Middleware: HEAD is answered as GET without its body (RFC 9110, 9.3.2), as load balancers and
    monitors ask for health.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return

        async def send_without_body(message: Message) -> None:
            await send(
                {**message, "body": b""} if message["type"] == "http.response.body" else message
            )

        await self._app({**scope, "method": "GET"}, receive, send_without_body)


def allowed_methods(app: FastAPI, scope: Scope) -> str:
    """The methods that a path answers, for the header Allow: of all routes with that path, where
    Starlette names one's.
    """
    methods: set[str] = set()
    for route in app.routes:
        if isinstance(route, Route) and route.matches(scope)[0] is not Match.NONE:
            methods |= route.methods or set()
    return ", ".join(sorted(methods | ({"HEAD"} if "GET" in methods else set())))


class Identified:
    """Middleware: every answer says which request it answers and which start of the server
    answered.

    Where there are keys, whoever brings none sees what OPEN matches; classifications look for
    themselves, to refuse in their dialect.
    """

    def __init__(
        self, classifications: Classifications, others: ASGIApp, instance: str, keys: Keys | None
    ) -> None:
        self._keys = keys
        self._classifications = classifications
        self._others = others
        self._instance = (b"x-instance-id", instance.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._others(scope, receive, send)
            return
        asked = dict(scope["headers"]).get(b"x-request-id")
        request_id = (
            asked
            if asked is not None and REQUEST_ID.fullmatch(asked)
            else b"%032x" % getrandbits(128)
        )
        scope.setdefault("state", {})["request_id"] = request_id.decode()

        def send_identified(message: Message) -> Awaitable[None]:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message["headers"],
                    (b"x-request-id", request_id),
                    self._instance,
                ]
            return send(message)

        app = self._classifications.at(scope)
        if app is None:
            allowed = (
                self._keys is None
                or OPEN.match(scope["path"])
                or self._keys.admit(dict(scope["headers"]))
            )
            app = (
                self._others if allowed else error_answer(Unauthorized(WANTS_A_KEY), scope["path"])
            )
        await app(scope, receive, send_identified)


def error_answer(error: ServiceError, path: str = "") -> Response:
    status, headers, body = plain_refusal(error) if PLAIN.match(path) else Native().refuse(error)
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if isinstance(error, ShuttingDown):
        headers.append((b"connection", b"close"))
    return Response(body, status, {name.decode(): value.decode() for name, value in headers})
