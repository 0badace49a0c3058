"""
Our own shape, a superset of vLLM's /classify.
"""

from __future__ import annotations

import time

import orjson

from service.errors import ServiceError
from service.http.dialects import JSON, Completed, Headers, RawRequest, json_pieces, retry_after
from service.schemas import ClassifyRequest, Limits, native_request, read_object


class Native:
    def read(self, raw: RawRequest, limits: Limits) -> ClassifyRequest:
        values = read_object(raw.body, limits)
        raw.state["model"] = values.get("model")
        return native_request(values, limits)

    def write(self, completed: Completed) -> tuple[Headers, list[bytes]]:
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
        return [JSON], json_pieces(
            head[:-1] + b',"data":[',
            map(completed.classification, range(len(completed.results))),
            b"]}",
        )

    def refuse(self, error: ServiceError) -> tuple[int, Headers, bytes]:
        return int(error.status), [JSON, *retry_after(error)], orjson.dumps(error.body())
