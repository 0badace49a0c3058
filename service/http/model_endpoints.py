"""
Model lists, readiness and metadata, as clients of OpenAI, KServe, Triton and Infinity expect them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response
from starlette.convertors import Convertor, register_url_convertor

from service.errors import ServiceError, ShuttingDown
from service.http.dialects import plain_refusal, retry_after
from service.http.dialects.open_inference import check_version, metadata
from service.http.info import tasks
from service.http.openapi import ERROR_DESCRIPTIONS
from service.registry import LoadedModel
from service.state import ServiceState


class NameConvertor(Convertor[str]):
    """A model's name in a path.

    It may hold slashes, as a hub's do, but not begin or end with one, nor end with a verb of the
    protocol.
    """

    regex = r"(?!.*/(?:infer|config|stats|load|unload)/?$)[^/](?:.*[^/])?"

    def convert(self, value: str) -> str:
        """Return the name in a path."""
        return value

    def to_string(self, value: str) -> str:
        """Return the part of a path for a name."""
        return value


register_url_convertor("name", NameConvertor())

UNKNOWN: dict[int | str, dict[str, Any]] = {
    404: {"description": ERROR_DESCRIPTIONS[404]},
    503: {"description": ERROR_DESCRIPTIONS[503]},
}


def add_model_endpoints(app: FastAPI, service: ServiceState) -> None:
    """Add the endpoints about models; Infinity's only if its dialect is chosen."""
    add_model_list(app, service)
    add_open_inference(app, service)
    if service.settings.classify_dialect == "infinity":
        add_infinity(app, service)


def add_model_list(app: FastAPI, service: ServiceState) -> None:
    """Add the list of models of OpenAI and KServe V1."""

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        """Return the loaded models in OpenAI's format and in KServe's."""
        return {
            "object": "list",
            "data": [
                {
                    "id": name,
                    "object": "model",
                    "created": service.started,
                    "owned_by": "drbert-serve",
                    "tasks": tasks(loaded.artifact.manifest),
                    "heads": None if loaded.head else list(loaded.heads),
                }
                for name, loaded in service.registry.names().items()
            ],
            "models": list(service.registry.names()),
        }

    @app.get("/v1/models/{model:name}", responses=UNKNOWN)
    async def kserve_ready(model: str) -> Response:
        """KServe V1: return whether a model is ready."""
        return about(service, model, readiness)


def add_open_inference(app: FastAPI, service: ServiceState) -> None:
    """Add the Open Inference Protocol's health and metadata."""

    @app.get("/v2")
    async def open_inference_server() -> dict[str, Any]:
        """Open Inference Protocol: return the server's name and extensions."""
        return {
            "name": "drbert-serve",
            "version": service.version,
            "extensions": ["classification", "binary_tensor_data"],
        }

    @app.get("/v2/health/live")
    async def open_inference_live() -> dict[str, bool]:
        """Open Inference Protocol: answer 200 while the process runs."""
        return {"live": True}

    @app.get("/v2/health/ready", responses={503: {"description": ERROR_DESCRIPTIONS[503]}})
    async def open_inference_server_ready() -> Response:
        """Open Inference Protocol: answer 200 while requests are accepted, else 503."""
        try:
            check_ready(service)
        except ServiceError as error:
            return JSONResponse(
                {"ready": False, "error": error.message}, int(error.status), refusal_headers(error)
            )
        return JSONResponse({"ready": True})

    # A model's name may hold slashes, so longer paths come before shorter ones.
    @app.get("/v2/models/{model:name}/versions/{version}/ready", responses=UNKNOWN)
    async def open_inference_version_ready(model: str, version: str) -> Response:
        """Open Inference Protocol: return whether a model's only version is ready."""
        return about(service, model, readiness, version)

    @app.get("/v2/models/{model:name}/versions/{version}", responses=UNKNOWN)
    async def open_inference_version(model: str, version: str) -> Response:
        """Open Inference Protocol: return the inputs and outputs of a model's only version."""
        return about(service, model, tensors, version)

    @app.get("/v2/models/{model:name}/ready", responses=UNKNOWN)
    async def open_inference_ready(model: str) -> Response:
        """Open Inference Protocol: return whether a model is ready."""
        return about(service, model, readiness)

    @app.get("/v2/models/{model:name}", responses=UNKNOWN)
    async def open_inference_model(model: str) -> Response:
        """Open Inference Protocol: return a model's inputs and outputs."""
        return about(service, model, tensors)


def add_infinity(app: FastAPI, service: ServiceState) -> None:
    """Add the endpoints that Infinity's client needs."""

    @app.get("/health", responses={503: {"description": ERROR_DESCRIPTIONS[503]}})
    async def infinity_health() -> Response:
        """Infinity: return the server's time while requests are accepted, else 503."""
        try:
            check_ready(service)
        except ServiceError as error:
            return JSONResponse(error.body(), int(error.status), refusal_headers(error))
        return JSONResponse({"unix": time.time()})

    @app.get("/models")
    async def infinity_models() -> dict[str, Any]:
        """Infinity: return the loaded models, with how full the queue is."""
        waiting, most = service.batcher.waiting, service.settings.max_queue_size
        stats = {
            "queue_fraction": waiting / most,
            "queue_absolute": waiting,
            "results_pending": service.lifecycle.active_requests,
            "batch_size": service.settings.max_batch_size,
        }
        return {
            "object": "list",
            "data": [
                {
                    "id": name,
                    "object": "model",
                    "created": service.started,
                    "owned_by": "infinity",
                    "backend": loaded.choice.runtime,
                    "capabilities": (
                        [] if loaded.artifact.manifest.labels_tokens else ["classify"]
                    ),
                    "stats": stats,
                }
                for name, loaded in service.registry.names().items()
            ],
        }


def about(
    service: ServiceState,
    model: str,
    describe: Callable[[LoadedModel], dict[str, Any]],
    version: str | None = None,
) -> Response:
    """Return what `describe` says about a loaded model, or the error in the protocols' format."""
    try:
        check_version(version)
        return JSONResponse(describe(service.acquire(model)))
    except ServiceError as error:
        status, headers, body = plain_refusal(error)
        return Response(body, status, {key.decode(): value.decode() for key, value in headers})


def check_ready(service: ServiceState) -> None:
    """Raise NotReady or ShuttingDown unless requests are accepted."""
    service.lifecycle.check_ready()
    service.lifecycle.check_not_saturated()


def refusal_headers(error: ServiceError) -> dict[str, str]:
    """Return the headers of an error: when to retry, and to leave a server that drains."""
    headers = {name.decode(): value.decode() for name, value in retry_after(error)}
    return headers | ({"connection": "close"} if isinstance(error, ShuttingDown) else {})


def tensors(loaded: LoadedModel) -> dict[str, Any]:
    """Return a model's inputs and outputs in the Open Inference Protocol."""
    manifest = loaded.main.artifact.manifest
    described = metadata(loaded.full_name, manifest.labels, manifest.takes_pairs)
    # The protocol's tensors have a row for each text, and no place for labels of tokens.
    return described | {"outputs": []} if manifest.labels_tokens else described


def readiness(loaded: LoadedModel) -> dict[str, Any]:
    """Return that a model is ready: a loaded one always is."""
    return {"name": loaded.full_name, "ready": True}
