"""
What clients ask of a server beside its answers: which models there are and whether they are ready,
in OpenAI's, KServe's and Triton's words.
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
from service.http.openapi import REFUSALS
from service.registry import Loaded, Models


class NameConvertor(Convertor[str]):
    """A model's name in a path: it may hold slashes, as a hub's do, but neither begin nor end with
    one, nor with what the protocol asks of a model.
    """

    regex = r"(?!.*/(?:infer|config|stats|load|unload)/?$)[^/](?:.*[^/])?"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("name", NameConvertor())

UNKNOWN: dict[int | str, dict[str, Any]] = {
    404: {"description": REFUSALS[404]},
    503: {"description": REFUSALS[503]},
}


def add_protocols(app: FastAPI, models: Models) -> None:
    """Adds what clients ask beside classifications; which of Infinity's paths, the settings say."""
    add_model_list(app, models)
    add_open_inference(app, models)
    if models.settings.classify_dialect == "infinity":
        add_infinity(app, models)


def add_model_list(app: FastAPI, models: Models) -> None:
    """OpenAI's and KServe V1's list of models."""

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        """The loaded models, in OpenAI's form and in KServe's."""
        return {
            "object": "list",
            "data": [
                {
                    "id": name,
                    "object": "model",
                    "created": models.started,
                    "owned_by": "drbert-serve",
                }
                for name in models.loaded
            ],
            "models": list(models.loaded),
        }

    @app.get("/v1/models/{model:name}", responses=UNKNOWN)
    async def kserve_ready(model: str) -> Response:
        """KServe V1: whether a model is ready."""
        return about(models, model, readiness)


def add_open_inference(app: FastAPI, models: Models) -> None:
    """The Open Inference Protocol's health and metadata."""

    @app.get("/v2")
    async def open_inference_server() -> dict[str, Any]:
        """Open Inference Protocol: what this server is."""
        return {
            "name": "drbert-serve",
            "version": models.version,
            "extensions": ["classification", "binary_tensor_data"],
        }

    @app.get("/v2/health/live")
    async def open_inference_live() -> dict[str, bool]:
        """Open Inference Protocol: 200 while the process answers."""
        return {"live": True}

    @app.get("/v2/health/ready", responses={503: {"description": REFUSALS[503]}})
    async def open_inference_server_ready() -> Response:
        """Open Inference Protocol: 200 while the service takes requests, else 503 and why."""
        try:
            check_ready(models)
        except ServiceError as error:
            return JSONResponse(
                {"ready": False, "error": error.message}, int(error.status), refusal_headers(error)
            )
        return JSONResponse({"ready": True})

    # A model's name may hold slashes, so what ends in more comes before what does not.
    @app.get("/v2/models/{model:name}/versions/{version}/ready", responses=UNKNOWN)
    async def open_inference_version_ready(model: str, version: str) -> Response:
        """Open Inference Protocol: whether a model's one version is ready."""
        return about(models, model, readiness, version)

    @app.get("/v2/models/{model:name}/versions/{version}", responses=UNKNOWN)
    async def open_inference_version(model: str, version: str) -> Response:
        """Open Inference Protocol: the inputs and outputs of a model's one version."""
        return about(models, model, tensors, version)

    @app.get("/v2/models/{model:name}/ready", responses=UNKNOWN)
    async def open_inference_ready(model: str) -> Response:
        """Open Inference Protocol: whether a model is ready."""
        return about(models, model, readiness)

    @app.get("/v2/models/{model:name}", responses=UNKNOWN)
    async def open_inference_model(model: str) -> Response:
        """Open Inference Protocol: a model's inputs and outputs."""
        return about(models, model, tensors)


def add_infinity(app: FastAPI, models: Models) -> None:
    """What Infinity's client asks for."""

    @app.get("/health", responses={503: {"description": REFUSALS[503]}})
    async def infinity_health() -> Response:
        """Infinity: the server's time while the service takes requests, else 503 and why."""
        try:
            check_ready(models)
        except ServiceError as error:
            return JSONResponse(error.body(), int(error.status), refusal_headers(error))
        return JSONResponse({"unix": time.time()})

    @app.get("/models")
    async def infinity_models() -> dict[str, Any]:
        """Infinity: the loaded models, with how full the queue is."""
        waiting, most = models.batcher.waiting, models.settings.max_queue_size
        stats = {
            "queue_fraction": waiting / most,
            "queue_absolute": waiting,
            "results_pending": models.answering,
            "batch_size": models.settings.max_batch_size,
        }
        return {
            "object": "list",
            "data": [
                {
                    "id": name,
                    "object": "model",
                    "created": models.started,
                    "owned_by": "infinity",
                    "backend": loaded.choice.runtime,
                    "capabilities": ["classify"],
                    "stats": stats,
                }
                for name, loaded in models.loaded.items()
            ],
        }


def about(
    models: Models,
    model: str,
    told: Callable[[Loaded], dict[str, Any]],
    version: str | None = None,
) -> Response:
    """What is told of a loaded model, or the refusal in the protocols' form."""
    try:
        check_version(version)
        return JSONResponse(told(models.using(model)))
    except ServiceError as error:
        status, headers, body = plain_refusal(error)
        return Response(body, status, {key.decode(): value.decode() for key, value in headers})


def check_ready(models: Models) -> None:
    """NotReady, ShuttingDown or Overloaded unless requests are taken."""
    models.check_ready()
    models.check_not_saturated()


def refusal_headers(error: ServiceError) -> dict[str, str]:
    """What a refusal says beside its body: when to come back, and that a server which drains is to
    be left.
    """
    headers = {name.decode(): value.decode() for name, value in retry_after(error)}
    return headers | ({"connection": "close"} if isinstance(error, ShuttingDown) else {})


def tensors(loaded: Loaded) -> dict[str, Any]:
    manifest = loaded.artifact.manifest
    return metadata(loaded.name, manifest.labels, manifest.takes_pairs)


def readiness(loaded: Loaded) -> dict[str, Any]:
    return {"name": loaded.name, "ready": True}
