"""
Text Embeddings Inference (TEI): POST /predict, and POST / if DRBERT_ROOT_DIALECT is `tei`.

    {"inputs": "good"}                       one text     [{"score": 0.9, "label": "POSITIVE"}, …]
    {"inputs": ["is it good?", "it is"]}     one pair     the same
    {"inputs": [["good"], ["a", "b"]]}       a batch      a list of those

The activation is the model's own, also for a model of several labels. TEI always applies softmax.
"""

from __future__ import annotations

from typing import Any

import orjson

from service.errors import (
    InvalidInput,
    InvalidJson,
    ModelFailed,
    ModelOutputInvalid,
    NotReady,
    Overloaded,
    ServiceError,
    ShuttingDown,
)
from service.http.dialects import (
    JSON,
    SCORES,
    Completed,
    Headers,
    RawRequest,
    WholeTexts,
    json_pieces,
    retry_after,
)
from service.schemas import ClassifyRequest, Limits, known_fields, read_object, read_values

SCHEMA = {
    "type": "object",
    "required": ["inputs"],
    "additionalProperties": False,
    "properties": {
        "inputs": {
            "anyOf": [
                {"type": "string", "minLength": 1},
                {
                    "type": "array",
                    "minItems": 1,
                    "maxItems": 2,
                    "items": {"type": "string", "minLength": 1},
                },
                {
                    "type": "array",
                    "minItems": 1,
                    "items": {
                        "type": "array",
                        "minItems": 1,
                        "maxItems": 2,
                        "items": {"type": "string", "minLength": 1},
                    },
                },
            ]
        },
        "truncate": {"type": ["boolean", "null"]},
        "raw_scores": {"type": ["boolean", "null"]},
        "truncation_direction": {"type": "string", "enum": ["Right", "Left"]},
        "parameters": {"type": ["object", "null"], "additionalProperties": {"type": "null"}},
    },
}
ANSWER = {"anyOf": [SCORES, {"type": "array", "items": SCORES}]}
ERROR = {
    "type": "object",
    "required": ["error", "error_type"],
    "properties": {
        "error": {"type": "string"},
        "error_type": {"enum": ["Overloaded", "Backend", "Unhealthy", "Validation"]},
    },
}
DIRECTIONS = {"Right": "right", "Left": "left", "right": "right", "left": "left"}


class Tei(WholeTexts):
    """Text Embeddings Inference's format, on POST /predict."""

    input_field = "inputs"

    def read(self, raw: RawRequest, limits: Limits) -> ClassifyRequest:
        """Return the request of `inputs` and how to truncate them; raises a ServiceError."""
        values = read_object(raw.body, limits)
        if "parameters" in values and _is_empty(values["parameters"]):
            del values["parameters"]
        known_fields(values, ("inputs", "truncate", "truncation_direction", "raw_scores"))
        if "inputs" not in values:
            raise InvalidInput("inputs is missing.", param="inputs")
        direction = read_direction(values)
        for name in ("truncate", "raw_scores"):
            if not isinstance(values.get(name), bool | None):
                raise InvalidInput(f"{name} must be true, false or null.", param=name)
        raw.state["batch"] = is_batch(values["inputs"])
        truncate = "none" if values.get("truncate") is False else direction
        return read_values(
            {
                "input": read_inputs(values["inputs"]),
                "truncate": truncate,
                "activation": "none" if values.get("raw_scores") else "auto",
                "model": raw.model,
            },
            limits,
        )

    def write(self, completed: Completed) -> tuple[Headers, list[bytes]]:
        """Return one text's labels with their scores, or a list of those for a batch."""
        before, after = (b"[", b"]") if completed.raw.state["batch"] else (b"", b"")
        return [JSON, *self.headers(completed)], json_pieces(before, completed.scores(), after)

    def headers(self, completed: Completed) -> Headers:
        """Return TEI's headers of an answer."""
        return _compute_headers(completed)

    def refuse(self, error: ServiceError) -> tuple[int, Headers, bytes]:
        """Return an error with TEI's error type; a failed model has the status 424."""
        error_type = _error_type(error)
        return (
            424 if error_type == "Backend" else int(error.status),
            [JSON, *retry_after(error)],
            orjson.dumps({"error": error.message, "error_type": error_type}),
        )


def read_direction(values: dict[str, Any]) -> str:
    """Return the side on which a long text is cut, in our own terms."""
    direction = values.get("truncation_direction", "Right")
    if not isinstance(direction, str) or direction not in DIRECTIONS:
        raise InvalidInput(
            "truncation_direction must be Right or Left.", param="truncation_direction"
        )
    return DIRECTIONS[direction]


def _is_empty(parameters: object) -> bool:
    """Return whether Hugging Face's `parameters` set nothing.

    Hugging Face's client sends them to every server, also to this path.
    """
    return parameters is None or (
        isinstance(parameters, dict) and all(value is None for value in parameters.values())
    )


def is_batch(inputs: object) -> bool:
    """Return whether `inputs` is a list of texts or pairs; a flat list is one text or pair."""
    return isinstance(inputs, list) and any(isinstance(item, list) for item in inputs)


def read_inputs(inputs: object) -> Any:
    """Return `input` of our own format: a text, an object for a pair, or a list of those.

    Raises InvalidInput that names the item that is neither a text nor a pair.
    """
    if isinstance(inputs, list) and is_batch(inputs):
        return [_text_or_pair(item, f"inputs[{i}]") for i, item in enumerate(inputs)]
    return _text_or_pair(inputs, "inputs")


def _text_or_pair(value: object, field: str) -> Any:
    if isinstance(value, str):
        return value
    if (
        isinstance(value, list)
        and 1 <= len(value) <= 2
        and all(isinstance(half, str) for half in value)
    ):
        return value[0] if len(value) == 1 else {"text": value[0], "text_pair": value[1]}
    raise InvalidInput(
        f"{field} must be a text, or a list of one text, or of the two texts of a pair.",
        param=field,
    )


def _error_type(error: ServiceError) -> str:
    match error:
        case Overloaded():
            return "Overloaded"
        case ModelFailed() | ModelOutputInvalid():
            return "Backend"
        case NotReady() | ShuttingDown():
            return "Unhealthy"
        case InvalidJson() | InvalidInput():
            return "Validation"
        case _:
            return "Validation" if error.status < 500 else "Backend"


def _compute_headers(completed: Completed) -> Headers:
    """Return TEI's headers: counts, and times in whole milliseconds.

    Server-Timing holds the same times to the nanosecond.
    """
    slowest = max(completed.results, key=lambda result: result.queue_ns + result.inference_ns)
    times = {
        "total": completed.elapsed_ns,
        "tokenization": completed.tokenize_ns,
        "queue": slowest.queue_ns,
        "inference": slowest.inference_ns,
    }
    characters = sum([len(text.text) + len(text.pair or "") for text in completed.request.input])
    facts = {
        "type": "gpu+optimized" if completed.is_on_gpu else "cpu",
        "time": str(round(completed.elapsed_ns / 1e6)),
        "characters": str(characters),
        "tokens": str(completed.tokens),
    }
    return [(f"x-compute-{name}".encode(), value.encode()) for name, value in facts.items()] + [
        (f"x-{name}-time".encode(), str(round(ns / 1e6)).encode()) for name, ns in times.items()
    ]
