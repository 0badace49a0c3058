"""
KServe's V1 protocol: POST /v1/models/NAME:predict.

    {"instances": ["good", "bad"]}
    {"predictions": [{"NEGATIVE": 0.1, "POSITIVE": 0.9}, …]}

A prediction maps every label to its score. KServe's own server returns a class number by default.
`parameters` may hold `activation`, as in the service's own format: `none` returns logits.
"""

from __future__ import annotations

from typing import get_args

from service.errors import InvalidInput, ServiceError
from service.http.dialects import (
    JSON,
    Completed,
    Headers,
    RawRequest,
    WholeTexts,
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


class KServe(WholeTexts):
    """KServe's V1 protocol, on POST /v1/models/NAME:predict."""

    input_field = "instances"

    def read(self, raw: RawRequest, limits: Limits) -> ClassifyRequest:
        """Return the request of the texts in `instances`; raises a ServiceError."""
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
        """Return the answer as each text's score by label."""
        labels = completed.manifest.labels
        predictions = (
            dict(zip(labels, answer["probs"], strict=True))
            for answer in completed.classifications()
        )
        return [JSON], json_pieces(b'{"predictions":[', predictions, b"]}")

    def refuse(self, error: ServiceError) -> tuple[int, Headers, bytes]:
        """Return an error as `{"error": "…"}`."""
        return plain_refusal(error)
