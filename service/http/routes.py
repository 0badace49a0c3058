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
from service.http.context import HttpContext
from service.http.dialects import plain_refusal
from service.http.dialects.native import Native
from service.http.info import service_info
from service.http.keys import Keys
from service.http.model_endpoints import add_model_endpoints, check_ready
from service.http.openapi import ERROR_DESCRIPTIONS, PLAIN_ERROR_PATHS, PUBLIC_PATHS, describe
from service.http.pages import add_pages
from service.http.router import ClassifyRouter

REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")


def build_app(context: HttpContext) -> ASGIApp:
    """Return the ASGI application of the public port; models may still be loading.

    POST /classify and the like are answered by a ClassifyRouter in front of FastAPI.
    """
    service, settings = context.service, context.service.settings
    # No redirects: behind a proxy they would lose its scheme, host and prefix, and a POST its body.
    app = FastAPI(
        title="DrBERT Serve",
        version=service.version,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    describe(
        app,
        settings.classify_dialect,
        settings.root_dialect,
        keyed=context.hooks.keys is not None,
    )
    add_operation(app, context)
    add_model_endpoints(app, service)
    add_pages(app)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}; /docs lists the paths."
        body: dict[str, object] = {
            "error": {
                "message": message,
                "type": "invalid_request_error",
                "param": None,
                "code": str(error.detail).lower().replace(" ", "_"),
            }
        }
        if PLAIN_ERROR_PATHS.match(request.url.path):
            body = {"error": message}
        headers = (
            {"allow": allowed_methods(app, request.scope)}
            if error.status_code == 405
            else error.headers
        )
        return JSONResponse(body, error.status_code, headers=headers)

    application: ASGIApp = RequestIdMiddleware(
        ClassifyRouter(context), HeadAsGet(app), service.instance_id, context.hooks.keys
    )
    origins = [origin.strip() for origin in settings.cors_origins.split(",") if origin.strip()]
    if origins:
        application = CORSMiddleware(
            application,
            allow_origins=origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "X-Instance-Id", "Server-Timing", "Retry-After"],
        )
    return application


def add_operation(app: FastAPI, context: HttpContext) -> None:
    """Add health checks, /info and /metrics."""
    service = context.service

    @app.get("/livez", response_class=PlainTextResponse)
    async def livez() -> str:
        """Answer 200 while the process runs."""
        return "ok\n"

    async def readyz() -> Response:
        """Answer 200 while the service accepts requests, else 503 with the reason."""
        try:
            check_ready(service)
        except ServiceError as error:
            return error_answer(error)
        return PlainTextResponse("ok\n")

    for path in (
        "/readyz",
        *(("/health",) if service.settings.classify_dialect == "native" else ()),
    ):
        app.get(
            path,
            response_class=PlainTextResponse,
            responses={503: {"description": ERROR_DESCRIPTIONS[503]}},
        )(readyz)

    @app.get("/info")
    async def info() -> dict[str, Any]:
        """Return what is loaded, how, and under which limits."""
        return service_info(service)

    if service.settings.metrics == "service":

        @app.get("/metrics", response_class=PlainTextResponse)
        async def metrics_page(request: Request) -> Response:
            """Return metrics in Prometheus' text format, at most a second old."""
            return await context.metrics_page.respond(request)


class HeadAsGet:
    """Middleware that answers HEAD as GET without a body (RFC 9110, 9.3.2).

    Load balancers and monitors check health by HEAD.
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
    """Return the methods of all routes of a path, for the header Allow.

    Starlette's own error names those of one route only.
    """
    methods: set[str] = set()
    for route in app.routes:
        if isinstance(route, Route) and route.matches(scope)[0] is not Match.NONE:
            methods |= route.methods or set()
    return ", ".join(sorted(methods | ({"HEAD"} if "GET" in methods else set())))


class RequestIdMiddleware:
    """Middleware that adds X-Request-Id and X-Instance-Id to every answer.

    It routes classifications to their router. Other paths than PUBLIC_PATHS need a key, if there
    are keys; a ClassifyEndpoint checks it itself, to refuse in its dialect.
    """

    def __init__(
        self, router: ClassifyRouter, fallback: ASGIApp, instance: str, keys: Keys | None
    ) -> None:
        self._keys = keys
        self._router = router
        self._fallback = fallback
        self._instance = (b"x-instance-id", instance.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._fallback(scope, receive, send)
            return
        request_id = dict(scope["headers"]).get(b"x-request-id")
        if request_id is None or not REQUEST_ID.fullmatch(request_id):
            request_id = b"%032x" % getrandbits(128)
        scope.setdefault("state", {})["request_id"] = request_id.decode()

        def send_identified(message: Message) -> Awaitable[None]:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message["headers"],
                    (b"x-request-id", request_id),
                    self._instance,
                ]
            return send(message)

        app = self._router.match(scope)
        if app is None:
            app = self._fallback
            if not self._is_allowed(scope):
                app = error_answer(Unauthorized(WANTS_A_KEY), scope["path"])
        await app(scope, receive, send_identified)

    def _is_allowed(self, scope: Scope) -> bool:
        if self._keys is None or PUBLIC_PATHS.match(scope["path"]):
            return True
        return self._keys.admit(dict(scope["headers"]))


def error_answer(error: ServiceError, path: str = "") -> Response:
    """Return the answer for an error, in the format of the path."""
    status, headers, body = (
        plain_refusal(error) if PLAIN_ERROR_PATHS.match(path) else Native().refuse(error)
    )
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if isinstance(error, ShuttingDown):
        headers.append((b"connection", b"close"))
    return Response(body, status, {name.decode(): value.decode() for name, value in headers})
