"""
The service's own format, a superset of vLLM's: POST /classify and POST /v1/classify.

    {"input": ["good", "bad"], "model": "reviews"}
    {"id": …, "object": "list", "model": …, "data": [{"label": "POSITIVE", …}, …], "usage": …}
"""

from __future__ import annotations

import time

import orjson

from service.errors import ServiceError
from service.http.dialects import (
    JSON,
    Completed,
    Headers,
    RawRequest,
    WholeTexts,
    json_pieces,
    own_refusal,
)
from service.schemas import ClassifyRequest, Limits, native_request, read_object


class Native(WholeTexts):
    """The service's own format, on POST /classify and POST /v1/classify."""

    input_field = "input"

    def read(self, raw: RawRequest, limits: Limits) -> ClassifyRequest:
        """Return the request of a body in the service's own format; raises a ServiceError."""
        values = read_object(raw.body, limits)
        raw.state["model"] = values.get("model")
        return native_request(values, limits)

    def write(self, completed: Completed) -> tuple[Headers, list[bytes]]:
        """Return the answer as a list of classifications, with its id, model and token counts."""
        tokens = completed.tokens
        head = orjson.dumps(
            {
                "id": completed.request.request_id or f"classify-{completed.raw.request_id}",
                "object": "list",
                "created": int(time.time()),
                "model": completed.model,
                "usage": {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0},
            }
        )
        return [JSON], json_pieces(head[:-1] + b',"data":[', completed.classifications(), b"]}")

    def refuse(self, error: ServiceError) -> tuple[int, Headers, bytes]:
        """Return an error as an object with message, type, param and code, as OpenAI's API does."""
        return own_refusal(error)
