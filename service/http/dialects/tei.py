"""
Text Embeddings Inference's POST /predict.

    {"inputs": "good"}                          one text       [{"score": 0.9, "label": "POSITIVE"},
                                                               …]
    {"inputs": ["is it good?", "it is"]}        one pair       the same: a flat list of two is a
                                                               pair there
    {"inputs": [["good"], ["a", "b"]]}          a batch        a list of those

The activation is the model's own, also for several labels, where TEI takes the softmax whatever the
model says.
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


class Tei:
    def read(self, raw: RawRequest, limits: Limits) -> ClassifyRequest:
        values = read_object(raw.body, limits)
        if "parameters" in values and _is_empty(values["parameters"]):
            del values["parameters"]
        known_fields(values, ("inputs", "truncate", "truncation_direction", "raw_scores"))
        if "inputs" not in values:
            raise InvalidInput("inputs is missing.", param="inputs")
        direction = values.get("truncation_direction", "Right")
        if not isinstance(direction, str) or direction not in DIRECTIONS:
            raise InvalidInput(
                "truncation_direction must be Right or Left.", param="truncation_direction"
            )
        for name in ("truncate", "raw_scores"):
            if not isinstance(values.get(name), bool | None):
                raise InvalidInput(f"{name} must be true, false or null.", param=name)
        raw.state["batch"] = is_batch(values["inputs"])
        truncate = "none" if values.get("truncate") is False else DIRECTIONS[direction]
        return read_values(
            {
                "input": texts_of(values["inputs"]),
                "truncate": truncate,
                "activation": "none" if values.get("raw_scores") else "auto",
                "model": raw.model,
            },
            limits,
        )

    def write(self, completed: Completed) -> tuple[Headers, list[bytes]]:
        data = (completed.classification(i)["scores"] for i in range(len(completed.results)))
        before, after = (b"[", b"]") if completed.raw.state["batch"] else (b"", b"")
        return [JSON, *_times(completed)], json_pieces(before, data, after)

    def refuse(self, error: ServiceError) -> tuple[int, Headers, bytes]:
        return (
            (424 if _kind(error) == "Backend" else int(error.status)),
            [JSON, *retry_after(error)],
            orjson.dumps({"error": error.message, "error_type": _kind(error)}),
        )


def _is_empty(parameters: object) -> bool:
    """Whether Hugging Face's `parameters` ask for nothing: its client sends them to every path that
    it is given.
    """
    return parameters is None or (
        isinstance(parameters, dict) and all(value is None for value in parameters.values())
    )


def is_batch(inputs: object) -> bool:
    return isinstance(inputs, list) and any(isinstance(item, list) for item in inputs)


def texts_of(inputs: object) -> Any:
    """Our own input: a text, an object for a pair, or a list of those; InvalidInput names the item
    that is neither.
    """
    return (
        [_one(item, f"inputs[{i}]") for i, item in enumerate(inputs)]
        if is_batch(inputs) and isinstance(inputs, list)
        else _one(inputs, "inputs")
    )


def _one(value: object, where: str) -> Any:
    if isinstance(value, str):
        return value
    if (
        isinstance(value, list)
        and 1 <= len(value) <= 2
        and all(isinstance(half, str) for half in value)
    ):
        return value[0] if len(value) == 1 else {"text": value[0], "text_pair": value[1]}
    raise InvalidInput(
        f"{where} must be a text, or a list of one text or of a pair's two.", param=where
    )


def _kind(error: ServiceError) -> str:
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


def _times(completed: Completed) -> Headers:
    """TEI's headers, whole milliseconds each; Server-Timing has the digits."""
    slowest = max(completed.results, key=lambda row: row.queue_ns + row.inference_ns)
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
