"""
The API description at /openapi.json: the requests, answers and errors of every path and dialect.

The paths that classify are answered in front of FastAPI (service/http/router.py), so they are
described here by hand.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, Response

from service.http.dialects import (
    huggingface,
    infinity,
    kserve,
    open_inference,
    rerank,
    routers,
    tei,
    tokens,
)
from service.schemas import ClassifyAnswer, ClassifyRequest, LabelScore

DESCRIPTION = """\
Text classification with BERT-family models.

`POST /classify` is a superset of vLLM's endpoint. The same models answer under the paths of Text
Embeddings Inference, Infinity, Hugging Face's Inference API, KServe and Triton, so that their
clients only need this address.

Every answer has `X-Request-Id`, and classifications have `Server-Timing`. An error names the field
and the limit, and never repeats a text.
"""
TAGS: dict[str, str] = {
    "classification": "Texts to labels.",
    "tokens": "Entities in texts, and labels of tokens; for models that label tokens.",
    "reranking": "Documents by how well they answer a query; for models with one label.",
    "compatibility": "The same in the formats of other servers.",
    "models": "What is loaded.",
    "health": "Probes for orchestrators and load balancers.",
    "operation": "Settings in use, and metrics.",
}
"""Groups of the operations, in the order in which they are shown."""
HEALTH_PATHS = re.compile(r"/(livez|readyz|health|v2/health/.+|.*/ready)")

ERROR_DESCRIPTIONS: dict[int | str, str] = {
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
PLAIN_ERROR_PATHS = re.compile(r"/v2(?!/rerank$)(/.*)?$|/v1/models/.+")
# Paths that need no key: health, metrics, and pages that hold no data.
PUBLIC_PATHS = re.compile(
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
    """The request and the answer of a path that classifies, by the names of their schemas."""

    summary: str
    request: str
    answer: str
    error: str = "Error"
    statuses: Mapping[int, int] = field(default_factory=dict)
    """Statuses of ERROR_DESCRIPTIONS that the dialect has another one for."""
    also: tuple[str, str] | None = None
    """Request and answer of another format that the path answers, too."""

    @property
    def requests(self) -> tuple[str, ...]:
        """Names of the schemas of requests."""
        return (self.request,) if self.also is None else (self.request, self.also[0])

    @property
    def answers(self) -> tuple[str, ...]:
        """Names of the schemas of answers."""
        return (self.answer,) if self.also is None else (self.answer, self.also[1])


NATIVE = Operation(
    "Classify a text, a pair, or a list of those", "ClassifyRequest", "ClassifyAnswer"
)
INFINITY = Operation("Classify, as Infinity does", "InfinityRequest", "InfinityAnswer")
SEMANTIC_ROUTER = Operation(
    "Classify, as vLLM semantic-router asks its classifiers",
    "SemanticRouterRequest",
    "SemanticRouterAnswer",
)
ORT_SERVER = Operation("Classify, as ort-server does", "OrtServerRequest", "OrtServerAnswer")
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

RERANK = Operation("Sort documents by their score with a query", "RerankRequest", "RerankAnswer")
RERANK_OR_TEI = Operation(
    "Sort documents by their score with a query; TEI's requests are answered in its format",
    "RerankRequest",
    "RerankAnswer",
    also=("TeiRerankRequest", "TeiRerankAnswer"),
)
RERANK_FOR_TEI = replace(RERANK_OR_TEI, error="TeiError", statuses={500: 424, 504: 424})
TOKENS = Operation(
    "Find entities in texts, by models that label tokens", "TokensRequest", "TokensAnswer"
)
POOLING = Operation(
    "Score the labels of each token, as vLLM does", "PoolingRequest", "PoolingAnswer"
)
SCORE = Operation("Score pairs of texts, as vLLM does", "ScoreRequest", "ScoreAnswer")
RERANKING = (RERANK, RERANK_OR_TEI, RERANK_FOR_TEI, SCORE)

SCHEMAS: dict[str, dict[str, Any]] = {
    "Error": ERROR,
    "PlainError": PLAIN_ERROR,
    "TeiError": tei.ERROR,
    "LabelScore": LabelScore.model_json_schema(),
    "InfinityRequest": infinity.SCHEMA,
    "InfinityAnswer": infinity.ANSWER,
    "SemanticRouterRequest": routers.SEMANTIC_ROUTER,
    "SemanticRouterAnswer": routers.SEMANTIC_ROUTER_ANSWER,
    "OrtServerRequest": routers.ORT_SERVER,
    "OrtServerAnswer": routers.ORT_SERVER_ANSWER,
    "TeiRequest": tei.SCHEMA,
    "TeiAnswer": tei.ANSWER,
    "HuggingFaceRequest": huggingface.SCHEMA,
    "HuggingFaceAnswer": huggingface.ANSWER,
    "KServeRequest": kserve.SCHEMA,
    "KServeAnswer": kserve.ANSWER,
    "OpenInferenceRequest": open_inference.SCHEMA,
    "OpenInferenceAnswer": open_inference.ANSWER,
    "RerankRequest": rerank.RERANK,
    "RerankAnswer": rerank.RERANK_ANSWER,
    "TeiRerankRequest": rerank.TEI_RERANK,
    "TeiRerankAnswer": rerank.TEI_RERANK_ANSWER,
    "TokensRequest": tokens.SCHEMA,
    "TokensAnswer": tokens.ANSWER,
    "PoolingRequest": tokens.POOLING,
    "PoolingAnswer": tokens.POOLING_ANSWER,
    "ScoreRequest": rerank.SCORE,
    "ScoreAnswer": rerank.SCORE_ANSWER,
}


_TEXT = "a charming and often affecting journey"
_SCORES = [
    {"label": "POSITIVE", "score": 0.9830798685095334},
    {"label": "NEGATIVE", "score": 0.01692013149046665},
]
_USAGE = {"prompt_tokens": 10, "total_tokens": 10}
EXAMPLES: dict[str, Any] = {
    "ClassifyRequest": {"input": _TEXT},
    "ClassifyAnswer": {
        "id": "classify-d662724b2fce02c636337dec5e00ad0a",
        "object": "list",
        "created": 1795401449,
        "model": "drbert",
        "data": [
            {
                "index": 0,
                "label": "POSITIVE",
                "score": 0.9830798685095334,
                "probs": [0.01692013149046665, 0.9830798685095334],
                "num_classes": 2,
                "scores": _SCORES,
                "tokens": 10,
                "truncated": False,
            }
        ],
        "usage": {**_USAGE, "completion_tokens": 0},
    },
    "SemanticRouterRequest": {"inputs": _TEXT},
    "SemanticRouterAnswer": _SCORES,
    "OrtServerRequest": {"text": _TEXT},
    "OrtServerAnswer": {"labels": {each["label"]: each["score"] for each in _SCORES}},
    "InfinityRequest": {"input": [_TEXT]},
    "InfinityAnswer": {
        "object": "classify",
        "model": "drbert",
        "usage": _USAGE,
        "id": "infinity-4877af98840113a087c67741c403fc0b",
        "created": 1795401452,
        "data": [_SCORES],
    },
    "TeiRequest": {"inputs": _TEXT},
    "TeiAnswer": _SCORES,
    "HuggingFaceRequest": {"inputs": _TEXT},
    "HuggingFaceAnswer": [_SCORES],
    "KServeRequest": {"instances": [_TEXT]},
    "KServeAnswer": {"predictions": [{each["label"]: each["score"] for each in _SCORES}]},
    "OpenInferenceRequest": {
        "inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": [_TEXT]}]
    },
    "OpenInferenceAnswer": {
        "model_name": "drbert",
        "model_version": "1",
        "id": "a5d69bd60a040b86fd27b29f84b533f8",
        "outputs": [
            {"name": "label", "datatype": "BYTES", "shape": [1], "data": ["POSITIVE"]},
            {"name": "score", "datatype": "FP32", "shape": [1], "data": [0.9830798685095334]},
        ],
    },
    "RerankRequest": {"query": "is it good?", "documents": ["it is", "it rains"]},
    "TeiRerankRequest": {"query": "is it good?", "texts": ["it is", "it rains"]},
    "TokensRequest": {"input": "Ada Lovelace lived in London."},
    "PoolingRequest": {"input": "Ada Lovelace lived in London.", "task": "token_classify"},
    "ScoreRequest": {"queries": "is it good?", "documents": ["it is", "it rains"]},
    "Error": {
        "error": {
            "message": "input[3] is empty.",
            "type": "invalid_request_error",
            "param": "input[3]",
            "code": "invalid_input",
        }
    },
    "PlainError": {"error": "inputs[3] is empty."},
}
"""An example of each schema; those of requests can be sent as they are."""


def operations(classify_dialect: str, root_dialect: str) -> dict[str, Operation]:
    """Return the paths that classify, by the dialects of the settings."""
    return {
        "/classify": {
            "native": NATIVE,
            "infinity": INFINITY,
            "semantic-router": SEMANTIC_ROUTER,
            "ort-server": ORT_SERVER,
        }[classify_dialect],
        "/v1/classify": NATIVE,
        "/predict": TEI,
        "/": TEI if root_dialect == "tei" else HUGGING_FACE,
        "/rerank": RERANK_FOR_TEI if root_dialect == "tei" else RERANK_OR_TEI,
        "/v1/rerank": RERANK,
        "/v2/rerank": RERANK,
        "/tokens": TOKENS,
        "/v1/tokens": TOKENS,
        "/pooling": POOLING,
        "/score": SCORE,
        "/v1/score": SCORE,
        "/models/{model}": HUGGING_FACE,
        "/v1/models/{model}:predict": KSERVE,
        "/v2/models/{model}/infer": OPEN_INFERENCE,
        "/v2/models/{model}/versions/{version}/infer": OPEN_INFERENCE,
    }


def describe(app: FastAPI, classify_dialect: str, root_dialect: str, keyed: bool) -> None:
    """Add the paths that classify to the description of `app`, with their errors.

    `keyed` says that requests need a key.
    """
    used = operations(classify_dialect, root_dialect)
    for path, operation in used.items():
        described = refusals(operation)
        described[200] = {"description": "Answered"} | _json(*operation.answers)
        app.post(
            path,
            summary=operation.summary,
            operation_id=re.sub(r"\W+", "_", path).strip("_") or "root",
            response_model=None,
            responses=described,
            openapi_extra={
                "requestBody": {"required": True, **_json(*operation.requests)},
                "parameters": [
                    {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
                    for name in re.findall(r"{(\w+)}", path)
                ],
            },
        )(documented_only)
    names = {"Error", "PlainError", "LabelScore"}
    for operation in used.values():
        names |= {*operation.requests, *operation.answers, operation.error}
    schemas = {name: schema for name, schema in SCHEMAS.items() if name in names}
    schemas |= _with_parts("ClassifyRequest", ClassifyRequest) | _with_parts(
        "ClassifyAnswer", ClassifyAnswer
    )

    for name, example in EXAMPLES.items():
        if name in schemas:
            schemas[name] = {**schemas[name], "example": example}

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = get_openapi(
                title=app.title,
                version=app.version,
                description=app.description,
                tags=[{"name": name, "description": text} for name, text in TAGS.items()],
                routes=app.routes,
            )
            _complete(app.openapi_schema, schemas, keyed)
            _group(app.openapi_schema, used)
        return app.openapi_schema

    # FastAPI's documentation recommends this assignment.
    app.openapi = openapi  # type: ignore[method-assign]

    @app.get("/openapi.json", include_in_schema=False)
    async def description(request: Request) -> Response:
        prefix = request.scope["state"].get("prefix")
        servers = {"servers": [{"url": prefix}]} if prefix else {}
        return JSONResponse({**openapi(), **servers}, headers={"vary": "x-forwarded-prefix"})


def refusals(operation: Operation) -> dict[int | str, dict[str, Any]]:
    """Return the errors of a path, by status."""
    reasons: dict[int, list[str]] = {}
    for status, reason in ERROR_DESCRIPTIONS.items():
        reasons.setdefault(operation.statuses.get(int(status), int(status)), []).append(reason)
    described: dict[int | str, dict[str, Any]] = {}
    for status, texts in reasons.items():
        # Errors in the HTTP message itself are found before its path is known.
        schemas = {414: ["Error"], 431: ["Error"], 400: [operation.error, "Error"]}
        schemas[408] = schemas[400]
        names = list(dict.fromkeys(schemas.get(status, [operation.error])))
        described[status] = {"description": "; ".join(texts)} | _json(*names)
    return described


async def documented_only(request: Request) -> Response:
    """Refuse a path that FastAPI takes for one that the router answers, such as `/classify\\n`."""
    raise HTTPException(404)


def _json(*names: str) -> dict[str, Any]:
    """Return the OpenAPI content of a JSON message with one of the schemas."""
    schemas = [{"$ref": COMPONENTS.format(model=name)} for name in names]
    schema = schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
    return {"content": {"application/json": {"schema": schema}}}


def _with_parts(
    name: str, model: type[ClassifyRequest | ClassifyAnswer]
) -> dict[str, dict[str, Any]]:
    """Return a model's schema and those of its parts, by name."""
    schema = model.model_json_schema(ref_template=COMPONENTS)
    parts: dict[str, dict[str, Any]] = schema.pop("$defs", {})
    schemas = {name: schema, **parts}
    for each in schemas.values():
        _describe_defaults(each)
    return schemas


def _describe_defaults(schema: dict[str, Any]) -> None:
    """Move the defaults of a schema's properties to their descriptions.

    openapi-typescript takes a property with a default for one that is always there, in requests
    too.
    """
    for field_schema in schema.get("properties", {}).values():
        default = field_schema.pop("default", None)
        if default is not None:
            description = field_schema.get("description", "")
            field_schema["description"] = f"{description} Default: {json.dumps(default)}.".strip()


def _complete(description: dict[str, Any], schemas: dict[str, dict[str, Any]], keyed: bool) -> None:
    """Add the schemas, the error answers and the keys."""
    components = description.setdefault("components", {})
    # They replace FastAPI's own schemas, of errors that this service never returns.
    components["schemas"] = schemas
    for path, methods in description["paths"].items():
        for method, operation in methods.items():
            for status, response in list(operation["responses"].items()):
                if "HTTPValidationError" in str(response):
                    del operation["responses"][status]
                elif int(status) >= 400 and "application/json" not in response.get("content", {}):
                    response |= _json("PlainError" if PLAIN_ERROR_PATHS.match(path) else "Error")
            if keyed and (method == "post" or not PUBLIC_PATHS.match(path)):
                operation["security"] = [{name: []} for name in SCHEMES]
                operation["responses"].setdefault(
                    "401",
                    {"description": ERROR_DESCRIPTIONS[401]}
                    | _json("PlainError" if PLAIN_ERROR_PATHS.match(path) else "Error"),
                )
    if keyed:
        components["securitySchemes"] = SCHEMES


def _tag(operation: Operation) -> str:
    """Return the group of a path that classifies."""
    if operation in RERANKING:
        return "reranking"
    if operation in (TOKENS, POOLING):
        return "tokens"
    return "classification" if operation == NATIVE else "compatibility"


def _group(description: dict[str, Any], used: Mapping[str, Operation]) -> None:
    """Give every operation a tag and a summary, and sort the paths by their tags.

    `used` are the paths that classify.
    """
    order = list(TAGS)
    ranks: dict[str, int] = {}
    for path, methods in description["paths"].items():
        for method, operation in methods.items():
            if method == "post":
                tag = _tag(used[path])
            elif HEALTH_PATHS.fullmatch(path):
                tag = "health"
            elif "models" in path or path == "/v2":
                tag = "models"
            else:
                tag = "operation"
            operation["tags"] = [tag]
            ranks[path] = min(ranks.get(path, len(order)), order.index(tag))
            # FastAPI makes summaries of functions' names; their documentation says more.
            text = operation.get("description", "")
            if method != "post" and text:
                operation["summary"] = text.partition("\n")[0].removesuffix(".")
    description["paths"] = dict(
        sorted(description["paths"].items(), key=lambda item: ranks[item[0]])
    )
