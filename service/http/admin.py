"""
The private port: models are loaded, reloaded and unloaded here while the other port goes on
answering.

    POST   /models/NAME   {"artifact": "/models/reviews-4"}   loads a model, or another one in the
                                                              place of NAME
    POST   /models/NAME   {}                                  reads the folder of NAME again
    POST   /models/NAME   {"default": true}                   answers requests that name no model
                                                              with NAME
    DELETE /models/NAME                                       unloads it

The change is one assignment: a request is answered by the old model or by the new one, and the old
one is let go when its last request is answered. What cannot be loaded leaves everything as it was.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import time
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Request
from fastapi import Path as PathParameter
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from command import BadInput, CommandError
from service.artifact import read_artifact
from service.errors import (
    BodyTooSlow,
    Forbidden,
    InvalidInput,
    InvalidJson,
    ServiceError,
    Unauthorized,
)
from service.http.keys import Keys
from service.http.routes import HeadAsGet
from service.http.transport.protocol import ClientLeft, Room, read_body
from service.loading import Loads, Ticket
from service.registry import Loaded, Models

log = logging.getLogger(__name__)

BODY_BYTES = 65_536
NAME_CHARS = 200
# Paths may be thousands of characters long, and libraries quote what they were given.
MESSAGE_CHARS = 1_000

ModelName = Annotated[str, PathParameter(max_length=NAME_CHARS)]


class LoadRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")

    artifact: Path | None = Field(
        default=None,
        description="An artifact's folder; by default the one that the model was loaded from.",
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
    model: str
    digest: str | None = Field(description="Of what answers now; null after unloading.")
    replaced: str | None = Field(description="The digest of what answered before.")
    variant: str | None
    default: bool = Field(description="Whether it answers requests that name no model.")
    seconds: float


def build_admin(models: Models, keys: Keys | None) -> ASGIApp:
    """The ASGI application of the private port."""
    app = FastAPI(
        title="DrBERT Serve: administration",
        version=models.version,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    loads = Loads(models.settings.admin_load_timeout_s)
    leaving: set[asyncio.Task[None]] = set()

    def let_go(old: Loaded) -> None:
        task = asyncio.create_task(models.forget(old))
        leaving.add(task)
        task.add_done_callback(leaving.discard)

    @app.post("/models/{model}")
    async def load_model(model: ModelName, asked: LoadRequest) -> Change:
        """Loads a model, or another one in its place; answers once it is the one that answers."""
        models.check_ready()
        began = time.monotonic()
        if asked.default and asked.artifact is None and asked.digest is None:
            models.set_default(model)
            return change(models, model, models.loaded[model], models.loaded[model], began)
        folder = asked.artifact
        if folder is None:
            if model not in models.loaded:
                raise InvalidInput(
                    "artifact is missing: there is no model of that name to load again.",
                    param="artifact",
                )
            folder = models.loaded[model].artifact.directory
        made, old = await loads.run(
            model, lambda ticket: load(models, model, folder, asked.digest, ticket)
        )
        if old is not None:
            let_go(old)
        if asked.default:
            models.set_default(model)
        return change(models, model, made, old, began)

    @app.delete("/models/{model}")
    async def unload_model(model: ModelName) -> Change:
        """Answers no more requests with a model; those it was given are finished."""
        began = time.monotonic()
        loads.check_free(model)
        old = models.remove(model)
        let_go(old)
        return change(models, model, None, old, began)

    add_operation(app, models)
    add_refusals(app)
    return Guarded(HeadAsGet(app), keys, models.settings.request_timeout_s)


def change(
    models: Models, model: str, made: Loaded | None, old: Loaded | None, began: float
) -> Change:
    return Change(
        model=model,
        digest=made.artifact.digest if made else None,
        replaced=old.artifact.digest if old else None,
        variant=made.choice.variant if made else None,
        default=made is not None and models.default == model,
        seconds=time.monotonic() - began,
    )


def add_operation(app: FastAPI, models: Models) -> None:
    """What is loaded, health and metrics, as on the public port."""

    @app.get("/info")
    async def info() -> dict[str, Any]:
        return models.info()

    @app.get("/livez", response_class=PlainTextResponse)
    async def livez() -> str:
        return "ok\n"

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics(request: Request) -> Response:
        return await models.metrics_page.respond(request)


def add_refusals(app: FastAPI) -> None:
    """Answers every error in the service's own form, and never with what was sent."""

    @app.exception_handler(ServiceError)
    async def refused(request: Request, error: ServiceError) -> Response:
        return refusal(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return refusal(invalid_request(error))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        if error.status_code == 400:  # a body that the framework could not parse
            return refusal(InvalidJson("The body is not JSON.", param="body"))
        code = str(error.detail).lower().replace(" ", "_")
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
        return refusal(ServiceError("This is a bug in the service; its log has the traceback."))


def refusal(error: ServiceError) -> Response:
    headers = {} if error.retry_after_s is None else {"retry-after": str(error.retry_after_s)}
    return JSONResponse(error.body(), int(error.status), headers)


def invalid_request(error: RequestValidationError) -> ServiceError:
    """The refusal of a body that is not what is asked for; names of unknown fields are the
    caller's, and not repeated.
    """
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return InvalidJson("The body is not JSON.", param="body")
    if first["type"] == "extra_forbidden":
        return InvalidInput(
            f"The body has an unknown field; there are {', '.join(LoadRequest.model_fields)}.",
            param="body",
        )
    place = str(first["loc"][1]) if len(first["loc"]) > 1 else "body"
    if place == "body":
        return InvalidInput(
            "The body must be a JSON object, sent with Content-Type: application/json.",
            param="body",
        )
    return InvalidInput(f"{place}: {first['msg']}.", param=place)


def load(
    models: Models, name: str, folder: Path, digest: str | None, ticket: Ticket
) -> tuple[Loaded, Loaded | None]:
    """The model of an artifact, answering, and the one it replaced; InvalidInput says why it
    cannot.
    """
    try:
        artifact = read_artifact(folder)
        if digest is not None and artifact.digest != digest:
            raise BadInput(f"The digest of {folder} is {artifact.digest}, {digest} was asked for.")
        return models.add(name, artifact, ticket.take)
    # Whatever an artifact makes a library raise, panics of Rust included: this is its own thread.
    except BaseException as error:
        expected = isinstance(error, CommandError | ServiceError)
        why = (
            str(error)
            if expected
            else f"{folder} cannot be loaded ({type(error).__name__}: {error}); export it again."
        )
        why = why if len(why) <= MESSAGE_CHARS else f"{why[:MESSAGE_CHARS]}…"
        log.warning(
            "a model could not be loaded",
            exc_info=error.__cause__ if expected else error,
            extra={
                "model": name,
                "artifact": str(folder)[:MESSAGE_CHARS],
                "why": why,
            },
        )
        raise InvalidInput(why, param="artifact") from None


class Guarded:
    """Middleware: whoever changes something brings a key, where there are keys; else it comes from
    this host and from no web page.

    A web page can send requests to this host from its visitor's browser. Where no key keeps them
    off, the names it can send them under do: a browser says in Host which name it looked up, and in
    Origin whose page asked.
    """

    def __init__(self, app: ASGIApp, keys: Keys | None, body_within_s: float) -> None:
        self._app = app
        self._keys = keys
        self._body_within_s = body_within_s
        self._room = Room(16 * BODY_BYTES)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            self._check(scope)
            body = b"" if scope["method"] in ("GET", "HEAD") else await self._read(scope, receive)
        except Unauthorized as error:
            await JSONResponse(error.body(), 401, {"www-authenticate": "Bearer"})(
                scope, receive, send
            )
        except ServiceError as error:
            headers = {"connection": "close"} if isinstance(error, BodyTooSlow) else {}
            await JSONResponse(error.body(), int(error.status), headers)(scope, receive, send)
        except ClientLeft:
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
        declared = dict(scope["headers"]).get(b"content-length", b"")
        body = await read_body(declared, receive, BODY_BYTES, self._body_within_s, self._room)
        self._room.give_back(len(body))
        return body


def replayed(body: bytes, receive: Receive) -> Receive:
    """A receive that first gives a body that was read already."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again() -> Message:
        return messages.pop() if messages else await receive()

    return receive_again


def check_local(headers: list[tuple[bytes, bytes]]) -> None:
    """Raise Forbidden unless every Host is this host's own and a page that asks is of the same
    origin.
    """
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
    """Whether a Host header names this host: no name that others give out in DNS, and no address
    but of the loopback.
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
