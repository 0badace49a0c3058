"""
Hugging Face's Inference API for classification: POST / and POST /models/NAME.

    {"inputs": "good", "parameters": {"top_k": 2, "function_to_apply": "softmax"}}
    [[{"label": "POSITIVE", "score": 0.9}, …]]

With candidate labels it is zero-shot classification, and one text is answered without the outer
list:

    {"inputs": "good", "parameters": {"candidate_labels": ["praise", "blame"]}}
    [{"label": "praise", "score": 0.9}, …]

By a model that labels tokens it is token classification:

    {"inputs": "Ada lives in Paris", "parameters": {"aggregation_strategy": "first"}}
    [{"entity_group": "PER", "score": 0.9, "word": "Ada", "start": 0, "end": 3}, …]
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import orjson

from service.artifact import Manifest
from service.errors import InvalidInput, ServiceError, TooLarge
from service.http.dialects import (
    JSON,
    SCORES,
    Completed,
    Headers,
    RawRequest,
    json_pieces,
    object_field,
    plain_refusal,
)
from service.http.dialects.tokens import read_labelling
from service.requests.entities import STRATEGIES, Entity
from service.schemas import ClassifyRequest, Limits, known_fields, read_object, read_values

PARAMETERS = (
    "top_k",
    "function_to_apply",
    "truncation",
    "return_all_scores",
    "padding",
    "max_length",
)
ZERO_SHOT = {
    "candidate_labels": "labels",
    "hypothesis_template": "hypothesis_template",
    "multi_label": "multi_label",
}
"""Parameters of zero-shot classification, and their names in our own format."""
TOKENS = ("aggregation_strategy", "ignore_labels", "stride")
"""Parameters of token classification."""
OF_TEXTS = ("top_k", "function_to_apply", "return_all_scores")
"""Parameters that have no meaning for tokens."""
# Options have no effect: nothing is cached, and a model is either loaded or unknown.
OPTIONS = ("use_cache", "wait_for_model")
PADDING = (True, False, "longest", "max_length", "do_not_pad", None)
READS_FORMER_ANSWER = re.compile(rb"hf_hub/(0\.|1\.0\.|1\.1\.[0-4]\b)")
"""Matches the User-Agent of releases of huggingface_hub that read `labels` and `scores` of a
zero-shot classification.
"""
PARAMETER_NAMES = {ours: name for name, ours in ZERO_SHOT.items()} | {
    "truncate_prompt_tokens": "max_length",
    "activation": "function_to_apply",
}
"""Hugging Face's names of fields of our own format."""
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
                "candidate_labels": {
                    "anyOf": [
                        {"type": "array", "minItems": 1, "items": {"type": "string"}},
                        {"type": "string", "description": "Labels with commas between them."},
                        {"type": "null"},
                    ],
                    "description": "Zero-shot: the labels by which the texts are judged.",
                },
                "hypothesis_template": {"type": ["string", "null"]},
                "multi_label": {"type": ["boolean", "null"]},
                "aggregation_strategy": {
                    "anyOf": [{"type": "string", "enum": list(STRATEGIES)}, {"type": "null"}],
                    "description": "Models that label tokens: how tokens become entities.",
                },
                "ignore_labels": {
                    "anyOf": [{"type": "array", "items": {"type": "string"}}, {"type": "null"}],
                    "description": "Models that label tokens: labels to leave out.",
                },
                "stride": {
                    "type": ["integer", "null"],
                    "minimum": 0,
                    "description": (
                        "Models that label tokens: reads a long text by windows that share so many"
                        " tokens."
                    ),
                },
            },
        },
        "options": {
            "type": ["object", "null"],
            "additionalProperties": False,
            "properties": {"use_cache": {}, "wait_for_model": {}},
        },
    },
}
ENTITIES = {
    "type": "array",
    "items": {
        "type": "object",
        "required": ["score", "word", "start", "end"],
        "properties": {
            "entity_group": {"type": "string"},
            "entity": {"type": "string", "description": "With aggregation_strategy none."},
            "index": {"type": "integer", "description": "With aggregation_strategy none."},
            "score": {"type": "number"},
            "word": {"type": "string"},
            "start": {"type": "integer"},
            "end": {"type": "integer"},
        },
    },
}
ANSWER = {
    "anyOf": [
        {"type": "array", "items": SCORES},
        SCORES,
        ENTITIES,
        {"type": "array", "items": ENTITIES},
    ]
}


class HuggingFace:
    """Hugging Face's Inference API for classification, on POST / and POST /models/NAME."""

    input_field = "inputs"

    def check(self, manifest: Manifest, raw: RawRequest) -> None:
        """Raise InvalidInput for a parameter of another task than the model's."""
        kind = "labels tokens" if manifest.labels_tokens else "classifies whole texts"
        foreign = OF_TEXTS if manifest.labels_tokens else TOKENS
        for name in raw.state["parameters"]:
            if name in foreign:
                raise InvalidInput(
                    f"parameters.{name} has no meaning here: the model {kind}.",
                    param=f"parameters.{name}",
                )

    def read(self, raw: RawRequest, limits: Limits) -> ClassifyRequest:
        """Return the request of `inputs`, `parameters` and `options`; raises a ServiceError."""
        values = known_fields(read_object(raw.body, limits), ("inputs", "parameters", "options"))
        if "inputs" not in values:
            raise InvalidInput("inputs is missing.", param="inputs")
        parameters = object_field(values, "parameters", (*PARAMETERS, *ZERO_SHOT, *TOKENS))
        top_k = _top_k(parameters)
        _check_padding(parameters)
        max_tokens = _max_length(parameters)
        truncate = _truncate(parameters.get("truncation"))
        object_field(values, "options", OPTIONS)
        raw.state["inputs_are_listed"] = isinstance(values["inputs"], list)
        raw.state["parameters"] = [name for name, value in parameters.items() if value is not None]
        raw.state["labelling"] = read_labelling(
            parameters, "aggregation_strategy", "ignore_labels", "simple", prefix="parameters."
        )
        stride = _stride(parameters)
        about_labels = {ours: parameters.get(name) for name, ours in ZERO_SHOT.items()}
        if isinstance(names := about_labels["labels"], str):
            about_labels["labels"] = _split(names, limits.texts)
        return read_values(
            {
                "input": values["inputs"],
                "model": raw.model,
                "top_k": top_k,
                "activation": parameters.get("function_to_apply") or "auto",
                "truncate": truncate,
                # As in transformers, max_length only applies to texts that may be truncated.
                "truncate_prompt_tokens": None if truncate == "none" else max_tokens,
                "window": None if stride is None else {"stride": stride},
                **about_labels,
            },
            limits,
        )

    def write(self, completed: Completed) -> tuple[Headers, list[bytes]]:
        """Return the answer as a list of each text's labels with their scores, or of entities."""
        if completed.manifest.labels_tokens:
            texts = (
                [_entity(entity) for entity in entities]
                for entities in completed.entities(completed.raw.state["labelling"])
            )
            is_listed = completed.raw.state["inputs_are_listed"]
            before, after = (b"[", b"]") if is_listed else (b"", b"")
            return [JSON], json_pieces(before, texts, after)
        if completed.request.question is not None and not completed.raw.state["inputs_are_listed"]:
            [scores] = completed.scores()
            if READS_FORMER_ANSWER.search(completed.raw.headers.get(b"user-agent", b"")):
                former = {
                    "sequence": completed.request.input[0].text,
                    "labels": [each["label"] for each in scores],
                    "scores": [each["score"] for each in scores],
                }
                return [JSON], [orjson.dumps(former)]
            return [JSON], [orjson.dumps(scores)]
        return [JSON], json_pieces(b"[", completed.scores(), b"]")

    def refuse(self, error: ServiceError) -> tuple[int, Headers, bytes]:
        """Return an error as `{"error": "…"}`, with Hugging Face's name for the field."""
        if error.param == "window.stride":
            error.message = error.message.replace("window.stride", "parameters.stride", 1)
        name = re.split(r"\W", error.param or "", maxsplit=1)[0]
        if name in PARAMETER_NAMES:
            error.message = error.message.replace(name, f"parameters.{PARAMETER_NAMES[name]}", 1)
        return plain_refusal(error)


def _stride(parameters: Mapping[str, Any]) -> int | None:
    """Return how many tokens windows share; None if the text is not read by windows."""
    stride = parameters.get("stride")
    if stride is None:
        return None
    if not isinstance(stride, int) or isinstance(stride, bool) or stride < 0:
        raise InvalidInput(
            "parameters.stride must be a number of tokens, 0 or more, or null.",
            param="parameters.stride",
        )
    for other in ("max_length", "candidate_labels"):
        if parameters.get(other) is not None:
            raise InvalidInput(
                f"parameters.stride and parameters.{other} do not go together; leave one of them"
                " out.",
                param="parameters.stride",
            )
    if _truncate(parameters.get("truncation")) == "none":
        raise InvalidInput(
            "parameters.stride reads a text to its end, so it is not truncated; leave out"
            " parameters.truncation.",
            param="parameters.stride",
        )
    return stride


def _entity(entity: Entity) -> dict[str, Any]:
    """Return an entity as transformers' pipeline does."""
    if entity.index is None:
        described: dict[str, Any] = {"entity_group": entity.label}
    else:
        described = {"entity": entity.label, "index": entity.index}
    return described | {
        "score": entity.score,
        "word": entity.word,
        "start": entity.start,
        "end": entity.end,
    }


def _split(names: str, most: int) -> list[str]:
    """Return labels that have commas between them, as transformers' pipeline does."""
    if names.count(",") >= most:
        raise TooLarge(
            f"labels holds {names.count(',') + 1} labels, the limit is {most}.", param="labels"
        )
    return [name.strip() for name in names.split(",") if name.strip()]


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
