"""
The paths on which texts are classified, each in its dialect, and what the API's description says of them.
"""

from __future__ import annotations

import re
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.types import ASGIApp, Scope

from service.classify import Around, Classify
from service.dialects import huggingface, infinity, kserve, open_inference, tei
from service.dialects.huggingface import HuggingFace
from service.dialects.infinity import Infinity
from service.dialects.kserve import KServe
from service.dialects.native import Native
from service.dialects.open_inference import OpenInference
from service.dialects.tei import Tei
from service.models import Models
from service.schemas import ClassifyAnswer, ClassifyRequest

REFUSALS: dict[int | str, str] = {
    400: "not JSON, not UTF-8, or not HTTP",
    401: "no key, or none that is known; only where the service has keys",
    404: "unknown model",
    408: "the body was not all there in time",
    413: "the body, the list or a text is over its limit",
    414: "the request's path and query are over their limit",
    415: "the body is compressed by something else than gzip or deflate",
    422: "a field has a wrong type or value; the message names it",
    429: "the queue is full; Retry-After says when to come back",
    431: "the head or the trailers are over their limit",
    500: "the model failed on a text, or the service has a bug",
    503: "loading or draining",
    504: "the deadline passed",
}


class Classifications:
    """The paths on which a text can be classified, each in its dialect."""

    def __init__(self, models: Models, around: Around) -> None:
        native = Classify(models, around, Native())
        chosen = Classify(models, around, Infinity()) if models.settings.classify_dialect == "infinity" else native
        hugging_face, text_embeddings = (Classify(models, around, dialect, "inputs") for dialect in (HuggingFace(), Tei()))
        self._fixed: dict[str, ASGIApp] = {
            "/v1/classify": native, "/classify": chosen, "/predict": text_embeddings, "/": text_embeddings if models.settings.root_dialect == "tei" else hugging_face,
        }
        open_inference = Classify(models, around, OpenInference(), "text")
        named: dict[str, ASGIApp] = {
            "/models/{model}": hugging_face, "/v1/models/{model}:predict": Classify(models, around, KServe(), "instances"),
            "/v2/models/{model}/versions/{version}/infer": open_inference, "/v2/models/{model}/infer": open_inference,
        }
        # A model's name may hold slashes, as a hub's do.
        self._named = [(re.compile(route.replace("{model}", "(?P<model>.+)").replace("{version}", "(?P<version>[^/]+)"), re.DOTALL), route, app) for route, app in named.items()]

    def at(self, scope: Scope) -> ASGIApp | None:
        """What answers a POST there; the path's route, and the model and version that it names, are noted in the scope's state."""
        if scope["method"] != "POST":
            return None
        path: str = scope["path"]
        if path in self._fixed:
            return self._fixed[path]
        for pattern, route, app in self._named:
            if found := pattern.fullmatch(path):
                scope["state"].update(found.groupdict(), route=route)
                return app
        return None


# What each path is for, and the schema of what it is asked.
DIALECTS: dict[str, tuple[str, dict[str, Any]]] = {
    "/predict": ("Classify, as Text Embeddings Inference does", tei.SCHEMA),
    "/": ("Classify, as Hugging Face's Inference API does", huggingface.SCHEMA),
    "/models/{model}": ("The same, with a named model", huggingface.SCHEMA),
    "/v1/models/{model}:predict": ("Classify, as KServe's V1 protocol does", kserve.SCHEMA),
    "/v2/models/{model}/infer": ("Classify, as the Open Inference Protocol does", open_inference.SCHEMA),
    "/v2/models/{model}/versions/{version}/infer": ("The same, with the version that there is", open_inference.SCHEMA),
}


def describe(app: FastAPI, classify_dialect: str, root_dialect: str) -> None:
    """Puts the paths into the description of `app`, which is never asked on them: Classifications answers before."""
    own = "Classify a text, a pair, or a list of those", inlined(ClassifyRequest.model_json_schema())
    chosen = ("Classify, as Infinity does", infinity.SCHEMA) if classify_dialect == "infinity" else own
    root = {"/": DIALECTS["/predict"]} if root_dialect == "tei" else {}
    for path, (summary, schema) in {"/classify": chosen, "/v1/classify": own, **DIALECTS, **root}.items():
        app.post(
            path, summary=summary, operation_id=re.sub(r"\W+", "_", path).strip("_") or "root", response_model=ClassifyAnswer if schema is own[1] else None,
            responses={status: {"description": why} for status, why in refusals(path).items()}, openapi_extra={
                "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
                "parameters": [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in re.findall(r"{(\w+)}", path)],
            },
        )(answered_before)


def refusals(path: str) -> dict[int | str, str]:
    """What a path refuses with, by status."""
    return REFUSALS | ({424: "the model failed on a text, as Text Embeddings Inference says it"} if path == "/predict" else {})


async def answered_before(request: Request) -> Response:
    raise AssertionError("Classifications answers before FastAPI is asked; this stands here for the description.")


def inlined(schema: dict[str, Any]) -> dict[str, Any]:
    """A JSON schema without definitions of its own, which an OpenAPI description has no place for."""
    definitions = schema.pop("$defs", {})

    def put(part: Any) -> Any:
        if isinstance(part, list):
            return [put(one) for one in part]
        if not isinstance(part, dict):
            return part
        if "$ref" in part:
            return put(definitions[part["$ref"].rpartition("/")[2]])
        return {name: put(one) for name, one in part.items()}

    found: dict[str, Any] = put(schema)
    return found
