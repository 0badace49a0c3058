"""
The Open Inference Protocol (KServe's V2), as Triton's clients speak it: POST /v2/models/NAME/infer.

    {"inputs": [{"name": "text", "shape": [2], "datatype": "BYTES", "data": ["good", "bad"]}]}
    {"model_name": …, "outputs": [{"name": "label", …}, {"name": "score", …}, {"name":
        "probabilities", …}]}

A second input `text_pair` makes pairs. Tensors come and go as JSON or, after Triton's extension, as
bytes behind the JSON; an output asked for with `classification: k` becomes k strings
`score:index:label`, best first. The request's parameter `activation` is our own requests' field:
`none` gives logits.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import orjson

from service.errors import InvalidInput, InvalidJson, ServiceError, UnknownModel
from service.http.dialects import (
    JSON,
    Completed,
    Headers,
    RawRequest,
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
"""MLServer's words for what a tensor holds."""
JSON_LENGTH = b"inference-header-content-length"
VERSION = "1"


class OpenInference:
    def read(self, raw: RawRequest, limits: Limits) -> ClassifyRequest:
        check_version(raw.version)
        values, binary = _parts(raw, limits)
        known_fields(
            values, ("id", "inputs", "outputs", "parameters", "model_name", "model_version")
        )
        # KServe's client repeats the path's model and version in the body.
        if values.get("model_name") not in (None, raw.model):
            raise InvalidInput(
                f"model_name is {str(values['model_name'])[:64]!r}, and the path names"
                f" {raw.model}.",
                param="model_name",
            )
        check_version(values.get("model_version"))
        texts = _texts_by_input(values.get("inputs"), binary)
        raw.state["outputs"] = _wanted(values)
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
        found = [completed.classification(i) for i in range(len(completed.results))]
        outputs, tails = [], []
        for name, parameters in completed.raw.state["outputs"].items():
            output, tail = _tensor(name, parameters, found, completed.manifest.labels)
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
        return [
            (b"content-type", b"application/octet-stream"),
            (JSON_LENGTH, str(len(head)).encode()),
        ], [head, *tails]

    def refuse(self, error: ServiceError) -> tuple[int, Headers, bytes]:
        # The protocol knows 400 for whatever is wrong with a request.
        status, headers, body = plain_refusal(error)
        return (400 if status == 422 else status), headers, body


def check_version(version: object) -> None:
    """UnknownModel unless it is the one that there is, or none was asked for."""
    if version not in (None, VERSION):
        raise UnknownModel(
            f"There is no version {str(version)[:64]}; every model has version {VERSION} alone."
        )


def metadata(model: str, labels: Sequence[str], takes_pairs: bool) -> dict[str, Any]:
    """What GET /v2/models/NAME says."""
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


def _parts(raw: RawRequest, limits: Limits) -> tuple[dict[str, Any], bytes]:
    """The JSON and the bytes behind it."""
    declared = raw.headers.get(JSON_LENGTH)
    if declared is None:
        return read_object(raw.body, limits), b""
    # No more digits than the body's own length has: Python refuses to read thousands of them.
    if (
        not declared.isdigit()
        or len(declared) > len(str(len(raw.body)))
        or int(declared) > len(raw.body)
    ):
        raise InvalidJson("Inference-Header-Content-Length is no length within the body.")
    return read_object(raw.body[: int(declared)], limits), raw.body[int(declared) :]


def _texts_by_input(tensors: object, binary: bytes) -> dict[str, list[str]]:
    """Return the texts of each input tensor; `binary` are the bytes behind the JSON.

    InvalidInput unless there is the tensor of texts, alone or with that of the pairs' second
    halves.
    """
    if not isinstance(tensors, list) or not tensors:
        raise InvalidInput("inputs must be a list of tensors.", param="inputs")
    if not all(isinstance(tensor, dict) for tensor in tensors):
        raise InvalidInput("inputs must be a list of tensors.", param="inputs")
    names = [tensor.get("name") for tensor in tensors]
    if len(tensors) == 1:
        # A single tensor may have any name, as clients of other servers name it.
        names = [INPUTS[0]]
    if names not in ([INPUTS[0]], [*INPUTS], [*reversed(INPUTS)]):
        raise InvalidInput(
            f"inputs must be the tensor {INPUTS[0]}, and {INPUTS[1]} for pairs.", param="inputs"
        )
    texts = {}
    for name, tensor in zip(names, tensors, strict=True):
        texts[name], binary = _strings(name, tensor, binary)
    return texts


def _texts_or_pairs(texts: list[str], pairs: list[str] | None) -> list[Any]:
    """Return what our own request calls input; InvalidInput if a text has no second half."""
    if pairs is None:
        return texts
    if len(pairs) != len(texts):
        raise InvalidInput(
            f"{INPUTS[1]} holds {len(pairs)} texts and {INPUTS[0]} {len(texts)}.", param=INPUTS[1]
        )
    return [{"text": text, "text_pair": pair} for text, pair in zip(texts, pairs, strict=True)]


def _strings(name: str, tensor: dict[str, Any], binary: bytes) -> tuple[list[str], bytes]:
    """A BYTES tensor's texts, and what is left of the bytes."""
    known_fields(tensor, ("name", "shape", "datatype", "data", "parameters"), f"{name}.")
    shape = tensor.get("shape")
    if tensor.get("datatype") != "BYTES":
        raise InvalidInput(f"{name} must be of datatype BYTES.", param=name)
    if (
        not isinstance(shape, list)
        or not all(_is_number(extent) and extent > 0 for extent in shape)
        or not shape
        or any(extent != 1 for extent in shape[1:])
    ):
        raise InvalidInput(f"{name} must have the shape [N] or [N, 1].", param=name)
    parameters = _parameters(tensor, f"{name}: ")
    size, content = parameters.get("binary_data_size"), parameters.get("content_type", "str")
    if content not in CONTENT_TYPES:
        raise InvalidInput(
            f"{name}: content_type is {str(content)[:64]!r}; texts are of"
            f" {' or '.join(CONTENT_TYPES)}.",
            param=name,
        )
    if size is None:
        texts = _flat(tensor.get("data"))
    else:
        if not _is_number(size) or not 0 <= size <= len(binary):
            raise InvalidInput(f"{name}: binary_data_size is not within the body.", param=name)
        texts, binary = _unpacked(binary[:size], name), binary[size:]
    if len(texts) != shape[0] or not all(isinstance(text, str) for text in texts):
        raise InvalidInput(f"{name} must hold {shape[0]} texts, as its shape says.", param=name)
    return ([_from_base64(text, name) for text in texts] if content == "base64" else texts), binary


def _from_base64(text: str, name: str) -> str:
    try:
        return base64.b64decode(text, validate=True).decode()
    except ValueError:  # binascii's and UTF-8's errors are such.
        raise InvalidInput(
            f"{name} holds a text that is no UTF-8 in base64, which its content_type says.",
            param=name,
        ) from None


def _flat(data: Any) -> list[Any]:
    items = data if isinstance(data, list) else []
    return [item[0] if isinstance(item, list) and len(item) == 1 else item for item in items]


def _unpacked(data: bytes, name: str) -> list[str]:
    """Strings, each behind its length in four bytes, least significant first."""
    texts, place = [], 0
    while place < len(data):
        if place + 4 > len(data):
            raise InvalidInput(f"{name}: its bytes end within a length.", param=name)
        [length] = struct.unpack_from("<I", data, place)
        piece = data[place + 4 : place + 4 + length]
        if len(piece) < length:
            raise InvalidInput(f"{name}: its bytes end within a text.", param=name)
        try:
            texts.append(piece.decode())
        except UnicodeDecodeError:
            raise InvalidInput(f"{name}: a text is not UTF-8.", param=name) from None
        place += 4 + length
    return texts


def _wanted(values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The outputs to write, each with its parameters; all of them where none is asked for."""
    outputs = values.get("outputs") or [{"name": name} for name in OUTPUTS]
    if not isinstance(outputs, list) or not all(isinstance(output, dict) for output in outputs):
        raise InvalidInput("outputs must be a list of objects.", param="outputs")
    binary = _parameters(values).get("binary_data_output", False)
    found: dict[str, dict[str, Any]] = {}
    for output in outputs:
        if output.get("name") not in OUTPUTS:
            raise InvalidInput(f"outputs: known are {', '.join(OUTPUTS)}.", param="outputs")
        if output["name"] in found:
            raise InvalidInput(
                f"outputs: {output['name']} is named twice; ask for each output once.",
                param="outputs",
            )
        known_fields(output, ("name", "parameters"), "outputs.")
        parameters = _parameters(output, "outputs: ")
        most = parameters.get("classification", 0)
        if not _is_number(most) or most < 0:
            raise InvalidInput(
                "outputs: classification must be a number of labels.", param="outputs"
            )
        found[output["name"]] = {"binary_data": binary} | parameters
    return found


def _parameters(of: dict[str, Any], where: str = "") -> dict[str, Any]:
    parameters = of.get("parameters")
    if not isinstance(parameters, dict | None):
        raise InvalidInput(f"{where}parameters must be an object.", param="parameters")
    if parameters and "shared_memory_region" in parameters:
        raise InvalidInput(
            f"{where}shared memory is not supported; send tensors in the body.", param="parameters"
        )
    return parameters or {}


def _is_number(value: Any) -> bool:
    """A whole one; JSON's true and false are none, whatever Python says."""
    return isinstance(value, int) and not isinstance(value, bool)


def _tensor(
    name: str, parameters: dict[str, Any], found: Sequence[dict[str, Any]], labels: Sequence[str]
) -> tuple[dict[str, Any], bytes]:
    """One output as JSON, and the bytes that go behind it."""
    shape = [len(found)]
    if most := parameters.get("classification", 0):
        places = {label: i for i, label in enumerate(labels)}
        data: list[Any] = [
            f"{s['score']}:{places[s['label']]}:{s['label']}"
            for one in found
            for s in one["scores"][:most]
        ]
        datatype, shape = "BYTES", [len(found), min(most, len(labels))]
    elif name == "label":
        datatype, data = "BYTES", [one["label"] for one in found]
    elif name == "score":
        datatype, data = "FP32", [one["score"] for one in found]
    else:
        datatype, shape, data = (
            "FP32",
            [len(found), len(labels)],
            [p for one in found for p in one["probs"]],
        )
    output: dict[str, Any] = {"name": name, "datatype": datatype, "shape": shape}
    if not parameters["binary_data"]:
        return output | {"data": data}, b""
    if datatype == "BYTES":
        texts = [str(value).encode() for value in data]
        packed = b"".join(struct.pack("<I", len(text)) + text for text in texts)
    else:
        packed = np.array(data, "<f4").tobytes()
    return output | {"parameters": {"binary_data_size": len(packed)}}, packed
