"""
Middleware of both ports: a proxy's path prefix, access log, request ids, keys, and HEAD.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Awaitable
from random import getrandbits
from typing import Any

from fastapi.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import KEY_REQUIRED, ServiceError, ShuttingDown, Unauthorized
from service.http.dialects import plain_refusal
from service.http.dialects.native import Native
from service.http.keys import Keys
from service.http.openapi import PLAIN_ERROR_PATHS, PUBLIC_PATHS
from service.http.router import ClassifyRouter
from service.telemetry.logs import ACCESS
from service.telemetry.tracing import RequestStats

log = logging.getLogger(ACCESS)

REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")
"""A client's X-Request-Id that is used as it is; any other is replaced."""


PROBES = re.compile(r"/(livez|readyz|health|v2/health/(live|ready)|metrics)")
"""What an orchestrator and Prometheus ask every few seconds."""

PREFIX = re.compile(rb"(/[A-Za-z0-9._~-]{1,100}){1,10}")
"""A path in X-Forwarded-Prefix; any other value is ignored."""


class HeadAsGetMiddleware:
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


class PathPrefixMiddleware:
    """Middleware that notes in the scope's state under which path a proxy offers the service.

    It is `root_path`, which is removed from requests that have it, or the header
    X-Forwarded-Prefix, which proxies send when they have removed it.
    """

    def __init__(self, app: ASGIApp, root_path: str) -> None:
        self._app = app
        self._root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            prefix = self._root_path or _forwarded_prefix(scope)
            if prefix:
                scope.setdefault("state", {})["prefix"] = prefix
            if self._root_path and scope["path"] == self._root_path:
                # The page's relative addresses need the slash.
                await RedirectResponse(f"{self._root_path}/", 308)(scope, receive, send)
                return
            if self._root_path and scope["path"].startswith(f"{self._root_path}/"):
                scope = {**scope, "path": scope["path"].removeprefix(self._root_path)}
        await self._app(scope, receive, send)


def _forwarded_prefix(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"x-forwarded-prefix" and PREFIX.fullmatch(value):
            prefix: str = value.decode()
            return prefix
    return ""


class AccessLogMiddleware:
    """Middleware that logs each request when it is answered, without its texts and its query.

    Probes are logged only when they fail.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started_ns = time.monotonic_ns()
        scope.setdefault("state", {})
        status = 0

        def send_noting_status(message: Message) -> Awaitable[None]:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            return send(message)

        try:
            await self._app(scope, receive, send_noting_status)
        finally:
            if status != 200 or not PROBES.fullmatch(scope["path"]):
                _log_request(scope, status, (time.monotonic_ns() - started_ns) / 1e6)


def _log_request(scope: Scope, status: int, milliseconds: float) -> None:
    state = scope["state"]
    facts: dict[str, Any] = {
        "request_id": state.get("request_id"),
        # A Unix socket has no address. On `::`, IPv4 has this prefix.
        "client": scope["client"][0].removeprefix("::ffff:") if scope.get("client") else None,
        "method": scope["method"],
        "path": scope["path"],
        "status": status,
        "ms": round(milliseconds, 3),
    }
    if "error_code" in state:
        facts["error_code"] = state["error_code"]
    stats: RequestStats | None = state.get("stats")
    if stats is not None:
        facts |= {"model": stats.model, "texts": stats.texts, "tokens": stats.tokens}
    log.info("request", extra=facts)


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
                app = error_answer(Unauthorized(KEY_REQUIRED), scope)
        await app(scope, receive, send_identified)

    def _is_allowed(self, scope: Scope) -> bool:
        if self._keys is None or PUBLIC_PATHS.match(scope["path"]):
            return True
        return self._keys.admit(dict(scope["headers"]))


def error_answer(error: ServiceError, scope: Scope) -> Response:
    """Return the answer for an error, in the format of the path, and note its code in the scope."""
    scope["state"]["error_code"] = error.code
    is_plain = PLAIN_ERROR_PATHS.match(scope["path"])
    status, headers, body = plain_refusal(error) if is_plain else Native().refuse(error)
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if isinstance(error, ShuttingDown):
        headers.append((b"connection", b"close"))
    return Response(body, status, {name.decode(): value.decode() for name, value in headers})
