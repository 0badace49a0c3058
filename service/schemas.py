"""
The shape of a request and of an answer: a superset of vLLM's /classify.

Every refusal names the field, as `input[3]`, and the limit; none repeats the text.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import orjson
from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError, WithJsonSchema

from service.errors import InvalidInput, InvalidJson, TooLarge
from service.http.transport.bodies import check_structure


@dataclass(frozen=True, slots=True)
class Text:
    text: str
    pair: str | None = None
    where: str = "input"
    """What a refusal calls it."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one request may hold."""

    texts: int
    text_chars: int
    windows: int = 1
    """Of one text."""
    tokens: int | None = None
    """Of all texts together, as far as the model reads them."""
    items: int | None = None
    """Windows of all texts together."""


def _text(value: object, where: str) -> Text:
    if isinstance(value, str):
        _check_filled(value, where)
        return Text(value, where=where)
    if not isinstance(value, dict):
        raise InvalidInput(
            f"{where} is {_kind(value)}; a text is a string or an object with text and text_pair.",
            param=where,
        )
    if len(value) > 2 or not value.keys() <= {"text", "text_pair"}:
        raise InvalidInput(
            f"{where} has an unknown field; a text object holds text and text_pair only.",
            param=where,
        )
    for name in ("text", "text_pair"):
        half = value.get(name)
        if name == "text_pair" and half is None:
            continue
        if not isinstance(half, str):
            raise InvalidInput(
                f"{where}.{name} is {_kind(half)}; it must be a string.", param=f"{where}.{name}"
            )
        _check_filled(half, f"{where}.{name}")
    return Text(value["text"], value.get("text_pair"), where)


def _check_filled(text: str, where: str) -> None:
    if not text.strip():
        raise InvalidInput(
            f"{where} is empty; it must hold at least one visible character.", param=where
        )


def _texts(value: object) -> tuple[Text, ...]:
    if not isinstance(value, list):
        return (_text(value, "input"),)
    if not value:
        raise InvalidInput("input is an empty list; it must hold at least one text.", param="input")
    return tuple(_text(item, f"input[{i}]") for i, item in enumerate(value))


def _kind(value: object) -> str:
    names = {
        type(None): "null",
        bool: "a boolean",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), "missing")


_PAIR = {
    "type": "object",
    "required": ["text"],
    "additionalProperties": False,
    "properties": {
        "text": {"type": "string", "minLength": 1},
        "text_pair": {"type": "string", "minLength": 1},
    },
}
_ONE = {"anyOf": [{"type": "string", "minLength": 1}, _PAIR]}
_INPUT_SCHEMA = {"anyOf": [*_ONE["anyOf"], {"type": "array", "minItems": 1, "items": _ONE}]}

Activation = Literal["auto", "softmax", "sigmoid", "none"]


Pool = Literal["mean", "max", "first"]


class Window(BaseModel):
    """How a text that is longer than the model reads is cut into windows, and how their logits
    become one answer.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    stride: int | None = Field(
        default=None,
        ge=0,
        description=(
            "Tokens that neighbouring windows share, as in Hugging Face's tokenizers; by default"
            " 64, or half a window."
        ),
    )
    pool: Pool = Field(
        default="mean",
        description=(
            "Of the windows' logits, before the activation; `first` computes the first window only."
        ),
    )


class ClassifyRequest(BaseModel):
    """Texts to classify. `inputs` is accepted for `input`; a flat list of strings is a batch, not a
    pair.
    """

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        json_schema_extra={"example": {"input": "a charming and often affecting journey"}},
    )

    input: Annotated[tuple[Text, ...], PlainValidator(_texts), WithJsonSchema(_INPUT_SCHEMA)]
    model: str | None = Field(
        default=None, description="A loaded model's name; by default the first."
    )
    top_k: int | None = Field(
        default=None, ge=1, description="How many labels `scores` holds; by default all."
    )
    threshold: float | None = Field(
        default=None, ge=0, le=1, description="`scores` holds labels at or above it."
    )
    activation: Activation = Field(
        default="auto", description="What turns logits into probs; `auto` follows the model's task."
    )
    truncate: Literal["right", "left", "none"] | None = Field(
        default=None,
        description=(
            "Where a long text is cut, by default where the checkpoint's tokenizer does, mostly on"
            " the right; `none` refuses it with 422. Beside `window` only `right`."
        ),
    )
    window: Window | None = Field(
        default=None,
        description="Classifies a long text by windows instead of cutting it; single texts only.",
    )
    user: str | None = Field(default=None, description="Accepted and ignored.")
    request_id: str | None = Field(
        default=None, max_length=128, description="Used as the answer's id."
    )
    use_activation: bool | None = Field(
        default=None, description="vLLM's name: false means activation none."
    )
    truncate_prompt_tokens: int | None = Field(
        default=None,
        ge=-1,
        description=(
            "vLLM's name: how many tokens of a long text stay, if that is less than the model"
            " reads; -1 is the model's own limit."
        ),
    )
    truncation_side: Literal["right", "left"] | None = Field(
        default=None, description="vLLM's name for `truncate` left or right."
    )
    probs: bool = Field(
        default=True,
        description=(
            "Whether the answer holds `probs`: of thousands of labels, `scores` cut by `top_k` are"
            " all that is wanted."
        ),
    )
    cache_salt: str | None = Field(
        default=None, description="vLLM's name: accepted and ignored, nothing is cached."
    )
    padding: None = Field(default=None, description="vLLM's name: null.")
    mm_processor_kwargs: None = Field(default=None, description="vLLM's name: null.")
    add_special_tokens: Literal[True] = Field(default=True, description="vLLM's name: always true.")
    priority: int = Field(default=0, ge=0, le=0, description="vLLM's name: there is one priority.")

    @property
    def most_tokens(self) -> int | None:
        """How many tokens of each text or pair are read, if that is less than the model reads."""
        return None if self.truncate_prompt_tokens == -1 else self.truncate_prompt_tokens


class LabelScore(BaseModel):
    label: str
    score: float


class Classification(BaseModel):
    """One text's answer."""

    index: int
    label: str = Field(description="The best label.")
    score: float = Field(description="The best label's probability; for regression the value.")
    labels: list[str] | None = Field(
        default=None, description="Multi-label only: every label above the threshold (0.5)."
    )
    probs: list[float] | None = Field(
        default=None,
        description="Of every label in the model's order, unless the request says `probs: false`.",
    )
    num_classes: int
    scores: list[LabelScore] = Field(description="Best first, cut by top_k and threshold.")
    tokens: int = Field(description="That the model read; of all windows together.")
    truncated: bool
    windows: int | None = Field(
        default=None, description="How many windows the text took; only where they were asked for."
    )


class Usage(BaseModel):
    prompt_tokens: int
    total_tokens: int
    completion_tokens: int = 0


class ClassifyAnswer(BaseModel):
    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[Classification]
    usage: Usage


def own_request(values: dict[str, Any], limits: Limits) -> ClassifyRequest:
    """The request in our own shape that these fields make."""
    if "messages" in values:
        raise InvalidInput("messages is not supported; give the text as input.", param="messages")
    if "inputs" in values:
        if "input" in values:
            raise InvalidInput(
                "input and inputs are the same field; give one of them.", param="inputs"
            )
        values["input"] = values.pop("inputs")
    return read_values(known_fields(values, ClassifyRequest.model_fields), limits)


def read_object(body: bytes, limits: Limits) -> dict[str, Any]:
    """The JSON object in a body; InvalidJson or InvalidInput if it is none, TooLarge if it is more
    than a request needs.
    """
    check_structure(body, limits.texts)
    try:
        values = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidJson(f"The body is not UTF-8 JSON: {_where(error)}.") from None
    if not isinstance(values, dict):
        raise InvalidInput(
            f"The body is {_kind(values) if not isinstance(values, str) else 'a string'}; it must"
            " be an object."
        )
    return values


def known_fields(values: dict[str, Any], known: Collection[str], where: str = "") -> dict[str, Any]:
    """`values`, unless one of them is none of the known fields."""
    # Before pydantic, which would make an error object for each of a million unknown fields.
    unknown = next((name for name in values if name not in known), None)
    if unknown is not None:
        raise InvalidInput(
            f"{where}{unknown[:64]} is no field of this request; known are {', '.join(known)}.",
            param=f"{where}{unknown[:64]}",
        )
    return values


def read_values(values: dict[str, Any], limits: Limits) -> ClassifyRequest:
    """The request that these fields make."""
    _check_limits(values.get("input"), limits)
    try:
        asked = ClassifyRequest.model_validate(values)
    except ValidationError as error:
        raise _refusal(error) from None
    if asked.truncation_side is not None:
        if asked.truncate not in (None, asked.truncation_side):
            raise InvalidInput(
                f"truncate is {asked.truncate} and truncation_side {asked.truncation_side}; give"
                " one of them.",
                param="truncation_side",
            )
        asked.truncate = asked.truncation_side
    if asked.truncate_prompt_tokens == 0:
        raise InvalidInput(
            "truncate_prompt_tokens is 0, which leaves no token; give more, or -1 for the model's"
            " own limit.",
            param="truncate_prompt_tokens",
        )
    if asked.most_tokens is not None and (asked.window is not None or asked.truncate == "none"):
        other = "window" if asked.window is not None else "truncate none"
        raise InvalidInput(
            f"truncate_prompt_tokens and {other} do not go together; leave one of them out.",
            param="truncate_prompt_tokens",
        )
    if asked.window is not None and asked.truncate not in (None, "right"):
        raise InvalidInput(
            f"truncate {asked.truncate} and window do not go together: windows read a text to its"
            " end; leave one of them out.",
            param="truncate",
        )
    return asked


def _check_limits(value: object, limits: Limits) -> None:
    """Limits come first: nothing is built from a list or a text that is over them."""
    items = value if isinstance(value, list) else [value]
    if len(items) > limits.texts:
        raise TooLarge(
            f"input holds {len(items)} texts, the limit is {limits.texts}; send several requests.",
            param="input",
        )
    for i, item in enumerate(items):
        place = f"input[{i}]" if isinstance(value, list) else "input"
        halves = (
            {f"{place}.{name}": item.get(name) for name in ("text", "text_pair")}
            if isinstance(item, dict)
            else {place: item}
        )
        for where, half in halves.items():
            if isinstance(half, str) and len(half) > limits.text_chars:
                raise TooLarge(
                    f"{where} has {len(half)} characters, the limit is {limits.text_chars}.",
                    param=where,
                )


def _where(error: orjson.JSONDecodeError) -> str:
    # The message of orjson is "what: line 1 column 5 (char 4)"; it never quotes the document.
    return str(error)


def _refusal(error: ValidationError) -> InvalidInput:
    first = error.errors(include_url=False, include_input=False)[0]
    field = ".".join(str(part) for part in first["loc"])
    if first["type"] == "missing":
        return InvalidInput(f"{field} is missing.", param=field)
    return InvalidInput(f"{field}: {first['msg']}.", param=field)
