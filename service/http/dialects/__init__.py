"""
Dialects: the request and answer formats of other servers, one module each, and our own.

A dialect parses a body into our own request, and writes answers and errors in its own format. It
does not know queues, engines or HTTP.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import orjson

from service import answers
from service.artifact import HeadView, Manifest
from service.batching.requests import Result
from service.classifier import Encoded
from service.errors import InvalidInput, ServiceError
from service.requests.entities import Entity, Labelling, Vocabulary
from service.schemas import ClassifyRequest, Limits, known_fields

Headers = list[tuple[bytes, bytes]]
JSON = (b"content-type", b"application/json")
# The JSON schema of one text's labels, best first.
SCORES = {"type": "array", "items": {"$ref": "#/components/schemas/LabelScore"}}
USAGE = {
    "type": "object",
    "properties": {"prompt_tokens": {"type": "integer"}, "total_tokens": {"type": "integer"}},
}
# A large answer is written in pieces of this size, so that other requests get the interpreter and
# the event loop between them.
PIECE_BYTES = 131_072


@dataclass(slots=True)  # not frozen: several are made per request, and that costs more
class RawRequest:
    """A request as the client sent it."""

    body: bytes
    headers: dict[bytes, bytes]
    model: str | None
    """The model that the path names; None if it names none."""
    version: str | None
    """The model's version that the path names; None if it names none."""
    request_id: str
    state: dict[str, Any] = field(default_factory=dict)
    """Values that the dialect reads from the body and needs for the answer.

    `model` is the model that the body names.
    """


@dataclass(slots=True)  # not frozen: several are made per request, and that costs more
class Completed:
    """A request with its results."""

    raw: RawRequest
    request: ClassifyRequest
    model: str
    manifest: Manifest
    encoded: Sequence[Encoded]
    results: Sequence[Result]
    tokenize_ns: int
    elapsed_ns: int
    """Time from the start of tokenization until the answer is written."""
    is_on_gpu: bool = False
    vocabulary: Vocabulary | None = None
    """The model's tokens, for the entities of a text."""

    @property
    def tokens(self) -> int:
        """Token count of all texts together."""
        return sum([item.tokens for item in self.encoded])

    def classifications(self) -> Iterator[dict[str, Any]]:
        """Yield each text's answer in our own format, in the order of the request."""
        question = self.request.question
        if self.request.heads is not None:
            views = self.manifest.by_head
            return (self.heads_classification(index, views) for index in range(len(self.results)))
        if question is not None:
            return map(
                self.zero_shot_classification, range(len(self.results) // len(question.labels))
            )
        return map(self.classification, range(len(self.results)))

    def entities(self, labelling: Labelling) -> Iterator[list[Entity]]:
        """Yield the entities of each text, if the model labels tokens."""
        assert self.vocabulary is not None
        for text, encoded, result in zip(
            self.request.input, self.encoded, self.results, strict=True
        ):
            assert encoded.offsets is not None
            yield labelling.entities(
                text.text,
                encoded.ids,
                encoded.offsets,
                result.value,
                self.manifest.labels,
                self.vocabulary,
            )

    def scores(self) -> Iterator[list[dict[str, Any]]]:
        """Yield each text's labels with their scores, best first."""
        return (answer["scores"] for answer in self.classifications())

    def classification(self, index: int) -> dict[str, Any]:
        """Return one text's answer in our own format."""
        answer = self._classification(index, self.results[index].value, self.manifest)
        return self._with_circumstances(answer, index)

    def heads_classification(self, index: int, views: Mapping[str, HeadView]) -> dict[str, Any]:
        """Return one text's answer by the heads that the request names."""
        assert self.request.heads is not None
        logits = self.results[index].value
        by_head = {
            name: self._classification(index, logits[views[name].columns], views[name].manifest)
            for name in self.request.heads
        }
        return self._with_circumstances(answers.heads_classification(by_head), index)

    def _classification(self, index: int, logits: Any, manifest: Manifest) -> dict[str, Any]:
        request = self.request
        return answers.classification(
            index,
            logits,
            self.encoded[index],
            manifest,
            "none" if request.use_activation is False else request.activation,
            request.top_k,
            request.threshold,
            request.probs,
        )

    def _with_circumstances(self, answer: dict[str, Any], index: int) -> dict[str, Any]:
        """Add to a text's answer how it came about: from memory, or by windows."""
        if self.results[index].cached:
            answer["cached"] = True
        if self.request.window is not None:
            answer["windows"] = self.encoded[index].windows
        return answer

    def zero_shot_classification(self, index: int) -> dict[str, Any]:
        """Return the answer of one text, whose pairs with the request's labels were computed."""
        request, question = self.request, self.request.question
        assert question is not None
        count = len(question.labels)
        pairs = slice(index * count, (index + 1) * count)
        results = self.results[pairs]
        answer = answers.zero_shot_classification(
            index,
            [result.value for result in results],
            self.encoded[pairs],
            self.manifest,
            question,
            request.top_k,
            request.threshold,
            request.probs,
        )
        if all(result.cached for result in results):
            answer["cached"] = True
        return answer


class Dialect(Protocol):
    """A request and answer format.

    Requests in several threads share one dialect, so it has no state.
    """

    input_field: str
    """What the format calls the texts, for errors that name them."""

    def read(self, raw: RawRequest, limits: Limits) -> ClassifyRequest:
        """Return the request in our own format; raises a ServiceError that names the field."""
        ...

    def check(self, manifest: Manifest, raw: RawRequest) -> None:
        """Raise InvalidInput if the model cannot answer this request."""
        ...

    def write(self, completed: Completed) -> tuple[Headers, list[bytes]]:
        """Return the answer's headers, and its body in pieces."""
        ...

    def refuse(self, error: ServiceError) -> tuple[int, Headers, bytes]:
        """Return the status, the headers and the body of an error."""
        ...


class WholeTexts:
    """A format in which every model answers that classifies whole texts."""

    def check(self, manifest: Manifest, raw: RawRequest) -> None:
        """Raise InvalidInput if the model labels tokens."""
        if manifest.labels_tokens:
            raise InvalidInput(
                "The model labels the tokens of a text, and does not classify texts; ask POST"
                " /tokens. /info lists the tasks of each model.",
                param="model",
            )


def list_schema(item: dict[str, Any]) -> dict[str, Any]:
    """Return the JSON schema of an answer in OpenAI's form, whose `data` holds such items."""
    return {
        "type": "object",
        "required": ["id", "object", "created", "model", "data", "usage"],
        "properties": {
            "id": {"type": "string"},
            "object": {"type": "string"},
            "created": {"type": "integer"},
            "model": {"type": "string"},
            "data": {"type": "array", "items": item},
            "usage": USAGE,
        },
    }


def list_pieces(
    completed: Completed, answer_id: str, items: Iterable[object]
) -> tuple[Headers, list[bytes]]:
    """Return an answer in OpenAI's form with these items as its `data`."""
    tokens = completed.tokens
    head = orjson.dumps(
        {
            "id": answer_id,
            "object": "list",
            "created": int(time.time()),
            "model": completed.model,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0},
        }
    )
    return [JSON], json_pieces(head[:-1] + b',"data":[', items, b"]}")


def json_pieces(before: bytes, items: Iterable[object], after: bytes) -> list[bytes]:
    """Return `before`, the items as JSON with commas between them, and `after`.

    The items are written one at a time, in pieces of about PIECE_BYTES.
    """
    pieces: list[bytes] = []
    parts, size, comma = [before], 0, b""
    for item in items:
        text = orjson.dumps(item)
        parts += (comma, text)
        comma, size = b",", size + len(text)
        if size > PIECE_BYTES:
            pieces.append(b"".join(parts))
            parts, size = [], 0
    parts.append(after)
    pieces.append(b"".join(parts))
    return pieces


def object_field(
    values: Mapping[str, Any], name: str, known: Collection[str] | None = None
) -> dict[str, Any]:
    """Return the object in a request's field, or an empty one if the field is missing or null.

    Raises InvalidInput if it is not an object, or has a field that is not in `known`. Without
    `known` it may have any fields.
    """
    value = values.get(name) or {}
    if not isinstance(value, dict):
        raise InvalidInput(f"{name} must be an object.", param=name)
    return value if known is None else known_fields(value, known, f"{name}.")


def activation_parameter(values: Mapping[str, Any], known: Collection[str] | None = None) -> object:
    """Return the activation among a request's `parameters`, or `auto`.

    Raises InvalidInput as `object_field` does.
    """
    return object_field(values, "parameters", known).get("activation") or "auto"


def retry_after(error: ServiceError) -> Headers:
    """Return an error's Retry-After header, if it has one."""
    if error.retry_after_s is None:
        return []
    return [(b"retry-after", str(error.retry_after_s).encode())]


def own_refusal(error: ServiceError) -> tuple[int, Headers, bytes]:
    """Return an error as an object with message, type, param and code, as OpenAI's API does."""
    return int(error.status), [JSON, *retry_after(error)], orjson.dumps(error.body())


def plain_refusal(error: ServiceError) -> tuple[int, Headers, bytes]:
    """Return an error as `{"error": "…"}`, the format of KServe, Triton and Hugging Face."""
    return int(error.status), [JSON, *retry_after(error)], orjson.dumps({"error": error.message})
