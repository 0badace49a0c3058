"""
Hugging Face's Inference API for text classification: POST / and POST /models/NAME.

    {"inputs": "good", "parameters": {"top_k": 2, "function_to_apply": "softmax"}}      [[{"label":
        "POSITIVE", "score": 0.9}, …]]
"""

from __future__ import annotations

from service.errors import InvalidInput, ServiceError
from service.http.dialects import (
    JSON,
    SCORES,
    Completed,
    Headers,
    RawRequest,
    json_pieces,
    plain_refusal,
)
from service.schemas import ClassifyRequest, Limits, known_fields, read_object, read_values

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


class HuggingFace:
    def read(self, raw: RawRequest, limits: Limits) -> ClassifyRequest:
        values = known_fields(read_object(raw.body, limits), ("inputs", "parameters", "options"))
        if "inputs" not in values:
            raise InvalidInput("inputs is missing.", param="inputs")
        parameters = values.get("parameters") or {}
        if not isinstance(parameters, dict):
            raise InvalidInput("parameters must be an object.", param="parameters")
        known_fields(
            parameters,
            (
                "top_k",
                "function_to_apply",
                "truncation",
                "return_all_scores",
                "padding",
                "max_length",
            ),
            "parameters.",
        )
        if not isinstance(every := parameters.get("return_all_scores"), bool | None):
            raise InvalidInput(
                "parameters.return_all_scores must be true, false or null.",
                param="parameters.return_all_scores",
            )
        if parameters.get("padding") not in PADDING:
            raise InvalidInput(
                "parameters.padding must be true, false, longest, max_length or do_not_pad; it"
                " changes no answer.",
                param="parameters.padding",
            )
        if not (
            isinstance(most := parameters.get("max_length"), int | None)
            and not isinstance(most, bool)
            and (most is None or most > 0)
        ):
            raise InvalidInput(
                "parameters.max_length must be a number of tokens, 1 or more, or null.",
                param="parameters.max_length",
            )
        truncate = _truncate(parameters.get("truncation"))
        # How texts are padded changes no answer. return_all_scores is the pipeline's older word for
        # top_k: false is 1.
        options = values.get("options") or {}
        if not isinstance(options, dict):
            raise InvalidInput("options must be an object.", param="options")
        # Nothing is cached here, and whoever asks is completed by a loaded model or refused.
        known_fields(options, ("use_cache", "wait_for_model"), "options.")
        return read_values(
            {
                "input": values["inputs"],
                "model": raw.model,
                "top_k": (
                    1
                    if every is False and parameters.get("top_k") is None
                    else parameters.get("top_k")
                ),
                "activation": parameters.get("function_to_apply") or "auto",
                "truncate": truncate,
                "truncate_prompt_tokens": (
                    None if truncate == "none" else most
                ),  # max_length is heeded by what cuts, as in transformers.
            },
            limits,
        )

    def write(self, completed: Completed) -> tuple[Headers, list[bytes]]:
        return [JSON], json_pieces(
            b"[",
            (completed.classification(i)["scores"] for i in range(len(completed.results))),
            b"]",
        )

    def refuse(self, error: ServiceError) -> tuple[int, Headers, bytes]:
        if error.param == "truncate_prompt_tokens":
            error.message = error.message.replace(error.param, "parameters.max_length", 1)
        return plain_refusal(error)


def _truncate(truncation: object) -> str | None:
    """Our own word for it; None is the checkpoint's own side."""
    if truncation is None or truncation is True or truncation == "longest_first":
        return None
    if truncation is False or truncation == "do_not_truncate":
        return "none"
    raise InvalidInput(
        "parameters.truncation must be true, false, longest_first or do_not_truncate.",
        param="parameters.truncation",
    )
