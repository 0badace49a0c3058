"""
Labels of tokens, such as names and places, by models that label tokens.

    POST /tokens   our own format: {"input": "Ada lives in Paris", "aggregation": "first"}
                   {…, "data": [{"index": 0, "entities": [{"label": "PER", "text": "Ada", …}], …}]}
    POST /pooling  vLLM's with the task token_classify: the probabilities of every token's labels

Hugging Face's format is in huggingface.py. Characters are counted as Python does, by code points.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from service.artifact import Manifest
from service.errors import InvalidInput, ServiceError
from service.http.dialects import (
    Completed,
    Headers,
    RawRequest,
    list_pieces,
    list_schema,
    own_refusal,
)
from service.requests.entities import OUTSIDE, STRATEGIES, Entity, Labelling, probabilities
from service.schemas import ClassifyRequest, Limits, known_fields, read_object, read_values

TEXT = {"type": "string", "minLength": 1}
INPUT = {"anyOf": [TEXT, {"type": "array", "minItems": 1, "items": TEXT}]}
PASSED_ON = ("truncate", "truncate_prompt_tokens", "request_id", "user")
"""Fields that mean the same in POST /classify."""
FIELDS: dict[str, Any] = {
    "input": INPUT,
    "model": {"type": ["string", "null"]},
    "aggregation": {
        "anyOf": [{"type": "string", "enum": list(STRATEGIES)}, {"type": "null"}],
        "description": (
            "How tokens become entities, as in the token-classification pipeline of transformers:"
            " none, every token by itself; simple, by the label of each token; first, average or"
            " max decide for whole words. Default: simple."
        ),
    },
    "ignore_labels": {
        "type": ["array", "null"],
        "items": {"type": "string"},
        "description": "Labels that the answer leaves out. Default: O.",
    },
    "window": {
        "type": ["object", "null"],
        "additionalProperties": False,
        "properties": {"stride": {"type": ["integer", "null"], "minimum": 0}},
        "description": (
            "Reads a long text to its end, by windows that share `stride` tokens. Entities may"
            " reach over several windows."
        ),
    },
    "truncate": {"anyOf": [{"enum": ["right", "left", "none"]}, {"type": "null"}]},
    "truncate_prompt_tokens": {"type": ["integer", "null"]},
    "request_id": {"type": ["string", "null"], "maxLength": 128},
    "user": {"type": ["string", "null"]},
}
SCHEMA = {
    "type": "object",
    "required": ["input"],
    "additionalProperties": False,
    "properties": FIELDS,
}
ENTITY = {
    "type": "object",
    "required": ["label", "score", "text", "start", "end"],
    "properties": {
        "label": {"type": "string"},
        "score": {"type": "number"},
        "text": {"type": "string", "description": "The part of the text, as it was sent."},
        "start": {"type": "integer", "description": "Its first character."},
        "end": {"type": "integer", "description": "The character after its last one."},
        "index": {"type": "integer", "description": "With aggregation none: the token's index."},
    },
}
ANSWER = list_schema(
    {
        "type": "object",
        "required": ["index", "entities", "tokens", "truncated"],
        "properties": {
            "index": {"type": "integer"},
            "entities": {"type": "array", "items": ENTITY},
            "tokens": {"type": "integer"},
            "truncated": {"type": "boolean"},
            "windows": {"type": "integer"},
            "cached": {"type": "boolean"},
        },
    }
)
POOLING_TASKS = ("token_classify", "token-classify")
POOLING_FIELDS: dict[str, Any] = {
    "model": {"type": ["string", "null"]},
    "input": INPUT,
    "task": {"type": ["string", "null"], "enum": [*POOLING_TASKS, None]},
    "use_activation": {"type": ["boolean", "null"], "description": "False: logits."},
    "activation": {"type": ["boolean", "null"], "description": "Its former name."},
    "encoding_format": {"type": ["string", "null"], "enum": ["float", None]},
    "truncate_prompt_tokens": {"type": ["integer", "null"]},
    "user": {"type": ["string", "null"]},
}
POOLING = {
    "type": "object",
    "required": ["input"],
    "additionalProperties": False,
    "properties": POOLING_FIELDS,
}
POOLING_ANSWER = list_schema(
    {
        "type": "object",
        "required": ["index", "object", "data"],
        "properties": {
            "index": {"type": "integer"},
            "object": {"const": "pooling"},
            "data": {"type": "array", "items": {"type": "array", "items": {"type": "number"}}},
        },
    }
)


class TokenLabelsOnly:
    """A format in which only models answer that label tokens."""

    def check(self, manifest: Manifest, raw: RawRequest) -> None:
        """Raise InvalidInput unless the model labels tokens."""
        if not manifest.labels_tokens:
            raise InvalidInput(
                "The model classifies whole texts, and does not label tokens; ask POST /classify."
                " /info lists the tasks of each model.",
                param="model",
            )


class Tokens(TokenLabelsOnly):
    """Our own format of POST /tokens."""

    input_field = "input"

    def read(self, raw: RawRequest, limits: Limits) -> ClassifyRequest:
        """Return the request of `input`; raises a ServiceError that names the field."""
        values = known_fields(read_object(raw.body, limits), FIELDS)
        raw.state["model"] = values.get("model")
        raw.state["labelling"] = read_labelling(
            values, "aggregation", "ignore_labels", default="simple"
        )
        request = {name: values[name] for name in PASSED_ON if values.get(name) is not None}
        if (window := values.get("window")) is not None:
            if not isinstance(window, dict):
                raise InvalidInput("window must be an object.", param="window")
            request["window"] = known_fields(window, ("stride",), "window.")
        return read_values(
            request | {"input": single_texts(values, "input"), "model": values.get("model")},
            limits,
        )

    def write(self, completed: Completed) -> tuple[Headers, list[bytes]]:
        """Return the entities of each text."""
        request_id = completed.request.request_id or f"tokens-{completed.raw.request_id}"
        return list_pieces(completed, request_id, self._items(completed))

    def _items(self, completed: Completed) -> Iterator[dict[str, Any]]:
        labelling = completed.raw.state["labelling"]
        for index, entities in enumerate(completed.entities(labelling)):
            text, encoded = completed.request.input[index].text, completed.encoded[index]
            item = {
                "index": index,
                "entities": [_own_entity(entity, text) for entity in entities],
                "tokens": encoded.tokens,
                "truncated": encoded.truncated,
            }
            if completed.request.window is not None:
                item["windows"] = encoded.windows
            if completed.results[index].cached:
                item["cached"] = True
            yield item

    def refuse(self, error: ServiceError) -> tuple[int, Headers, bytes]:
        """Return an error as an object with message, type, param and code, as OpenAI's API does."""
        return own_refusal(error)


class Pooling(TokenLabelsOnly):
    """vLLM's format of POST /pooling with the task token_classify."""

    input_field = "input"

    def read(self, raw: RawRequest, limits: Limits) -> ClassifyRequest:
        """Return the request of `input`; raises a ServiceError that names the field."""
        values = known_fields(read_object(raw.body, limits), POOLING_FIELDS)
        raw.state["model"] = values.get("model")
        task = values.get("task")
        if task is not None and task not in POOLING_TASKS:
            raise InvalidInput(
                "task must be token_classify; other poolings are not supported.", param="task"
            )
        if values.get("encoding_format") not in (None, "float"):
            raise InvalidInput("encoding_format must be float.", param="encoding_format")
        flags = [values.get(name) for name in ("use_activation", "activation")]
        for name, flag in zip(("use_activation", "activation"), flags, strict=True):
            if not isinstance(flag, bool | None):
                raise InvalidInput(f"{name} must be true, false or null.", param=name)
        raw.state["logits"] = False in flags
        request = {"input": single_texts(values, "input"), "model": values.get("model")}
        for name in ("truncate_prompt_tokens", "user"):
            if values.get(name) is not None:
                request[name] = values[name]
        return read_values(request, limits)

    def write(self, completed: Completed) -> tuple[Headers, list[bytes]]:
        """Return the probabilities of the labels of every token, special tokens included."""
        items = (
            {
                "index": index,
                "object": "pooling",
                "data": (
                    result.value if completed.raw.state["logits"] else probabilities(result.value)
                ).tolist(),
            }
            for index, result in enumerate(completed.results)
        )
        return list_pieces(completed, f"pool-{completed.raw.request_id}", items)

    def refuse(self, error: ServiceError) -> tuple[int, Headers, bytes]:
        """Return an error in our own format, which is OpenAI's."""
        return own_refusal(error)


def read_labelling(
    values: dict[str, Any], strategy: str, ignored: str, default: str, prefix: str = ""
) -> Labelling:
    """Return how entities are found, by the fields of these names.

    `prefix` is what an error puts before their names. Raises InvalidInput for other values.
    """
    name = values.get(strategy)
    name = default if name is None else name
    if not isinstance(name, str) or name not in STRATEGIES:
        raise InvalidInput(
            f"{prefix}{strategy} must be one of {', '.join(STRATEGIES)}.",
            param=f"{prefix}{strategy}",
        )
    labels = values.get(ignored)
    labels = [OUTSIDE] if labels is None else labels
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise InvalidInput(
            f"{prefix}{ignored} must be a list of labels.", param=f"{prefix}{ignored}"
        )
    return Labelling(name, frozenset(labels))


def single_texts(values: dict[str, Any], name: str) -> Any:
    """Return the texts of a field; raises InvalidInput if it is missing or holds a pair."""
    if name not in values:
        raise InvalidInput(f"{name} is missing.", param=name)
    texts = values[name]
    for index, text in enumerate(texts if isinstance(texts, list) else [texts]):
        if isinstance(text, dict | list):
            field = f"{name}[{index}]" if isinstance(texts, list) else name
            raise InvalidInput(
                f"{field} must be a text; a pair has no tokens of its own to label.", param=field
            )
    return texts


def _own_entity(entity: Entity, text: str) -> dict[str, Any]:
    described: dict[str, Any] = {
        "label": entity.label,
        "score": entity.score,
        "text": text[entity.start : entity.end],
        "start": entity.start,
        "end": entity.end,
    }
    return described if entity.index is None else described | {"index": entity.index}
