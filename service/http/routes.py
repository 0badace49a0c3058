"""
The public port's application: which path is answered by what.

    POST /classify and its dialects    ClassifyRouter, in front of FastAPI (service/http/router.py)
    /livez /readyz /info /metrics      here
    model lists and readiness          service/http/model_endpoints.py
    / /docs /page                      service/http/pages.py

FastAPI answers everything but classifications: a call through a FastAPI handler takes 874 µs, and
10 µs through the router.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Scope

from service.errors import ServiceError
from service.http.context import HttpContext
from service.http.info import service_info
from service.http.middleware import (
    AccessLogMiddleware,
    HeadAsGetMiddleware,
    PathPrefixMiddleware,
    RequestIdMiddleware,
    error_answer,
)
from service.http.model_endpoints import add_model_endpoints, check_ready
from service.http.openapi import DESCRIPTION, ERROR_DESCRIPTIONS, PLAIN_ERROR_PATHS, describe
from service.http.pages import add_pages
from service.http.router import ClassifyRouter


def build_app(context: HttpContext) -> ASGIApp:
    """Return the ASGI application of the public port; models may still be loading.

    POST /classify and the like are answered by a ClassifyRouter in front of FastAPI.
    """
    service, settings = context.service, context.service.settings
    # No redirects: behind a proxy they would lose its scheme, host and prefix, and a POST its body.
    app = FastAPI(
        title="DrBERT Serve",
        description=DESCRIPTION,
        version=service.version,
        openapi_url=None,
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
        code = str(error.detail).lower().replace(" ", "_")
        request.state.error_code = code
        body: dict[str, object] = {
            "error": {
                "message": message,
                "type": "invalid_request_error",
                "param": None,
                "code": code,
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
        ClassifyRouter(context), HeadAsGetMiddleware(app), service.instance_id, context.hooks.keys
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
    application = PathPrefixMiddleware(application, settings.root_path)
    return AccessLogMiddleware(application) if settings.access_log else application


def add_operation(app: FastAPI, context: HttpContext) -> None:
    """Add health checks, /info and /metrics."""
    service = context.service

    @app.get("/livez", response_class=PlainTextResponse)
    async def livez() -> str:
        """Answer 200 while the process runs."""
        return "ok\n"

    async def readyz(request: Request) -> Response:
        """Answer 200 while the service accepts requests, else 503 with the reason."""
        try:
            check_ready(service)
        except ServiceError as error:
            return error_answer(error, request.scope)
        return PlainTextResponse("ok\n")

    for path in (
        "/readyz",
        *(("/health",) if service.settings.classify_dialect != "infinity" else ()),
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


def allowed_methods(app: FastAPI, scope: Scope) -> str:
    """Return the methods of all routes of a path, for the header Allow.

    Starlette's own error names those of one route only.
    """
    methods: set[str] = set()
    for route in app.routes:
        if isinstance(route, Route) and route.matches(scope)[0] is not Match.NONE:
            methods |= route.methods or set()
    return ", ".join(sorted(methods | ({"HEAD"} if "GET" in methods else set())))
