"""
Our own shape, a superset of vLLM's /classify.
"""

from __future__ import annotations

import time

import orjson

from service.errors import ServiceError
from service.http.dialects import JSON, Answered, Called, Headers, in_pieces, retry_after
from service.schemas import ClassifyRequest, Limits, own_request, read_object


class Native:
    def read(self, called: Called, limits: Limits) -> ClassifyRequest:
        values = read_object(called.body, limits)
        called.kept["model"] = values.get("model")
        return own_request(values, limits)

    def write(self, answered: Answered) -> tuple[Headers, list[bytes]]:
        tokens = answered.tokens
        head = orjson.dumps(
            {
                "id": answered.asked.request_id or f"classify-{answered.called.request_id}",
                "object": "list",
                "created": int(time.time()),
                "model": answered.model,
                "usage": {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0},
            }
        )
        return [JSON], in_pieces(
            head[:-1] + b',"data":[', map(answered.classification, range(len(answered.rows))), b"]}"
        )

    def refuse(self, error: ServiceError) -> tuple[int, Headers, bytes]:
        return int(error.status), [JSON, *retry_after(error)], orjson.dumps(error.body())
