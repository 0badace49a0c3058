"""
Infinity's format: POST /classify if DRBERT_CLASSIFY_DIALECT is `infinity`.

The service's own format then has the path /v1/classify alone.

    {"input": ["good", "bad"], "model": "reviews", "raw_scores": false}
    {"object": "classify", "data": [[{"score": 0.9, "label": "POSITIVE"}, …], …], "model": …,
        "usage": …, "id": …, "created": …}

`raw_scores` returns logits, and the usage counts tokens. An Infinity server ignores the first, and
counts characters.
"""

from __future__ import annotations

import time

import orjson

from service.errors import InvalidInput
from service.http.dialects import JSON, SCORES, Completed, Headers, RawRequest, json_pieces
from service.http.dialects.native import Native
from service.schemas import ClassifyRequest, Limits, known_fields, read_object, read_values

UNSPECIFIED = "default/not-specified"
SCHEMA = {
    "type": "object",
    "required": ["input"],
    "additionalProperties": False,
    "properties": {
        "input": {"type": "array", "minItems": 1, "items": {"type": "string", "minLength": 1}},
        "model": {"type": "string"},
        "raw_scores": {"type": "boolean"},
        "user": {"type": ["string", "null"]},
    },
}
ANSWER = {
    "type": "object",
    "required": ["object", "data", "model", "usage", "id", "created"],
    "properties": {
        "object": {"type": "string", "enum": ["classify"]},
        "data": {"type": "array", "items": SCORES},
        "model": {"type": "string"},
        "usage": {
            "type": "object",
            "required": ["prompt_tokens", "total_tokens"],
            "properties": {
                "prompt_tokens": {"type": "integer"},
                "total_tokens": {"type": "integer"},
            },
        },
        "id": {"type": "string"},
        "created": {"type": "integer"},
    },
}


class Infinity(Native):
    """Infinity's format, on POST /classify if it is configured."""

    def read(self, raw: RawRequest, limits: Limits) -> ClassifyRequest:
        """Return the request of a list of texts in `input`; raises a ServiceError."""
        values = known_fields(
            read_object(raw.body, limits), ("input", "model", "raw_scores", "user")
        )
        raw.state["model"] = values.get("model")
        if not isinstance(values.get("input"), list):
            raise InvalidInput(
                "input must be a list of texts; Infinity's clients never send a single text.",
                param="input",
            )
        raw_scores = values.pop("raw_scores", False)
        if not isinstance(raw_scores, bool):
            raise InvalidInput("raw_scores must be true or false.", param="raw_scores")
        if values.get("model") == UNSPECIFIED:
            del values["model"]
        return read_values(values | {"activation": "none" if raw_scores else "auto"}, limits)

    def write(self, completed: Completed) -> tuple[Headers, list[bytes]]:
        """Return each text's labels with their scores, and the answer's id, model and tokens."""
        tokens = completed.tokens
        head = orjson.dumps(
            {
                "object": "classify",
                "model": completed.model,
                "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
                "id": f"infinity-{completed.raw.request_id}",
                "created": int(time.time()),
            }
        )
        return [JSON], json_pieces(head[:-1] + b',"data":[', completed.scores(), b"]}")
