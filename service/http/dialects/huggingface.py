"""
Hugging Face's Inference API for text classification: POST / and POST /models/NAME.

    {"inputs": "good", "parameters": {"top_k": 2, "function_to_apply": "softmax"}}
    [[{"label": "POSITIVE", "score": 0.9}, …]]
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from service.errors import InvalidInput, ServiceError
from service.http.dialects import (
    JSON,
    SCORES,
    AnyModel,
    Completed,
    Headers,
    RawRequest,
    json_pieces,
    object_field,
    plain_refusal,
)
from service.schemas import ClassifyRequest, Limits, known_fields, read_object, read_values

PARAMETERS = (
    "top_k",
    "function_to_apply",
    "truncation",
    "return_all_scores",
    "padding",
    "max_length",
)
# Options have no effect: nothing is cached, and a model is either loaded or unknown.
OPTIONS = ("use_cache", "wait_for_model")
PADDING = (True, False, "longest", "max_length", "do_not_pad", None)
SCHEMA = {
    "type": "object",
    "required": ["inputs"],
    "additionalProperties": False,
    "properties": {
        "inputs": {
            "anyOf": [
                {"type": "string", "minLength": 1},
                {"type": "array", "minItems": 1, "items": {"type": "string", "minLength": 1}},
            ]
        },
        "parameters": {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                "top_k": {"type": ["integer", "null"], "minimum": 1},
                "function_to_apply": {
                    "anyOf": [
                        {"type": "string", "enum": ["softmax", "sigmoid", "none"]},
                        {"type": "null"},
                    ]
                },
                "truncation": {
                    "anyOf": [
                        {"type": "string", "enum": ["longest_first", "do_not_truncate"]},
                        {"type": ["boolean", "null"]},
                    ]
                },
                "return_all_scores": {"type": ["boolean", "null"]},
                "padding": {
                    "anyOf": [
                        {
                            "type": "string",
                            "enum": [word for word in PADDING if isinstance(word, str)],
                        },
                        {"type": ["boolean", "null"]},
                    ]
                },
                "max_length": {"type": ["integer", "null"], "minimum": 1},
            },
        },
        "options": {
            "type": ["object", "null"],
            "additionalProperties": False,
            "properties": {"use_cache": {}, "wait_for_model": {}},
        },
    },
}
ANSWER = {"type": "array", "items": SCORES}


class HuggingFace(AnyModel):
    """Hugging Face's Inference API for text classification, on POST / and POST /models/NAME."""

    input_field = "inputs"

    def read(self, raw: RawRequest, limits: Limits) -> ClassifyRequest:
        """Return the request of `inputs`, `parameters` and `options`; raises a ServiceError."""
        values = known_fields(read_object(raw.body, limits), ("inputs", "parameters", "options"))
        if "inputs" not in values:
            raise InvalidInput("inputs is missing.", param="inputs")
        parameters = object_field(values, "parameters", PARAMETERS)
        top_k = _top_k(parameters)
        _check_padding(parameters)
        max_tokens = _max_length(parameters)
        truncate = _truncate(parameters.get("truncation"))
        object_field(values, "options", OPTIONS)
        return read_values(
            {
                "input": values["inputs"],
                "model": raw.model,
                "top_k": top_k,
                "activation": parameters.get("function_to_apply") or "auto",
                "truncate": truncate,
                # As in transformers, max_length only applies to texts that may be truncated.
                "truncate_prompt_tokens": None if truncate == "none" else max_tokens,
            },
            limits,
        )

    def write(self, completed: Completed) -> tuple[Headers, list[bytes]]:
        """Return the answer as a list of each text's labels with their scores."""
        return [JSON], json_pieces(b"[", completed.scores(), b"]")

    def refuse(self, error: ServiceError) -> tuple[int, Headers, bytes]:
        """Return an error as `{"error": "…"}`, with Hugging Face's name for the field."""
        if error.param == "truncate_prompt_tokens":
            error.message = error.message.replace(error.param, "parameters.max_length", 1)
        return plain_refusal(error)


def _top_k(parameters: Mapping[str, Any]) -> object:
    """Return how many labels are wanted.

    `return_all_scores` is the transformers pipeline's older name: false means a top_k of 1.
    """
    all_scores = parameters.get("return_all_scores")
    if not isinstance(all_scores, bool | None):
        raise InvalidInput(
            "parameters.return_all_scores must be true, false or null.",
            param="parameters.return_all_scores",
        )
    top_k = parameters.get("top_k")
    return 1 if top_k is None and all_scores is False else top_k


def _check_padding(parameters: Mapping[str, Any]) -> None:
    if parameters.get("padding") not in PADDING:
        raise InvalidInput(
            "parameters.padding must be true, false, longest, max_length or do_not_pad; it does not"
            " change the answer.",
            param="parameters.padding",
        )


def _max_length(parameters: Mapping[str, Any]) -> int | None:
    """Return the maximum number of tokens of a text."""
    tokens = parameters.get("max_length")
    if tokens is None:
        return None
    if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1:
        raise InvalidInput(
            "parameters.max_length must be a number of tokens, 1 or more, or null.",
            param="parameters.max_length",
        )
    return tokens


def _truncate(truncation: object) -> str | None:
    """Return `truncate` of our own format: None for the tokenizer's own side, or `none`."""
    if truncation is None or truncation is True or truncation == "longest_first":
        return None
    if truncation is False or truncation == "do_not_truncate":
        return "none"
    raise InvalidInput(
        "parameters.truncation must be true, false, longest_first or do_not_truncate.",
        param="parameters.truncation",
    )
