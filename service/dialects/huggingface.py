"""
Hugging Face's Inference API for text classification: POST / and POST /models/NAME.

    {"inputs": "good", "parameters": {"top_k": 2, "function_to_apply": "softmax"}}      [[{"label": "POSITIVE", "score": 0.9}, …]]
"""

from __future__ import annotations

from service.dialects import JSON, Answered, Called, Headers, in_pieces, plain_refusal
from service.errors import InvalidInput, ServiceError
from service.schemas import ClassifyRequest, Limits, known_fields, read_object, read_values

SCHEMA = {
    "type": "object", "required": ["inputs"], "additionalProperties": False, "properties": {
        "inputs": {"anyOf": [{"type": "string", "minLength": 1}, {"type": "array", "minItems": 1, "items": {"type": "string", "minLength": 1}}]},
        "parameters": {"type": "object", "additionalProperties": False, "properties": {
            "top_k": {"type": ["integer", "null"], "minimum": 1}, "function_to_apply": {"enum": ["softmax", "sigmoid", "none", None]},
            "truncation": {"enum": [True, False, "longest_first", "do_not_truncate", None]},
        }},
        "options": {"type": ["object", "null"], "additionalProperties": False, "properties": {"use_cache": {}, "wait_for_model": {}}},
    },
}


class HuggingFace:
    def read(self, called: Called, limits: Limits) -> ClassifyRequest:
        values = known_fields(read_object(called.body, limits), ("inputs", "parameters", "options"))
        if "inputs" not in values:
            raise InvalidInput("inputs is missing.", param="inputs")
        parameters = values.get("parameters") or {}
        if not isinstance(parameters, dict):
            raise InvalidInput("parameters must be an object.", param="parameters")
        known_fields(parameters, ("top_k", "function_to_apply", "truncation"), "parameters.")
        options = values.get("options") or {}
        if not isinstance(options, dict):
            raise InvalidInput("options must be an object.", param="options")
        # Nothing is cached here, and whoever asks is answered by a loaded model or refused.
        known_fields(options, ("use_cache", "wait_for_model"), "options.")
        return read_values({
            "input": values["inputs"], "model": called.model, "top_k": parameters.get("top_k"),
            "activation": parameters.get("function_to_apply") or "auto", "truncate": _truncate(parameters.get("truncation")),
        }, limits)

    def write(self, answered: Answered) -> tuple[Headers, list[bytes]]:
        return [JSON], in_pieces(b"[", (answered.classification(i)["scores"] for i in range(len(answered.rows))), b"]")

    def refuse(self, error: ServiceError) -> tuple[int, Headers, bytes]:
        return plain_refusal(error)


def _truncate(truncation: object) -> str:
    """Our own word for it."""
    if truncation is None or truncation is True or truncation == "longest_first":
        return "right"
    if truncation is False or truncation == "do_not_truncate":
        return "none"
    raise InvalidInput("parameters.truncation must be true, false, longest_first or do_not_truncate.", param="parameters.truncation")
