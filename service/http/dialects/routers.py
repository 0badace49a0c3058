"""
The formats in which routers of LLM requests ask their classifiers: POST /classify if
DRBERT_CLASSIFY_DIALECT is `semantic-router` or `ort-server`.

    vLLM semantic-router's http_classify:   {"inputs": "good"}
                                            [{"label": "POSITIVE", "score": 0.9}, …]
    ort-server, the backend of Lemonade:    {"text": "good", "top_k": 1}
                                            {"labels": {"POSITIVE": 0.9}}

The service's own format then has the path /v1/classify alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import orjson

from service.answers import default_activation
from service.artifact import Manifest
from service.errors import InvalidInput, ServiceError
from service.http.dialects import (
    JSON,
    SCORES,
    Completed,
    Headers,
    RawRequest,
    WholeTexts,
    own_refusal,
)
from service.requests.entities import SPECIAL, probabilities
from service.schemas import ClassifyRequest, Limits, known_fields, read_object, read_values

TEXT = {"type": "string", "minLength": 1}
SEMANTIC_ROUTER: dict[str, Any] = {
    "type": "object",
    "required": ["inputs"],
    "additionalProperties": False,
    "properties": {"inputs": TEXT, "model": {"type": ["string", "null"]}},
}
SEMANTIC_ROUTER_ANSWER = SCORES
ORT_SERVER: dict[str, Any] = {
    "type": "object",
    "required": ["text"],
    "additionalProperties": False,
    "properties": {
        "text": TEXT,
        "top_k": {
            "type": ["integer", "null"],
            "minimum": 0,
            "description": "How many labels to return, best first; 0: all.",
        },
        "model": {"type": ["string", "null"]},
    },
}
ORT_SERVER_ANSWER = {
    "type": "object",
    "required": ["labels"],
    "properties": {"labels": {"type": "object", "additionalProperties": {"type": "number"}}},
}


class SemanticRouter(WholeTexts):
    """vLLM semantic-router's format: one text, and the scores of all labels, which add up to 1."""

    input_field = "inputs"

    def read(self, raw: RawRequest, limits: Limits) -> ClassifyRequest:
        """Return the request of the text in `inputs`; raises a ServiceError."""
        values = known_fields(read_object(raw.body, limits), SEMANTIC_ROUTER["properties"])
        raw.state["model"] = values.get("model")
        return read_values({"input": _text(values, "inputs"), "model": values.get("model")}, limits)

    def check(self, manifest: Manifest, raw: RawRequest) -> None:
        """Raise InvalidInput unless the scores of the model's labels add up to 1."""
        super().check(manifest, raw)
        if default_activation(manifest) != "softmax" or len(manifest.labels) < 2:
            raise InvalidInput(
                "The semantic router needs scores that add up to 1, and those of this model's"
                f" labels do not (its task is {manifest.task}).",
                param="model",
            )

    def write(self, completed: Completed) -> tuple[Headers, list[bytes]]:
        """Return the labels with their scores, best first."""
        [scores] = completed.scores()
        return [JSON], [orjson.dumps(scores)]

    def refuse(self, error: ServiceError) -> tuple[int, Headers, bytes]:
        """Return an error in our own format: the router reads its status only."""
        return own_refusal(error)


class OrtServer:
    """ort-server's format: one text, and the scores of its labels by their names.

    A label of a model that labels tokens has the largest score that a token of the text has.
    """

    input_field = "text"

    def check(self, manifest: Manifest, raw: RawRequest) -> None:
        """Accept every model."""

    def read(self, raw: RawRequest, limits: Limits) -> ClassifyRequest:
        """Return the request of the text in `text`; raises a ServiceError."""
        values = known_fields(read_object(raw.body, limits), ORT_SERVER["properties"])
        raw.state["model"] = values.get("model")
        top_k = values.get("top_k") or 0
        if isinstance(values.get("top_k"), bool) or not isinstance(top_k, int) or top_k < 0:
            raise InvalidInput(
                "top_k must be a whole number of labels; 0 is all of them.", param="top_k"
            )
        return read_values(
            {
                "input": _text(values, "text"),
                "top_k": top_k or None,
                "model": values.get("model"),
            },
            limits,
        )

    def write(self, completed: Completed) -> tuple[Headers, list[bytes]]:
        """Return the scores by the names of the labels, best first."""
        if completed.manifest.labels_tokens:
            labels = _largest_scores(completed)
        else:
            [scores] = completed.scores()
            labels = {each["label"]: each["score"] for each in scores}
        return [JSON], [orjson.dumps({"labels": labels})]

    def refuse(self, error: ServiceError) -> tuple[int, Headers, bytes]:
        """Return an error in our own format, which is OpenAI's."""
        return own_refusal(error)


def _largest_scores(completed: Completed) -> dict[str, float]:
    """Return the largest probability of each label over a text's tokens, best first."""
    [encoded], [result] = completed.encoded, completed.results
    scores = probabilities(result.value)
    if encoded.offsets is not None:
        is_text = np.asarray(encoded.offsets.starts) != SPECIAL
        scores = scores[is_text] if is_text.any() else scores
    by_label = dict(zip(completed.manifest.labels, scores.max(axis=0).tolist(), strict=True))
    best = sorted(by_label, key=lambda label: -by_label[label])
    return {label: by_label[label] for label in best[: completed.request.top_k]}


def _text(values: dict[str, Any], name: str) -> str:
    text = values.get(name)
    if not isinstance(text, str):
        raise InvalidInput(f"{name} must be a text.", param=name)
    return text
