"""
The private port: models are loaded, reloaded and unloaded here while the other port goes on answering.

    POST   /models/NAME   {"artifact": "/models/reviews-4"}   loads a model, or another one in the place of NAME
    POST   /models/NAME   {}                                  reads the folder of NAME again
    DELETE /models/NAME                                       unloads it

The change is one assignment: a request is answered by the old model or by the new one, and the old one is let go when its last
request is answered. What cannot be loaded leaves everything as it was.
"""

from __future__ import annotations

import asyncio
import logging
import time
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, ConfigDict, Field
from starlette.types import ASGIApp, Receive, Scope, Send

from command import BadInput, CommandError
from service.artifact import read_artifact
from service.errors import InvalidInput, ServiceError, Unauthorized
from service.keys import Keys
from service.models import Loaded, Models

log = logging.getLogger(__name__)


class LoadRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")

    artifact: Path | None = Field(default=None, description="An artifact's folder; by default the one that the model was loaded from.")
    digest: str | None = Field(default=None, description="What its digest must be; another one is refused.")


class Change(BaseModel):
    model: str
    digest: str | None = Field(description="Of what answers now; null after unloading.")
    replaced: str | None = Field(description="The digest of what answered before.")
    variant: str | None
    seconds: float


def build_admin(models: Models, keys: Keys | None) -> ASGIApp:
    """The ASGI application of the private port."""
    app = FastAPI(title="DrBERT Serve: administration", version=models.version, docs_url=None, redoc_url=None)
    leaving: set[asyncio.Task[None]] = set()

    def let_go(old: Loaded) -> None:
        task = asyncio.create_task(models.forget(old))
        leaving.add(task)
        task.add_done_callback(leaving.discard)

    @app.post("/models/{model}")
    async def load_model(model: str, asked: LoadRequest) -> Change:
        """Loads a model, or another one in its place; answers once it is the one that answers."""
        models.check_ready()
        began = time.monotonic()
        folder = asked.artifact
        if folder is None:
            if model not in models.loaded:
                raise InvalidInput("artifact is missing: there is no model of that name to load again.", param="artifact")
            folder = models.loaded[model].artifact.directory
        made, old = await asyncio.to_thread(load, models, model, folder, asked.digest)
        if old is not None:
            let_go(old)
        return Change(
            model=model, digest=made.artifact.digest, replaced=old.artifact.digest if old else None, variant=made.choice.variant,
            seconds=time.monotonic() - began,
        )

    @app.delete("/models/{model}")
    async def unload_model(model: str) -> Change:
        """Answers no more requests with a model; those it was given are finished."""
        began = time.monotonic()
        old = await asyncio.to_thread(models.remove, model)
        let_go(old)
        return Change(model=model, digest=None, replaced=old.artifact.digest, variant=None, seconds=time.monotonic() - began)

    @app.get("/info")
    async def info() -> dict[str, Any]:
        return models.info()

    @app.get("/livez", response_class=PlainTextResponse)
    async def livez() -> str:
        return "ok\n"

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        page = await asyncio.to_thread(generate_latest, models.metrics.registry)
        return Response(page, media_type=CONTENT_TYPE_LATEST)

    @app.exception_handler(ServiceError)
    async def refused(request: Request, error: ServiceError) -> Response:
        return JSONResponse(error.body(), int(error.status))

    return Guarded(app, keys)


def load(models: Models, name: str, folder: Path, digest: str | None) -> tuple[Loaded, Loaded | None]:
    """The model of an artifact, answering, and the one it replaced; InvalidInput says why it cannot."""
    try:
        artifact = read_artifact(folder)
        if digest is not None and artifact.digest != digest:
            raise BadInput(f"The digest of {folder} is {artifact.digest}, {digest} was asked for.")
        return models.add(name, artifact)
    except (CommandError, ServiceError) as error:
        log.warning("a model could not be loaded", exc_info=error.__cause__, extra={"model": name, "artifact": str(folder), "why": str(error)})
        raise InvalidInput(str(error), param="artifact") from None


class Guarded:
    """Middleware: whoever changes something brings a key, where there are keys."""

    def __init__(self, app: ASGIApp, keys: Keys | None) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        open_to_all = scope["type"] != "http" or scope["path"] in ("/livez", "/metrics")
        if self._keys is None or open_to_all or self._keys.admit(dict(scope["headers"])):
            await self._app(scope, receive, send)
        else:
            await JSONResponse(Unauthorized("This port asks for a key.").body(), 401, {"www-authenticate": "Bearer"})(scope, receive, send)
