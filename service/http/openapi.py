"""
What /openapi.json says of the API: every path's requests, answers and refusals, in the words of its
dialect.

The paths that classify are answered before FastAPI is asked (classifications.py), so they are
described here by hand.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.openapi.utils import get_openapi
from fastapi.responses import Response

from service.http.dialects import huggingface, infinity, kserve, open_inference, tei
from service.schemas import ClassifyAnswer, ClassifyRequest, LabelScore

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
COMPONENTS = "#/components/schemas/{model}"
# Where errors are `{"error": "…"}`: KServe's and Triton's clients read a text there.
PLAIN = re.compile(r"/v2(/.*)?$|/v1/models/.+")
# Health, what a scraper reads, and pages that hold nothing of anybody's: no key is asked for.
OPEN = re.compile(
    r"/(livez|readyz|health|v2/health/(live|ready)|metrics|openapi\.json|docs(/.*)?|page/.*)?$"
)

ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {
                    "type": "string",
                    "description": (
                        "What was wrong, with the value, the limit and the remedy; no text is"
                        " repeated."
                    ),
                },
                "type": {"type": "string"},
                "code": {"type": "string"},
                "param": {
                    "type": ["string", "null"],
                    "description": "The field at fault, as input[3].",
                },
            },
        }
    },
}
PLAIN_ERROR = {"type": "object", "required": ["error"], "properties": {"error": {"type": "string"}}}
SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "api_key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
}


@dataclass(frozen=True)
class Operation:
    """What a path that classifies is asked and answers, by the names of the schemas."""

    summary: str
    asked: str
    answered: str
    error: str = "Error"
    statuses: Mapping[int, int] = field(default_factory=dict)
    """Statuses of REFUSALS that the dialect has another one for."""


OWN = Operation("Classify a text, a pair, or a list of those", "ClassifyRequest", "ClassifyAnswer")
INFINITY = Operation("Classify, as Infinity does", "InfinityRequest", "InfinityAnswer")
TEI = Operation(
    "Classify, as Text Embeddings Inference does",
    "TeiRequest",
    "TeiAnswer",
    "TeiError",
    {500: 424, 504: 424},
)
HUGGING_FACE = Operation(
    "Classify, as Hugging Face's Inference API does",
    "HuggingFaceRequest",
    "HuggingFaceAnswer",
    "PlainError",
)
KSERVE = Operation(
    "Classify, as KServe's V1 protocol does", "KServeRequest", "KServeAnswer", "PlainError"
)
OPEN_INFERENCE = Operation(
    "Classify, as the Open Inference Protocol does",
    "OpenInferenceRequest",
    "OpenInferenceAnswer",
    "PlainError",
    {422: 400},
)

SCHEMAS: dict[str, dict[str, Any]] = {
    "Error": ERROR,
    "PlainError": PLAIN_ERROR,
    "TeiError": tei.ERROR,
    "LabelScore": LabelScore.model_json_schema(),
    "InfinityRequest": infinity.SCHEMA,
    "InfinityAnswer": infinity.ANSWER,
    "TeiRequest": tei.SCHEMA,
    "TeiAnswer": tei.ANSWER,
    "HuggingFaceRequest": huggingface.SCHEMA,
    "HuggingFaceAnswer": huggingface.ANSWER,
    "KServeRequest": kserve.SCHEMA,
    "KServeAnswer": kserve.ANSWER,
    "OpenInferenceRequest": open_inference.SCHEMA,
    "OpenInferenceAnswer": open_inference.ANSWER,
}


def operations(classify_dialect: str, root_dialect: str) -> dict[str, Operation]:
    """The paths that classify, as the settings have them."""
    return {
        "/classify": INFINITY if classify_dialect == "infinity" else OWN,
        "/v1/classify": OWN,
        "/predict": TEI,
        "/": TEI if root_dialect == "tei" else HUGGING_FACE,
        "/models/{model}": HUGGING_FACE,
        "/v1/models/{model}:predict": KSERVE,
        "/v2/models/{model}/infer": OPEN_INFERENCE,
        "/v2/models/{model}/versions/{version}/infer": OPEN_INFERENCE,
    }


def describe(app: FastAPI, classify_dialect: str, root_dialect: str, keyed: bool) -> None:
    """Puts the paths that classify into the description of `app`, and what all have in common:
    refusals and, where there are any, keys.
    """
    used = operations(classify_dialect, root_dialect)
    for path, operation in used.items():
        described = refusals(operation)
        described[200] = {"description": "Answered"} | _json(operation.answered)
        app.post(
            path,
            summary=operation.summary,
            operation_id=re.sub(r"\W+", "_", path).strip("_") or "root",
            response_model=None,
            responses=described,
            openapi_extra={
                "requestBody": {"required": True, **_json(operation.asked)},
                "parameters": [
                    {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
                    for name in re.findall(r"{(\w+)}", path)
                ],
            },
        )(answered_before)
    named = {"Error", "PlainError", "LabelScore"} | {
        name for one in used.values() for name in (one.asked, one.answered, one.error)
    }
    schemas = {name: schema for name, schema in SCHEMAS.items() if name in named}
    schemas |= _with_parts("ClassifyRequest", ClassifyRequest) | _with_parts(
        "ClassifyAnswer", ClassifyAnswer
    )

    def whole() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = get_openapi(
                title=app.title, version=app.version, routes=app.routes
            )
            _complete(app.openapi_schema, schemas, keyed)
        return app.openapi_schema

    # As FastAPI's own documentation has it.
    app.openapi = whole  # type: ignore[method-assign]


def refusals(operation: Operation) -> dict[int | str, dict[str, Any]]:
    """Return what a path refuses with, by status."""
    reasons: dict[int, list[str]] = {}
    for status, why in REFUSALS.items():
        reasons.setdefault(operation.statuses.get(int(status), int(status)), []).append(why)
    described: dict[int | str, dict[str, Any]] = {}
    for status, texts in reasons.items():
        # What is wrong with the HTTP is found before the path is looked at.
        schemas = {414: ["Error"], 431: ["Error"], 400: [operation.error, "Error"]}
        schemas[408] = schemas[400]
        names = list(dict.fromkeys(schemas.get(status, [operation.error])))
        described[status] = {"description": "; ".join(texts)} | _json(*names)
    return described


async def answered_before(request: Request) -> Response:
    # Classifications answers before FastAPI is asked, but for a path that FastAPI alone takes for
    # one of these, as /classify and a newline.
    raise HTTPException(404)


def _json(*names: str) -> dict[str, Any]:
    """Return the content of a message in JSON that keeps one of the schemas."""
    schemas = [{"$ref": COMPONENTS.format(model=name)} for name in names]
    schema = schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
    return {"content": {"application/json": {"schema": schema}}}


def _with_parts(
    name: str, model: type[ClassifyRequest | ClassifyAnswer]
) -> dict[str, dict[str, Any]]:
    """A model's schema and those of its parts, each by its name."""
    schema = model.model_json_schema(ref_template=COMPONENTS)
    parts: dict[str, dict[str, Any]] = schema.pop("$defs", {})
    return {name: schema, **parts}


def _complete(description: dict[str, Any], schemas: dict[str, dict[str, Any]], keyed: bool) -> None:
    """Adds the schemas, those of the refusals among them, and the keys."""
    components = description.setdefault("components", {})
    # FastAPI's own, of errors that this service never answers with.
    components["schemas"] = schemas
    for path, methods in description["paths"].items():
        for method, operation in methods.items():
            for status, response in list(operation["responses"].items()):
                if "HTTPValidationError" in str(response):
                    del operation["responses"][status]
                elif int(status) >= 400 and "application/json" not in response.get("content", {}):
                    response |= _json("PlainError" if PLAIN.match(path) else "Error")
            if keyed and (method == "post" or not OPEN.match(path)):
                operation["security"] = [{name: []} for name in SCHEMES]
                operation["responses"].setdefault(
                    "401",
                    {"description": REFUSALS[401]}
                    | _json("PlainError" if PLAIN.match(path) else "Error"),
                )
    if keyed:
        components["securitySchemes"] = SCHEMES
