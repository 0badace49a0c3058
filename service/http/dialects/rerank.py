"""
Reranking by a cross-encoder: each document is scored in a pair with the query.

    POST /rerank                 TEI's format (`texts`), or Jina's and vLLM's (`documents`)
    POST /v1/rerank, /v2/rerank  Jina's, Cohere's and vLLM's
    POST /score, /v1/score       vLLM's: one text with each of a list, or two lists text by text

A cross-encoder is a model with one label. Its score is the sigmoid of its logit, unless its
checkpoint names another activation or the request asks for the logit.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import orjson

from service.artifact import Manifest
from service.errors import InvalidInput, ServiceError, TooLarge
from service.http.dialects import (
    JSON,
    Completed,
    Headers,
    RawRequest,
    json_pieces,
    list_pieces,
    list_schema,
    own_refusal,
)
from service.http.dialects.tei import Tei, read_direction
from service.schemas import (
    ClassifyRequest,
    Limits,
    check_filled,
    check_pair_chars,
    check_text_chars,
    known_fields,
    read_object,
    read_values,
)

TEXT = {"type": "string", "minLength": 1}
TEXTS = {"type": "array", "minItems": 1, "items": TEXT}
DOCUMENT = {
    "anyOf": [
        TEXT,
        {"type": "object", "required": ["text"], "properties": {"text": TEXT}},
    ]
}
COUNT = {"type": ["integer", "null"], "minimum": 1}
FLAG = {"type": ["boolean", "null"]}
VLLM_FIELDS: dict[str, Any] = {
    "truncate_prompt_tokens": {"type": ["integer", "null"]},
    "truncation_side": {"enum": ["right", "left", None]},
    "use_activation": {**FLAG, "description": "false: logits, as with `raw_scores`."},
    "priority": {"type": "integer", "minimum": 0, "maximum": 0},
}
"""Fields of vLLM's that POST /classify takes too."""
RERANK_FIELDS: dict[str, Any] = {
    "query": TEXT,
    "documents": {"type": "array", "minItems": 1, "items": DOCUMENT},
    "model": {"type": ["string", "null"]},
    "top_n": {
        "type": ["integer", "null"],
        "minimum": 0,
        "description": "How many documents to return, best first; 0: all.",
    },
    "return_documents": {
        **FLAG,
        "description": "Whether to repeat the documents. The default is true, on /v2/rerank false.",
    },
    "raw_scores": {**FLAG, "description": "Logits instead of scores."},
    **VLLM_FIELDS,
    "max_tokens_per_doc": {**COUNT, "description": "Cohere's: tokens of each document that stay."},
    "user": {"type": ["string", "null"]},
}
RERANK = {
    "type": "object",
    "required": ["query", "documents"],
    "additionalProperties": False,
    "properties": RERANK_FIELDS,
}
RERANK_ANSWER = {
    "type": "object",
    "required": ["id", "model", "results", "usage"],
    "properties": {
        "id": {"type": "string"},
        "model": {"type": "string"},
        "usage": {"type": "object", "properties": {"total_tokens": {"type": "integer"}}},
        "results": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["index", "relevance_score"],
                "properties": {
                    "index": {"type": "integer"},
                    "relevance_score": {"type": "number"},
                    "document": {"type": "object", "properties": {"text": TEXT}},
                },
            },
        },
    },
}
TEI_RERANK_FIELDS: dict[str, Any] = {
    "query": TEXT,
    "texts": TEXTS,
    "raw_scores": FLAG,
    "return_text": FLAG,
    "truncate": FLAG,
    "truncation_direction": {"type": "string", "enum": ["Right", "Left"]},
}
TEI_RERANK = {
    "type": "object",
    "required": ["query", "texts"],
    "additionalProperties": False,
    "properties": TEI_RERANK_FIELDS,
}
TEI_RERANK_ANSWER = {
    "type": "array",
    "items": {
        "type": "object",
        "required": ["index", "score"],
        "properties": {"index": {"type": "integer"}, "score": {"type": "number"}, "text": TEXT},
    },
}
SCORE_FIELDS: dict[str, Any] = {
    "queries": {"anyOf": [TEXT, TEXTS]},
    "documents": {"anyOf": [TEXT, TEXTS]},
    "model": {"type": ["string", "null"]},
    "raw_scores": FLAG,
    **VLLM_FIELDS,
    "user": {"type": ["string", "null"]},
}
SCORE = {
    "type": "object",
    "required": ["queries", "documents"],
    "additionalProperties": False,
    "properties": SCORE_FIELDS,
}
SCORE_ANSWER = list_schema(
    {
        "type": "object",
        "required": ["index", "object", "score"],
        "properties": {
            "index": {"type": "integer"},
            "object": {"type": "string"},
            "score": {"type": "number"},
        },
    }
)
FORMER_NAMES = {"text_1": "queries", "text_2": "documents"}
"""vLLM's earlier names of the fields of /score."""


def is_reranker(manifest: Manifest) -> bool:
    """Return whether a model scores a pair with one number."""
    return len(manifest.labels) == 1 and manifest.takes_pairs


class CrossEncoderOnly:
    """A format in which only models answer that score a pair with one number."""

    def check(self, manifest: Manifest, raw: RawRequest) -> None:
        """Raise InvalidInput unless the model is a cross-encoder."""
        if len(manifest.labels) != 1:
            raise InvalidInput(
                f"The model has {len(manifest.labels)} labels, and a reranker has one; /info lists"
                " the tasks of each model.",
                param="model",
            )
        if not manifest.takes_pairs:
            raise InvalidInput(
                "The model reads no pairs, so it cannot rerank; /info lists the tasks of each"
                " model.",
                param="model",
            )


class Rerank(CrossEncoderOnly):
    """Jina's, Cohere's and vLLM's format; on /rerank also TEI's, if the request has `texts`."""

    input_field = "documents"

    def __init__(
        self,
        returns_documents: bool = True,
        accepts_tei: bool = False,
        refuses_as_tei: bool = False,
    ) -> None:
        self._returns_documents = returns_documents
        self._tei = TeiRerank() if accepts_tei else None
        self._refuses_as_tei = refuses_as_tei

    def read(self, raw: RawRequest, limits: Limits) -> ClassifyRequest:
        """Return the pairs of the query with each document; raises a ServiceError."""
        values = read_object(raw.body, limits)
        if self._tei is not None and "texts" in values:
            raw.state["tei"] = True
            return self._tei.read_values(raw, values, limits)
        known_fields(values, RERANK_FIELDS)
        query = _text(values.get("query"), "query", limits)
        documents = [
            _document(document, index, limits)
            for index, document in enumerate(_list(values, "documents", limits))
        ]
        # vLLM's default is 0, which its clients send.
        raw.state["top_n"] = _count(values, "top_n", least=0) or None
        returns = _flag(values, "return_documents")
        raw.state["documents"] = (
            documents if (self._returns_documents if returns is None else returns) else None
        )
        request = _pairs(raw, values, [query] * len(documents), documents, limits)
        for pair in request.input:
            pair.pair_tokens = _count(values, "max_tokens_per_doc")
        return request

    def write(self, completed: Completed) -> tuple[Headers, list[bytes]]:
        """Return the documents with their scores, best first."""
        if self._tei is not None and completed.raw.state.get("tei"):
            return self._tei.write(completed)
        documents = completed.raw.state["documents"]
        usage = {"prompt_tokens": completed.tokens, "total_tokens": completed.tokens}
        before = orjson.dumps(
            {"id": f"rerank-{completed.raw.request_id}", "model": completed.model, "usage": usage}
        )
        results = (
            {"index": index, "relevance_score": score}
            | ({} if documents is None else {"document": {"text": documents[index]}})
            for index, score in _ranked(completed)[: completed.raw.state["top_n"]]
        )
        return [JSON], json_pieces(before[:-1] + b',"results":[', results, b"]}")

    def refuse(self, error: ServiceError) -> tuple[int, Headers, bytes]:
        """Return an error in our own format, which is OpenAI's, or in TEI's."""
        if self._tei is not None and self._refuses_as_tei:
            return self._tei.refuse(error)
        return own_refusal(error)


class TeiRerank(CrossEncoderOnly, Tei):
    """Text Embeddings Inference's format of POST /rerank."""

    input_field = "texts"

    def read(self, raw: RawRequest, limits: Limits) -> ClassifyRequest:
        """Return the pairs of the query with each text; raises a ServiceError."""
        return self.read_values(raw, read_object(raw.body, limits), limits)

    def read_values(
        self, raw: RawRequest, values: dict[str, Any], limits: Limits
    ) -> ClassifyRequest:
        """Return the pairs of a body that is parsed already."""
        known_fields(values, TEI_RERANK_FIELDS)
        query = _text(values.get("query"), "query", limits)
        texts = [
            _text(text, f"texts[{i}]", limits)
            for i, text in enumerate(_list(values, "texts", limits))
        ]
        _check_chars([query] * len(texts), texts, "query and texts", limits)
        direction = read_direction(values)
        for name in ("truncate", "raw_scores", "return_text"):
            _flag(values, name)
        raw.state["texts"] = texts if values.get("return_text") else None
        return read_values(
            {
                "input": [{"text": query, "text_pair": text} for text in texts],
                "truncate": "none" if values.get("truncate") is False else direction,
                "activation": "none" if values.get("raw_scores") else "auto",
                "model": raw.model,
            },
            limits,
        )

    def write(self, completed: Completed) -> tuple[Headers, list[bytes]]:
        """Return the texts with their scores, best first."""
        texts = completed.raw.state["texts"]
        items = (
            {"index": index, "score": score} | ({} if texts is None else {"text": texts[index]})
            for index, score in _ranked(completed)
        )
        return [JSON, *self.headers(completed)], json_pieces(b"[", items, b"]")


class Score(CrossEncoderOnly):
    """vLLM's format of POST /score."""

    input_field = "documents"

    def read(self, raw: RawRequest, limits: Limits) -> ClassifyRequest:
        """Return the pairs of queries and documents; raises a ServiceError."""
        values = read_object(raw.body, limits)
        for former, name in FORMER_NAMES.items():
            if former in values and name not in values:
                values[name] = values.pop(former)
        known_fields(values, SCORE_FIELDS)
        queries, documents = (_texts(values, name, limits) for name in ("queries", "documents"))
        if len(queries) == 1:
            queries *= len(documents)
        if len(queries) != len(documents):
            raise InvalidInput(
                f"queries has {len(queries)} texts and documents {len(documents)}; give one query,"
                " or as many as documents.",
                param="queries",
            )
        return _pairs(raw, values, queries, documents, limits)

    def write(self, completed: Completed) -> tuple[Headers, list[bytes]]:
        """Return the score of each pair, in the order of the request."""
        items = (
            {"index": index, "object": "score", "score": score}
            for index, score in enumerate(_scores(completed))
        )
        return list_pieces(completed, f"score-{completed.raw.request_id}", items)

    def refuse(self, error: ServiceError) -> tuple[int, Headers, bytes]:
        """Return an error in our own format, which is OpenAI's."""
        return own_refusal(error)


def _pairs(
    raw: RawRequest,
    values: dict[str, Any],
    queries: list[str],
    documents: list[str],
    limits: Limits,
) -> ClassifyRequest:
    """Return the request of all pairs, with the fields that both of vLLM's formats have."""
    name = "query" if "query" in values else "queries"
    _check_chars(queries, documents, f"{name} and documents", limits)
    for name in ("use_activation", "raw_scores"):
        _flag(values, name)
    is_raw = values.get("raw_scores") or values.get("use_activation") is False
    request = {
        "input": [
            {"text": query, "text_pair": document}
            for query, document in zip(queries, documents, strict=True)
        ],
        "activation": "none" if is_raw else "auto",
        "model": raw.model or values.get("model"),
    }
    for name in ("truncate_prompt_tokens", "truncation_side", "priority", "user"):
        if values.get(name) is not None:
            request[name] = values[name]
    return read_values(request, limits)


def _check_chars(queries: list[str], documents: list[str], parts: str, limits: Limits) -> None:
    """Raise TooLarge if all pairs together have too many characters."""
    chars = sum(map(len, queries)) + sum(map(len, documents))
    check_pair_chars(chars, parts, parts.partition(" ")[0], limits)


def _ranked(completed: Completed) -> list[tuple[int, float]]:
    """Return (index, score) of each document, best first; equal ones in their order."""
    return sorted(enumerate(_scores(completed)), key=lambda each: -each[1])


def _scores(completed: Completed) -> Iterator[float]:
    return (answer["score"] for answer in completed.classifications())


def _list(values: dict[str, Any], name: str, limits: Limits) -> list[Any]:
    value = values.get(name)
    if not isinstance(value, list) or not value:
        raise InvalidInput(f"{name} must be a list of at least one text.", param=name)
    if len(value) > limits.texts:
        raise TooLarge(
            f"{name} holds {len(value)} texts, the limit is {limits.texts}; send several requests.",
            param=name,
        )
    return value


def _texts(values: dict[str, Any], name: str, limits: Limits) -> list[str]:
    """Return a field that is a text or a list of texts."""
    if isinstance(values.get(name), str):
        return [_text(values[name], name, limits)]
    texts = _list(values, name, limits)
    return [_text(text, f"{name}[{i}]", limits) for i, text in enumerate(texts)]


def _document(value: object, index: int, limits: Limits) -> str:
    """Return the text of a document, which is a string or an object with `text`."""
    if isinstance(value, dict):
        return _text(value.get("text"), f"documents[{index}].text", limits)
    return _text(value, f"documents[{index}]", limits)


def _text(value: object, field: str, limits: Limits) -> str:
    if not isinstance(value, str):
        raise InvalidInput(f"{field} must be a text.", param=field)
    check_text_chars(value, field, limits)
    check_filled(value, field)
    return value


def _count(values: dict[str, Any], name: str, least: int = 1) -> int | None:
    value = values.get(name)
    is_count = isinstance(value, int) and not isinstance(value, bool) and value >= least
    if value is not None and not is_count:
        raise InvalidInput(f"{name} must be a whole number of at least {least}.", param=name)
    return value


def _flag(values: dict[str, Any], name: str) -> bool | None:
    value = values.get(name)
    if not isinstance(value, bool | None):
        raise InvalidInput(f"{name} must be true, false or null.", param=name)
    return value
