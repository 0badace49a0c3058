"""
The Open Inference Protocol (KServe's V2), for KServe's and Triton's clients.

POST /v2/models/NAME/infer, with /versions/1 before /infer if the client names a version.

    {"inputs": [{"name": "text", "shape": [2], "datatype": "BYTES", "data": ["good", "bad"]}]}
    {"model_name": …, "outputs": [{"name": "label", …}, {"name": "score", …},
        {"name": "probabilities", …}]}

A second input `text_pair` makes pairs. Tensors are JSON or, in Triton's extension, bytes behind the
JSON. An output with the parameter `classification: k` becomes k strings `score:index:label`, best
first. The request's parameter `activation` is that of the service's own format: `none` returns
logits.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import orjson

from service.errors import InvalidInput, InvalidJson, ServiceError, UnknownModel
from service.http.dialects import (
    JSON,
    Completed,
    Headers,
    RawRequest,
    WholeTexts,
    activation_parameter,
    plain_refusal,
)
from service.schemas import ClassifyRequest, Limits, known_fields, read_object, read_values

INPUTS = ("text", "text_pair")
OUTPUTS = ("label", "score", "probabilities")
SCHEMA = {
    "type": "object",
    "required": ["inputs"],
    "additionalProperties": False,
    "properties": {
        "id": {"type": "string"},
        "parameters": {"type": "object"},
        "model_name": {"type": ["string", "null"]},
        "model_version": {"anyOf": [{"type": "string", "enum": ["1"]}, {"type": "null"}]},
        "inputs": {
            "type": "array",
            "minItems": 1,
            "maxItems": 2,
            "items": {
                "type": "object",
                "required": ["name", "shape", "datatype"],
                "additionalProperties": False,
                "properties": {
                    "name": {"type": "string", "enum": list(INPUTS)},
                    "shape": {"type": "array", "items": {"type": "integer", "minimum": 1}},
                    "datatype": {"type": "string", "enum": ["BYTES"]},
                    "data": {"type": "array", "items": {"type": "string", "minLength": 1}},
                    "parameters": {"type": "object"},
                },
            },
        },
        "outputs": {
            "type": "array",
            "maxItems": len(OUTPUTS),
            "items": {
                "type": "object",
                "required": ["name"],
                "additionalProperties": False,
                "properties": {
                    "name": {"type": "string", "enum": list(OUTPUTS)},
                    "parameters": {"type": "object"},
                },
            },
        },
    },
}
ANSWER = {
    "type": "object",
    "required": ["model_name", "model_version", "id", "outputs"],
    "properties": {
        "model_name": {"type": "string"},
        "model_version": {"type": "string"},
        "id": {"type": "string"},
        "outputs": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["name", "datatype", "shape"],
                "properties": {
                    "name": {"type": "string", "enum": list(OUTPUTS)},
                    "datatype": {"type": "string", "enum": ["BYTES", "FP32"]},
                    "shape": {"type": "array", "items": {"type": "integer"}},
                    "parameters": {"type": "object"},
                    "data": {
                        "type": "array",
                        "items": {"type": ["string", "number"]},
                        "description": "Unless the tensor follows the JSON as bytes.",
                    },
                },
            },
        },
    },
}
CONTENT_TYPES = ("str", "base64")
"""Content types of a tensor of texts, as MLServer names them."""
JSON_LENGTH = b"inference-header-content-length"
BAD_JSON_LENGTH = "Inference-Header-Content-Length must be a length within the body."
VERSION = "1"


class OpenInference(WholeTexts):
    """The Open Inference Protocol, on POST /v2/models/NAME/infer."""

    input_field = "text"

    def read(self, raw: RawRequest, limits: Limits) -> ClassifyRequest:
        """Return the request of the input tensors; raises a ServiceError."""
        check_version(raw.version)
        values, binary = _split_body(raw, limits)
        known_fields(
            values, ("id", "inputs", "outputs", "parameters", "model_name", "model_version")
        )
        _check_model_name(values, raw.model)
        texts = _texts_by_input(values.get("inputs"), binary)
        raw.state["outputs"] = _requested_outputs(values)
        if not isinstance(values.get("id"), str | None):
            raise InvalidInput("id must be a text.", param="id")
        return read_values(
            {
                "input": _texts_or_pairs(texts[INPUTS[0]], texts.get(INPUTS[1])),
                "model": raw.model,
                "request_id": values.get("id") or None,
                "activation": activation_parameter(values),
            },
            limits,
        )

    def write(self, completed: Completed) -> tuple[Headers, list[bytes]]:
        """Return the output tensors as JSON, with the bytes of binary tensors behind it."""
        answers = list(completed.classifications())
        outputs, tails = [], []
        for name, parameters in completed.raw.state["outputs"].items():
            output, tail = _write_output(name, parameters, answers, completed.manifest.labels)
            outputs.append(output)
            tails.append(tail)
        head = orjson.dumps(
            {
                "model_name": completed.model,
                "model_version": VERSION,
                "id": completed.request.request_id or completed.raw.request_id,
                "outputs": outputs,
            }
        )
        if not any(tails):
            return [JSON], [head]
        headers = [
            (b"content-type", b"application/octet-stream"),
            (JSON_LENGTH, str(len(head)).encode()),
        ]
        return headers, [head, *tails]

    def refuse(self, error: ServiceError) -> tuple[int, Headers, bytes]:
        """Return an error as `{"error": "…"}`; the protocol has the status 400 for 422."""
        status, headers, body = plain_refusal(error)
        return (400 if status == 422 else status), headers, body


def check_version(version: object) -> None:
    """Raise UnknownModel unless a request names VERSION or no version."""
    if version not in (None, VERSION):
        raise UnknownModel(
            f"There is no version {str(version)[:64]}; every model has only version {VERSION}."
        )


def metadata(model: str, labels: Sequence[str], takes_pairs: bool) -> dict[str, Any]:
    """Return a model's input and output tensors, the answer of GET /v2/models/NAME."""
    inputs = INPUTS if takes_pairs else INPUTS[:1]
    shapes = {
        "label": ("BYTES", [-1]),
        "score": ("FP32", [-1]),
        "probabilities": ("FP32", [-1, len(labels)]),
    }
    return {
        "name": model,
        "versions": [VERSION],
        "platform": "drbert-serve",
        "inputs": [{"name": name, "datatype": "BYTES", "shape": [-1]} for name in inputs],
        "outputs": [
            {"name": name, "datatype": shapes[name][0], "shape": shapes[name][1]}
            for name in OUTPUTS
        ],
        "parameters": {"labels": list(labels)},
    }


def _split_body(raw: RawRequest, limits: Limits) -> tuple[dict[str, Any], bytes]:
    """Return the JSON object of a body, and the bytes behind it."""
    declared = raw.headers.get(JSON_LENGTH)
    if declared is None:
        return read_object(raw.body, limits), b""
    # No more digits than the body's length has: Python refuses to read a number of thousands.
    if not declared.isdigit() or len(declared) > len(str(len(raw.body))):
        raise InvalidJson(BAD_JSON_LENGTH)
    length = int(declared)
    if length > len(raw.body):
        raise InvalidJson(BAD_JSON_LENGTH)
    return read_object(raw.body[:length], limits), raw.body[length:]


def _check_model_name(values: dict[str, Any], model: str | None) -> None:
    """Raise InvalidInput for another model than the path's, UnknownModel for another version.

    KServe's client repeats both in the body.
    """
    if values.get("model_name") not in (None, model):
        raise InvalidInput(
            f"model_name is {str(values['model_name'])[:64]!r}, and the path names {model}.",
            param="model_name",
        )
    check_version(values.get("model_version"))


def _texts_by_input(tensors: object, binary: bytes) -> dict[str, list[str]]:
    """Return the texts of each input tensor; `binary` are the bytes behind the JSON.

    Raises InvalidInput unless there is a tensor of texts, alone or with one of the pairs' second
    texts.
    """
    if not isinstance(tensors, list) or not tensors:
        raise InvalidInput("inputs must be a list of tensors.", param="inputs")
    if not all(isinstance(tensor, dict) for tensor in tensors):
        raise InvalidInput("inputs must be a list of tensors.", param="inputs")
    names = [tensor.get("name") for tensor in tensors]
    if len(tensors) == 1:
        # A single tensor may have any name, as other servers use other names.
        names = [INPUTS[0]]
    if names not in ([INPUTS[0]], [*INPUTS], [*reversed(INPUTS)]):
        raise InvalidInput(
            f"inputs must be the tensor {INPUTS[0]}, and {INPUTS[1]} for pairs.", param="inputs"
        )
    texts = {}
    for name, tensor in zip(names, tensors, strict=True):
        texts[name], binary = _read_tensor(name, tensor, binary)
    return texts


def _texts_or_pairs(texts: list[str], pairs: list[str] | None) -> list[Any]:
    """Return `input` of our own format; raises InvalidInput if a text has no second text."""
    if pairs is None:
        return texts
    if len(pairs) != len(texts):
        raise InvalidInput(
            f"{INPUTS[1]} holds {len(pairs)} texts and {INPUTS[0]} {len(texts)}.", param=INPUTS[1]
        )
    return [{"text": text, "text_pair": pair} for text, pair in zip(texts, pairs, strict=True)]


def _read_tensor(name: str, tensor: dict[str, Any], binary: bytes) -> tuple[list[str], bytes]:
    """Return the texts of a BYTES tensor, and the bytes behind those that it has used."""
    known_fields(tensor, ("name", "shape", "datatype", "data", "parameters"), f"{name}.")
    if tensor.get("datatype") != "BYTES":
        raise InvalidInput(f"{name} must be of datatype BYTES.", param=name)
    count = _text_count(name, tensor.get("shape"))
    parameters = _parameters(tensor, f"{name}: ")
    content_type = parameters.get("content_type", "str")
    if content_type not in CONTENT_TYPES:
        raise InvalidInput(
            f"{name}: content_type is {str(content_type)[:64]!r}; it must be"
            f" {' or '.join(CONTENT_TYPES)}.",
            param=name,
        )
    size = parameters.get("binary_data_size")
    if size is None:
        texts = _flatten(tensor.get("data"))
    elif _is_integer(size) and 0 <= size <= len(binary):
        texts, binary = _unpack(binary[:size], name), binary[size:]
    else:
        raise InvalidInput(f"{name}: binary_data_size is not within the body.", param=name)
    if len(texts) != count or not all(isinstance(text, str) for text in texts):
        raise InvalidInput(f"{name} must hold {count} texts, as its shape says.", param=name)
    if content_type == "base64":
        texts = [_from_base64(text, name) for text in texts]
    return texts, binary


def _text_count(name: str, shape: object) -> int:
    """Return the N of a tensor's shape [N] or [N, 1]; raises InvalidInput for another shape."""
    if isinstance(shape, list) and shape and all(map(_is_integer, shape)):
        count, *others = shape
        if count > 0 and all(extent == 1 for extent in others):
            return int(count)
    raise InvalidInput(f"{name} must have the shape [N] or [N, 1].", param=name)


def _from_base64(text: str, name: str) -> str:
    try:
        return base64.b64decode(text, validate=True).decode()
    except ValueError:  # The base class of binascii's errors and of UTF-8's.
        raise InvalidInput(
            f"{name} holds a text that is not UTF-8 in base64, its content_type.", param=name
        ) from None


def _flatten(data: object) -> list[Any]:
    """Return the items of a tensor's data of shape [N] or [N, 1], or none if it is no list."""
    items = data if isinstance(data, list) else []
    return [item[0] if isinstance(item, list) and len(item) == 1 else item for item in items]


def _unpack(data: bytes, name: str) -> list[str]:
    """Return the strings of a binary tensor, each behind its length in four little-endian bytes."""
    texts, offset = [], 0
    while offset < len(data):
        if offset + 4 > len(data):
            raise InvalidInput(f"{name}: its bytes end within a length.", param=name)
        [length] = struct.unpack_from("<I", data, offset)
        content = data[offset + 4 : offset + 4 + length]
        if len(content) < length:
            raise InvalidInput(f"{name}: its bytes end within a text.", param=name)
        try:
            texts.append(content.decode())
        except UnicodeDecodeError:
            raise InvalidInput(f"{name}: a text is not UTF-8.", param=name) from None
        offset += 4 + length
    return texts


def _requested_outputs(values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the outputs to write, each with its parameters; all of them if none is named."""
    outputs = values.get("outputs") or [{"name": name} for name in OUTPUTS]
    if not isinstance(outputs, list) or not all(isinstance(output, dict) for output in outputs):
        raise InvalidInput("outputs must be a list of objects.", param="outputs")
    is_binary = _parameters(values).get("binary_data_output", False)
    requested: dict[str, dict[str, Any]] = {}
    for output in outputs:
        name = output.get("name")
        if name not in OUTPUTS:
            raise InvalidInput(f"outputs: known are {', '.join(OUTPUTS)}.", param="outputs")
        if name in requested:
            raise InvalidInput(
                f"outputs: {name} is named twice; name each output once.", param="outputs"
            )
        requested[name] = {"binary_data": is_binary} | _output_parameters(output)
    return requested


def _output_parameters(output: dict[str, Any]) -> dict[str, Any]:
    known_fields(output, ("name", "parameters"), "outputs.")
    parameters = _parameters(output, "outputs: ")
    labels = parameters.get("classification", 0)
    if not _is_integer(labels) or labels < 0:
        raise InvalidInput("outputs: classification must be a number of labels.", param="outputs")
    return parameters


def _parameters(owner: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the parameters of a request, a tensor or an output; `prefix` begins an error."""
    parameters = owner.get("parameters")
    if not isinstance(parameters, dict | None):
        raise InvalidInput(f"{prefix}parameters must be an object.", param="parameters")
    if parameters and "shared_memory_region" in parameters:
        raise InvalidInput(
            f"{prefix}shared memory is not supported; send tensors in the body.",
            param="parameters",
        )
    return parameters or {}


def _is_integer(value: Any) -> bool:
    """Return whether a JSON value is an integer; Python counts true and false as such."""
    return isinstance(value, int) and not isinstance(value, bool)


def _write_output(
    name: str, parameters: dict[str, Any], answers: Sequence[dict[str, Any]], labels: Sequence[str]
) -> tuple[dict[str, Any], bytes]:
    """Return an output tensor as JSON, and the bytes that follow the JSON."""
    shape = [len(answers)]
    data: list[Any]
    if max_labels := parameters.get("classification", 0):
        datatype, data = "BYTES", _ranked_labels(answers, max_labels, labels)
        shape.append(min(max_labels, len(labels)))
    elif name == "label":
        datatype, data = "BYTES", [answer["label"] for answer in answers]
    elif name == "score":
        datatype, data = "FP32", [answer["score"] for answer in answers]
    else:
        datatype, data = "FP32", list(chain.from_iterable(answer["probs"] for answer in answers))
        shape.append(len(labels))
    output: dict[str, Any] = {"name": name, "datatype": datatype, "shape": shape}
    if not parameters["binary_data"]:
        return output | {"data": data}, b""
    packed = _pack(data) if datatype == "BYTES" else np.array(data, "<f4").tobytes()
    return output | {"parameters": {"binary_data_size": len(packed)}}, packed


def _ranked_labels(
    answers: Sequence[dict[str, Any]], max_labels: int, labels: Sequence[str]
) -> list[str]:
    """Return each text's best labels as `score:index:label`, Triton's classification extension."""
    index_of = {label: index for index, label in enumerate(labels)}
    ranked = []
    for answer in answers:
        for label_score in answer["scores"][:max_labels]:
            label = label_score["label"]
            ranked.append(f"{label_score['score']}:{index_of[label]}:{label}")
    return ranked


def _pack(texts: Sequence[object]) -> bytes:
    """Return strings as a binary tensor; `_unpack` is the inverse."""
    encoded = [str(text).encode() for text in texts]
    return b"".join(struct.pack("<I", len(text)) + text for text in encoded)
