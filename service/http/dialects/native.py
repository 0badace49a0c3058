"""
The service's own format, a superset of vLLM's: POST /classify and POST /v1/classify.

    {"input": ["good", "bad"], "model": "reviews"}
    {"id": …, "object": "list", "model": …, "data": [{"label": "POSITIVE", …}, …], "usage": …}
"""

from __future__ import annotations

from service.errors import ServiceError
from service.http.dialects import (
    Completed,
    Headers,
    RawRequest,
    WholeTexts,
    list_pieces,
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
        answer_id = completed.request.request_id or f"classify-{completed.raw.request_id}"
        return list_pieces(completed, answer_id, completed.classifications())

    def refuse(self, error: ServiceError) -> tuple[int, Headers, bytes]:
        """Return an error as an object with message, type, param and code, as OpenAI's API does."""
        return own_refusal(error)
