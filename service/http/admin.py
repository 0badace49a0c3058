"""
The private port: loads, reloads and unloads models while the public port answers requests.

    POST   /models/NAME   {"artifact": "/models/reviews-4"}   loads a model, or replaces NAME
    POST   /models/NAME   {}                                  loads the source of NAME again
    POST   /models/NAME   {"default": true}                   makes NAME the default model
    DELETE /models/NAME                                       unloads it

A change is one assignment: a request is answered by the old model or by the new one. The old model
is freed when its last request is answered. An artifact that cannot be loaded changes nothing.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import time
from typing import Annotated, Any

from fastapi import FastAPI, Request
from fastapi import Path as PathParameter
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from command import BadInput, BadUsage, CommandError
from service.checkpoints.source import ModelSource
from service.errors import (
    BodyTooSlow,
    Forbidden,
    InvalidInput,
    InvalidJson,
    ServiceError,
    Unauthorized,
)
from service.http.context import HttpContext
from service.http.info import service_info
from service.http.keys import Keys
from service.http.load_jobs import LoadJobs, LoadTicket
from service.http.middleware import AccessLogMiddleware, HeadAsGetMiddleware
from service.http.transport.request import ByteBudget, ClientDisconnected, read_body
from service.registry import LoadedModel, ModelRegistry
from service.state import ServiceState

log = logging.getLogger(__name__)

BODY_BYTES = 65_536
NAME_CHARS = 200
# Paths may be thousands of characters long, and libraries quote their arguments.
MESSAGE_CHARS = 1_000

ModelName = Annotated[str, PathParameter(max_length=NAME_CHARS)]


class LoadRequest(BaseModel):
    """The body of POST /models/NAME."""

    model_config = ConfigDict(extra="forbid")

    artifact: str | None = Field(
        default=None,
        description=(
            "An artifact's folder, a checkpoint's folder or a hub id (owner/model@revision); by"
            " default what the model was loaded from. A checkpoint is exported first."
        ),
    )
    digest: str | None = Field(
        default=None, max_length=64, description="What its digest must be; another one is refused."
    )
    default: bool = Field(
        default=False,
        strict=True,
        description=(
            "Whether it answers requests that name no model. Alone, it loads nothing again."
        ),
    )


class Change(BaseModel):
    """The answer to a change: which model answers under the name now."""

    model: str
    digest: str | None = Field(description="Of what answers now; null after unloading.")
    replaced: str | None = Field(description="The digest of what answered before.")
    variant: str | None
    default: bool = Field(description="Whether it answers requests that name no model.")
    seconds: float


def build_admin(context: HttpContext, keys: Keys | None) -> ASGIApp:
    """Return the ASGI application of the private port."""
    service = context.service
    registry = service.registry
    app = FastAPI(
        title="DrBERT Serve: administration",
        version=service.version,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    jobs = LoadJobs(service.settings.admin_load_timeout_s)
    releases: set[asyncio.Task[None]] = set()

    def release(old: LoadedModel) -> None:
        task = asyncio.create_task(registry.release_when_idle(old))
        releases.add(task)
        task.add_done_callback(releases.discard)

    @app.post("/models/{model}")
    async def load_model(model: ModelName, request: LoadRequest) -> Change:
        """Load a model, or replace it; the answer is sent once the new model answers requests."""
        service.lifecycle.check_ready()
        started = time.monotonic()
        if request.default and request.artifact is None and request.digest is None:
            registry.set_default(model)
            current = registry.loaded[model]
            return change(registry, model, current, current, started)
        if request.artifact is None and model not in registry.loaded:
            raise InvalidInput(
                "artifact is missing: there is no model of that name to load again.",
                param="artifact",
            )
        new, old = await jobs.run(model, lambda ticket: load(service, model, request, ticket))
        if old is not None:
            release(old)
        if request.default:
            registry.set_default(model)
        return change(registry, model, new, old, started)

    @app.delete("/models/{model}")
    async def unload_model(model: ModelName) -> Change:
        """Unload a model; the requests that it has are finished."""
        started = time.monotonic()
        jobs.check_free(model)
        old = registry.remove(model)
        release(old)
        return change(registry, model, None, old, started)

    add_operation(app, context)
    add_error_handlers(app)
    guarded = AdminGuardMiddleware(
        HeadAsGetMiddleware(app), keys, service.settings.request_timeout_s
    )
    return AccessLogMiddleware(guarded) if service.settings.access_log else guarded


def change(
    registry: ModelRegistry,
    model: str,
    new: LoadedModel | None,
    old: LoadedModel | None,
    started: float,
) -> Change:
    """Return the answer to a change that began at `started`, in seconds of time.monotonic()."""
    return Change(
        model=model,
        digest=new.artifact.digest if new else None,
        replaced=old.artifact.digest if old else None,
        variant=new.choice.variant if new else None,
        default=new is not None and registry.default == model,
        seconds=time.monotonic() - started,
    )


def add_operation(app: FastAPI, context: HttpContext) -> None:
    """Add /info, /livez and /metrics, as on the public port."""

    @app.get("/info")
    async def info() -> dict[str, Any]:
        return service_info(context.service)

    @app.get("/livez", response_class=PlainTextResponse)
    async def livez() -> str:
        return "ok\n"

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics(request: Request) -> Response:
        return await context.metrics_page.respond(request)


def add_error_handlers(app: FastAPI) -> None:
    """Answer every error in the service's own format, without repeating the request."""

    @app.exception_handler(ServiceError)
    async def service_error(request: Request, error: ServiceError) -> Response:
        return error_response(error, request)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return error_response(invalid_request(error), request)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        if error.status_code == 400:  # a body that the framework could not parse
            return error_response(InvalidJson("The body is not JSON.", param="body"), request)
        code = str(error.detail).lower().replace(" ", "_")
        request.state.error_code = code
        body = {
            "error": {
                "message": f"{error.detail}.",
                "type": "invalid_request_error",
                "param": None,
                "code": code,
            }
        }
        return JSONResponse(body, error.status_code, headers=error.headers)

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> Response:
        return error_response(
            ServiceError("This is a bug in the service; its log has the traceback."), request
        )


def error_response(error: ServiceError, request: Request) -> Response:
    """Return the answer for an error, and note its code for the access log."""
    request.state.error_code = error.code
    headers = {} if error.retry_after_s is None else {"retry-after": str(error.retry_after_s)}
    if isinstance(error, Unauthorized):
        headers["www-authenticate"] = "Bearer"
    if isinstance(error, BodyTooSlow):
        headers["connection"] = "close"
    return JSONResponse(error.body(), int(error.status), headers)


def invalid_request(error: RequestValidationError) -> ServiceError:
    """Return the error for a body that FastAPI refused.

    Names of unknown fields are the client's data, and are not repeated.
    """
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return InvalidJson("The body is not JSON.", param="body")
    if first["type"] == "extra_forbidden":
        return InvalidInput(
            f"The body has an unknown field; known are {', '.join(LoadRequest.model_fields)}.",
            param="body",
        )
    field = str(first["loc"][1]) if len(first["loc"]) > 1 else "body"
    if field == "body":
        return InvalidInput(
            "The body must be a JSON object, sent with Content-Type: application/json.",
            param="body",
        )
    return InvalidInput(f"{field}: {first['msg']}.", param=field)


def load(
    service: ServiceState, name: str, request: LoadRequest, ticket: LoadTicket
) -> tuple[LoadedModel, LoadedModel | None]:
    """Load an artifact or a checkpoint, which is exported first.

    Return its model, which answers requests, and the one that it replaced. Raises InvalidInput if
    it cannot be loaded, with the reason.
    """
    loaded = service.registry.loaded
    source = str(loaded[name].artifact.directory) if request.artifact is None else request.artifact
    try:
        if request.artifact is None:
            artifact = service.checkpoints.fetch_again(loaded[name].artifact)
        else:
            check_revision(request.artifact)
            artifact = service.checkpoints.fetch(request.artifact)
        if request.digest is not None and artifact.digest != request.digest:
            raise BadInput(
                f"The digest of {source} is {artifact.digest}; the request names {request.digest}."
            )
        return service.registry.add(name, artifact, ticket.claim, is_serving=True)
    # An artifact may make a library raise anything, panics of Rust included. The thread is its own.
    except BaseException as error:
        expected = isinstance(error, CommandError | ServiceError)
        reason = str(error)
        if not expected:
            reason = (
                f"{source} cannot be loaded ({type(error).__name__}: {error}); export it again."
            )
        if len(reason) > MESSAGE_CHARS:
            reason = f"{reason[:MESSAGE_CHARS]}…"
        log.warning(
            "a model could not be loaded",
            exc_info=error.__cause__ if expected else error,
            extra={
                "model": name,
                "artifact": source[:MESSAGE_CHARS],
                "why": reason,
            },
        )
        raise InvalidInput(reason, param="artifact") from None


def check_revision(text: str) -> None:
    """Raise BadUsage for a hub id without a revision: it may be a mistyped path."""
    source = ModelSource.parse(text)
    if source.is_hub_id and source.revision is None:
        raise BadUsage(
            f"{text} does not exist; for a model of Hugging Face's hub, name its revision, as in"
            f" {text}@main."
        )


class AdminGuardMiddleware:
    """Middleware that admits requests with a key, or without keys only local ones.

    A web page can send requests to this host from its visitor's browser. Without keys such requests
    are refused by their names: a browser sends in Host the name that it looked up, and in Origin
    the page that sent the request.
    """

    def __init__(self, app: ASGIApp, keys: Keys | None, body_timeout_s: float) -> None:
        self._app = app
        self._keys = keys
        self._body_timeout_s = body_timeout_s
        self._budget = ByteBudget(16 * BODY_BYTES)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            self._check(scope)
            body = b"" if scope["method"] in ("GET", "HEAD") else await self._read(scope, receive)
        except ServiceError as error:
            await error_response(error, Request(scope))(scope, receive, send)
        except ClientDisconnected:
            pass
        else:
            await self._app(scope, replayed(body, receive), send)

    def _check(self, scope: Scope) -> None:
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        if self._keys is None:
            check_local(headers)
        elif scope["path"] not in ("/livez", "/metrics") and not self._keys.admit(dict(headers)):
            raise Unauthorized("This port asks for a key.")

    async def _read(self, scope: Scope, receive: Receive) -> bytes:
        length = dict(scope["headers"]).get(b"content-length", b"")
        body = await read_body(length, receive, BODY_BYTES, self._body_timeout_s, self._budget)
        self._budget.release(len(body))
        return body


def replayed(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that first returns a body that was read before."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again() -> Message:
        return messages.pop() if messages else await receive()

    return receive_again


def check_local(headers: list[tuple[bytes, bytes]]) -> None:
    """Raise Forbidden unless every Host names this host, and no page of another origin asks."""
    hosts = [value for name, value in headers if name == b"host"]
    if not hosts or not all(is_loopback_name(host) for host in hosts):
        raise Forbidden(
            "Without keys this port answers requests to localhost, 127.0.0.1 or [::1] only; use one"
            " of these as the host, or set DRBERT_ADMIN_KEYS_FILE."
        )
    origins = [value for name, value in headers if name == b"origin"]
    if any(origin.partition(b"://")[2] != hosts[0] for origin in origins):
        raise Forbidden("Without keys this port answers no web pages; set DRBERT_ADMIN_KEYS_FILE.")
    if any(
        name == b"sec-fetch-site" and value not in (b"same-origin", b"none")
        for name, value in headers
    ):
        raise Forbidden("Without keys this port answers no web pages; set DRBERT_ADMIN_KEYS_FILE.")


def is_loopback_name(host: bytes) -> bool:
    """Return whether a Host header is `localhost` or a loopback address.

    Any other name may be another host's in DNS.
    """
    name = host.decode("latin-1").strip().lower()
    if name.startswith("["):
        name, _, port = name[1:].partition("]")
        port = port.removeprefix(":")
    else:
        name, _, port = name.partition(":")
    if port and not port.isdigit():
        return False
    try:
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
