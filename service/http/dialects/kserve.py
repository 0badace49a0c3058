"""
KServe's V1 protocol: POST /v1/models/NAME:predict.

    {"instances": ["good", "bad"]}      {"predictions": [{"NEGATIVE": 0.1, "POSITIVE": 0.9}, …]}

Every label's score by its name; KServe's own server answers with a class number unless it is told
otherwise. `parameters` may hold `activation`, as in our own requests: `none` gives logits.
"""

from __future__ import annotations

from typing import get_args

from service.errors import InvalidInput, ServiceError
from service.http.dialects import (
    JSON,
    Completed,
    Headers,
    RawRequest,
    activation_parameter,
    json_pieces,
    plain_refusal,
)
from service.schemas import (
    Activation,
    ClassifyRequest,
    Limits,
    known_fields,
    read_object,
    read_values,
)

SCHEMA = {
    "type": "object",
    "required": ["instances"],
    "additionalProperties": False,
    "properties": {
        "instances": {"type": "array", "minItems": 1, "items": {"type": "string", "minLength": 1}},
        "parameters": {
            "type": "object",
            "additionalProperties": False,
            "properties": {"activation": {"type": "string", "enum": list(get_args(Activation))}},
        },
    },
}
ANSWER = {
    "type": "object",
    "required": ["predictions"],
    "properties": {
        "predictions": {
            "type": "array",
            "items": {"type": "object", "additionalProperties": {"type": "number"}},
        },
    },
}


class KServe:
    def read(self, raw: RawRequest, limits: Limits) -> ClassifyRequest:
        values = known_fields(read_object(raw.body, limits), ("instances", "parameters"))
        if not isinstance(values.get("instances"), list):
            raise InvalidInput("instances must be a list of texts.", param="instances")
        return read_values(
            {
                "input": values["instances"],
                "model": raw.model,
                "activation": activation_parameter(values, ("activation",)),
            },
            limits,
        )

    def write(self, completed: Completed) -> tuple[Headers, list[bytes]]:
        labels = completed.manifest.labels
        predictions = (
            dict(zip(labels, completed.classification(i)["probs"], strict=True))
            for i in range(len(completed.results))
        )
        return [JSON], json_pieces(b'{"predictions":[', predictions, b"]}")

    def refuse(self, error: ServiceError) -> tuple[int, Headers, bytes]:
        return plain_refusal(error)
