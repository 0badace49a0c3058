"""
What clients ask of a server beside its answers: which models there are and whether they are ready, in OpenAI's, KServe's and
Triton's words.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse, PlainTextResponse, Response

from service.classifications import REFUSALS
from service.dialects import plain_refusal
from service.dialects.open_inference import check_version, metadata
from service.errors import ServiceError
from service.models import Loaded, Models

UNKNOWN: dict[int | str, dict[str, Any]] = {404: {"description": REFUSALS[404]}, 503: {"description": REFUSALS[503]}}


def add_protocols(app: FastAPI, models: Models) -> None:
    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        """The loaded models, in OpenAI's form and in KServe's."""
        return {"object": "list", "data": [
            {"id": name, "object": "model", "created": models.started, "owned_by": "drbert-serve"} for name in models.loaded
        ], "models": list(models.loaded)}

    @app.get("/v1/models/{model}", responses=UNKNOWN)
    async def kserve_ready(model: str) -> Response:
        """KServe V1: whether a model is ready."""
        return about(model, readiness)

    @app.get("/v2")
    async def open_inference_server() -> dict[str, Any]:
        """Open Inference Protocol: what this server is."""
        return {"name": "drbert-serve", "version": models.version, "extensions": ["classification", "binary_tensor_data"]}

    @app.get("/v2/health/live", response_class=PlainTextResponse)
    async def open_inference_live() -> str:
        """Open Inference Protocol: 200 while the process answers."""
        return "ok\n"

    @app.get("/v2/models/{model}", responses=UNKNOWN)
    async def open_inference_model(model: str) -> Response:
        """Open Inference Protocol: a model's inputs and outputs."""
        return about(model, tensors)

    @app.get("/v2/models/{model}/ready", responses=UNKNOWN)
    async def open_inference_ready(model: str) -> Response:
        """Open Inference Protocol: whether a model is ready."""
        return about(model, readiness)

    @app.get("/v2/models/{model}/versions/{version}", responses=UNKNOWN)
    async def open_inference_version(model: str, version: str) -> Response:
        """Open Inference Protocol: the inputs and outputs of a model's one version."""
        return about(model, tensors, version)

    @app.get("/v2/models/{model}/versions/{version}/ready", responses=UNKNOWN)
    async def open_inference_version_ready(model: str, version: str) -> Response:
        """Open Inference Protocol: whether a model's one version is ready."""
        return about(model, readiness, version)

    def about(model: str, told: Callable[[Loaded], dict[str, Any]], version: str | None = None) -> Response:
        try:
            check_version(version)
            return JSONResponse(told(models.using(model)))
        except ServiceError as error:
            status, headers, body = plain_refusal(error)
            return Response(body, status, {key.decode(): value.decode() for key, value in headers})


def tensors(loaded: Loaded) -> dict[str, Any]:
    manifest = loaded.artifact.manifest
    return metadata(loaded.name, manifest.labels, manifest.takes_pairs)


def readiness(loaded: Loaded) -> dict[str, Any]:
    return {"name": loaded.name, "ready": True}
