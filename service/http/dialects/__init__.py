"""
The shapes in which callers ask and are answered: one file each, over the one core in classify.py.

A dialect reads a body into our own request, writes what became of it, and says what went wrong in
its own words. It knows nothing of queues, engines or HTTP.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import orjson

from service import answers
from service.artifact import Manifest
from service.batching.requests import Row
from service.classifier import Encoded
from service.errors import InvalidInput, ServiceError
from service.schemas import ClassifyRequest, Limits, known_fields

Headers = list[tuple[bytes, bytes]]
JSON = (b"content-type", b"application/json")
# A text's labels, best first, in the API's description.
SCORES = {"type": "array", "items": {"$ref": "#/components/schemas/LabelScore"}}
# Of a large answer, so that others get the interpreter and the event loop between one and the next.
PIECE_BYTES = 131_072


@dataclass(frozen=True, slots=True)
class Called:
    """What a caller sent."""

    body: bytes
    headers: dict[bytes, bytes]
    model: str | None
    """The model that the path names, where it does."""
    version: str | None
    """The version of it, where the path names one."""
    request_id: str
    kept: dict[str, Any] = field(default_factory=dict)
    """What the dialect has read and needs again for the answer, and under `model` what the body
    says of it.
    """


@dataclass(frozen=True, slots=True)
class Answered:
    """A request and what the model made of it."""

    called: Called
    asked: ClassifyRequest
    model: str
    manifest: Manifest
    encoded: Sequence[Encoded]
    rows: Sequence[Row]
    tokenize_ns: int
    since_ns: int
    """From the request's start until now."""
    on_a_gpu: bool = False

    @property
    def tokens(self) -> int:
        return sum([item.tokens for item in self.encoded])

    def classification(self, place: int) -> dict[str, Any]:
        """The answer for one text."""
        asked = self.asked
        activation = "none" if asked.use_activation is False else asked.activation
        encoded = self.encoded[place]
        answer = answers.classification(
            place,
            self.rows[place].value,
            encoded,
            self.manifest,
            activation,
            asked.top_k,
            asked.threshold,
            asked.probs,
        )
        return answer if asked.window is None else answer | {"windows": encoded.windows}


class Dialect(Protocol):
    def read(self, called: Called, limits: Limits) -> ClassifyRequest:
        """Our own request; a ServiceError names what is wrong in the caller's."""
        ...

    def write(self, answered: Answered) -> tuple[Headers, list[bytes]]:
        """Headers of the answer, and its body in pieces. Large ones are written beside the event
        loop, so nothing is kept in the dialect.
        """
        ...

    def refuse(self, error: ServiceError) -> tuple[int, Headers, bytes]:
        """Status, headers and body of an error."""
        ...


def in_pieces(before: bytes, items: Iterable[object], after: bytes) -> list[bytes]:
    """The JSON of `items` between two others', commas in between; one item at a time, in pieces of
    about PIECE_BYTES.
    """
    pieces: list[bytes] = []
    held, size, comma = [before], 0, b""
    for item in items:
        told = orjson.dumps(item)
        held += (comma, told)
        comma, size = b",", size + len(told)
        if size > PIECE_BYTES:
            pieces.append(b"".join(held))
            held, size = [], 0
    held.append(after)
    pieces.append(b"".join(held))
    return pieces


def asked_activation(values: Mapping[str, Any], known: Collection[str] | None = None) -> object:
    """The activation among a request's `parameters`, `auto` where there is none; InvalidInput if
    another one is not `known`.
    """
    parameters = values.get("parameters") or {}
    if not isinstance(parameters, dict):
        raise InvalidInput("parameters must be an object.", param="parameters")
    if known is not None:
        known_fields(parameters, known, "parameters.")
    return parameters.get("activation") or "auto"


def retry_after(error: ServiceError) -> Headers:
    return (
        [] if error.retry_after_s is None else [(b"retry-after", str(error.retry_after_s).encode())]
    )


def plain_refusal(error: ServiceError) -> tuple[int, Headers, bytes]:
    """`{"error": "…"}`, as KServe, Triton and Hugging Face say it."""
    return int(error.status), [JSON, *retry_after(error)], orjson.dumps({"error": error.message})
