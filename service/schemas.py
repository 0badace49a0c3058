"""
The schema of a request and of an answer: a superset of vLLM's /classify.

Every refusal names the field, such as `input[3]`, and the limit. None repeats the text.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import orjson
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    PrivateAttr,
    ValidationError,
    WithJsonSchema,
)

from service.errors import InvalidInput, InvalidJson, TooLarge
from service.requests.json_structure import check_structure
from service.requests.zero_shot import TEMPLATE, Question


@dataclass(slots=True)  # not frozen: several are made per request, and that costs more
class Text:
    """A text or a pair to classify."""

    text: str
    pair: str | None = None
    field: str = "input"
    """Its name in a refusal."""
    keeps_pair: bool = False
    """Whether only the text is cut where the pair is too long, and `pair` stays whole."""
    pair_tokens: int | None = None
    """Tokens of `pair` that stay, before the whole is cut; None: all."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one request may hold; None is no limit."""

    texts: int
    """Number of texts."""
    text_chars: int
    """Characters of one text, or of each half of a pair."""
    windows: int = 1
    """Windows of one text."""
    tokens: int | None = None
    """Tokens of all texts together, as far as the model reads them."""
    items: int | None = None
    """Windows of all texts together."""
    pair_chars: int | None = None
    """Characters of all pairs that the service makes of a request's texts, together."""


def _text(value: object, field: str) -> Text:
    if isinstance(value, str):
        check_filled(value, field)
        return Text(value, field=field)
    if not isinstance(value, dict):
        raise InvalidInput(
            f"{field} is {_kind(value)}; a text is a string or an object with text and text_pair.",
            param=field,
        )
    if len(value) > 2 or not value.keys() <= {"text", "text_pair"}:
        raise InvalidInput(
            f"{field} has an unknown field; a text object holds text and text_pair only.",
            param=field,
        )
    for name in ("text", "text_pair"):
        half = value.get(name)
        if name == "text_pair" and half is None:
            continue
        if not isinstance(half, str):
            raise InvalidInput(
                f"{field}.{name} is {_kind(half)}; it must be a string.", param=f"{field}.{name}"
            )
        check_filled(half, f"{field}.{name}")
    return Text(value["text"], value.get("text_pair"), field)


def check_filled(text: str, field: str) -> None:
    """Raise InvalidInput, which names the field, for a text without a visible character."""
    if not text.strip():
        raise InvalidInput(
            f"{field} is empty; it must hold at least one visible character.", param=field
        )


def _texts(value: object) -> tuple[Text, ...]:
    if not isinstance(value, list):
        return (_text(value, "input"),)
    if not value:
        raise InvalidInput("input is an empty list; it must hold at least one text.", param="input")
    return tuple(_text(item, f"input[{i}]") for i, item in enumerate(value))


def _strings(value: object, field: str) -> tuple[str, ...] | None:
    # Not by pydantic, which would make an error object for each of thousands of wrong strings.
    if value is None:
        return None
    if not isinstance(value, list):
        raise InvalidInput(
            f"{field} is {'a string' if isinstance(value, str) else _kind(value)}; it must be a"
            " list of strings.",
            param=field,
        )
    for place, item in enumerate(value):
        if not isinstance(item, str):
            raise InvalidInput(
                f"{field}[{place}] is {_kind(item)}; it must be a string.",
                param=f"{field}[{place}]",
            )
    return tuple(value)


def _labels(value: object) -> tuple[str, ...] | None:
    return _strings(value, "labels")


def _heads(value: object) -> tuple[str, ...] | None:
    heads = _strings(value, "heads")
    if heads == ():
        raise InvalidInput(
            "heads is an empty list; name at least one head, or leave it out for the main one.",
            param="heads",
        )
    return heads


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


_PAIR_SCHEMA = {
    "type": "object",
    "required": ["text"],
    "additionalProperties": False,
    "properties": {
        "text": {"type": "string", "minLength": 1},
        "text_pair": {"type": "string", "minLength": 1},
    },
}
_TEXT_SCHEMA = {"anyOf": [{"type": "string", "minLength": 1}, _PAIR_SCHEMA]}
_LABELS_SCHEMA = {
    "anyOf": [
        {"type": "array", "minItems": 1, "items": {"type": "string", "minLength": 1}},
        {"type": "null"},
    ]
}
_INPUT_SCHEMA = {
    "anyOf": [*_TEXT_SCHEMA["anyOf"], {"type": "array", "minItems": 1, "items": _TEXT_SCHEMA}]
}

Activation = Literal["auto", "softmax", "sigmoid", "none"]


Pool = Literal["mean", "max", "first"]


class Window(BaseModel):
    """How a text that is longer than the model reads is cut into windows, and how their logits are
    pooled.
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
            " the right; `none` refuses it with 422. With `window`, only `right`."
        ),
    )
    window: Window | None = Field(
        default=None,
        description="Classifies a long text by windows instead of cutting it; single texts only.",
    )
    labels: Annotated[
        tuple[str, ...] | None, PlainValidator(_labels), WithJsonSchema(_LABELS_SCHEMA)
    ] = Field(
        default=None,
        description=(
            "Zero-shot: judges each text by these labels. For models of natural language inference."
        ),
    )
    heads: Annotated[
        tuple[str, ...] | None, PlainValidator(_heads), WithJsonSchema(_LABELS_SCHEMA)
    ] = Field(
        default=None,
        description=(
            "Heads that answer, of a model with several. The text is computed once; without it the"
            " main head answers."
        ),
    )
    hypothesis_template: str | None = Field(
        default=None,
        description=(
            f"With `labels`: the sentence about a text, with {{}} for the label; by default"
            f" `{TEMPLATE}`"
        ),
    )
    multi_label: bool | None = Field(
        default=None,
        description=(
            "With `labels`: whether several may apply. Each then has a score by itself; otherwise"
            " the scores add up to 1."
        ),
    )
    entailment_label: str | None = Field(
        default=None,
        description="With `labels`: the model's label for entailment, if it is not named so.",
    )
    contradiction_label: str | None = Field(
        default=None,
        description="With `labels`: the model's label for contradiction, if it is not named so.",
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

    _question: Question | None = PrivateAttr(default=None)

    @property
    def question(self) -> Question | None:
        """The labels to judge the texts by. `input` then holds a pair for each text and label."""
        return self._question

    @property
    def max_tokens(self) -> int | None:
        """Tokens to read of each text or pair, if a limit was given."""
        return None if self.truncate_prompt_tokens == -1 else self.truncate_prompt_tokens


class LabelScore(BaseModel):
    """A label with its probability, or its logit where no activation is applied."""

    label: str
    score: float


class HeadAnswer(BaseModel):
    """What one head of a model with several says about a text."""

    label: str = Field(description="The best label.")
    score: float = Field(description="The best label's probability; for regression the value.")
    labels: list[str] | None = Field(
        default=None, description="Multi-label only: every label above the threshold (0.5)."
    )
    probs: list[float] | None = Field(
        default=None,
        description="Of every label in the head's order, unless the request says `probs: false`.",
    )
    num_classes: int
    scores: list[LabelScore] = Field(description="Best first, cut by top_k and threshold.")


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
        default=None,
        description="How many windows the text took, if the request asked for windows.",
    )
    cached: bool | None = Field(
        default=None,
        description="True if it was computed for an equal text (only with DRBERT_CACHE_MIB).",
    )
    heads: dict[str, HeadAnswer] | None = Field(
        default=None, description="The answer of each head that the request names."
    )


class Usage(BaseModel):
    """Token counts as OpenAI's clients expect them."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int = 0


class ClassifyAnswer(BaseModel):
    """The answer to a ClassifyRequest, one Classification for each text."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[Classification]
    usage: Usage


def native_request(values: dict[str, Any], limits: Limits) -> ClassifyRequest:
    """Return the request of these fields in our own format, in which `inputs` means `input`."""
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
    """Return the JSON object of a body.

    Raises InvalidJson or InvalidInput if it is none, TooLarge if it holds more than it may.
    """
    check_structure(body, limits.texts)
    try:
        values = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidJson(f"The body is not UTF-8 JSON: {_position(error)}.") from None
    if not isinstance(values, dict):
        raise InvalidInput(
            f"The body is {_kind(values) if not isinstance(values, str) else 'a string'}; it must"
            " be an object."
        )
    return values


NAMES_OF_TEXTS = frozenset(
    {"content", "document", "inputs", "instances", "prompt", "query", "sentence", "sentences"}
    | {"sequence", "sequences", "text", "text_pair", "texts"}
)
"""Names that other services have for the texts of a request."""


def known_fields(values: dict[str, Any], known: Collection[str], field: str = "") -> dict[str, Any]:
    """Return `values`; raises InvalidInput if one of them is not a known field."""
    # Not by pydantic, which would make an error object for each of a million unknown fields.
    unknown = next((name for name in values if name not in known), None)
    if unknown is not None:
        name = unknown[:64]
        meant = _likely_field(name, known)
        hint = f"did you mean {field}{meant}? Known" if meant else "known"
        raise InvalidInput(
            f"{field}{name} is not a field of this request; {hint} are {', '.join(known)}.",
            param=f"{field}{name}",
        )
    return values


def _likely_field(name: str, known: Collection[str]) -> str | None:
    """Return the field that an unknown name probably means; None if none is close."""
    if name.lower() in NAMES_OF_TEXTS:
        return next((each for each in ("input", "inputs", "instances") if each in known), None)
    return next(iter(difflib.get_close_matches(name, known, 1)), None)


def read_values(values: dict[str, Any], limits: Limits) -> ClassifyRequest:
    """Return the request of these fields; raises InvalidInput or TooLarge."""
    _check_limits(values.get("input"), limits)
    try:
        request = ClassifyRequest.model_validate(values)
    except ValidationError as error:
        raise _refusal(error) from None
    if request.truncation_side is not None:
        if request.truncate not in (None, request.truncation_side):
            raise InvalidInput(
                f"truncate is {request.truncate} and truncation_side {request.truncation_side};"
                " give one of them.",
                param="truncation_side",
            )
        request.truncate = request.truncation_side
    if request.truncate_prompt_tokens == 0:
        raise InvalidInput(
            "truncate_prompt_tokens is 0, which leaves no token; give more, or -1 for the model's"
            " own limit.",
            param="truncate_prompt_tokens",
        )
    if request.max_tokens is not None and (
        request.window is not None or request.truncate == "none"
    ):
        other = "window" if request.window is not None else "truncate none"
        raise InvalidInput(
            f"truncate_prompt_tokens and {other} do not go together; leave one of them out.",
            param="truncate_prompt_tokens",
        )
    if request.window is not None and request.truncate not in (None, "right"):
        raise InvalidInput(
            f"truncate {request.truncate} and window do not go together: windows read a text to its"
            " end; leave one of them out.",
            param="truncate",
        )
    _add_question(request, limits)
    return request


ABOUT_LABELS = ("hypothesis_template", "multi_label", "entailment_label", "contradiction_label")
"""Fields that have a meaning only with `labels`."""


def _add_question(request: ClassifyRequest, limits: Limits) -> None:
    """Replace the texts by their pairs with each label, if the request has labels.

    Raises InvalidInput or TooLarge if they cannot be judged by these labels.
    """
    if request.labels is None:
        for name in ABOUT_LABELS:
            if getattr(request, name) is not None:
                raise InvalidInput(
                    f"{name} has a meaning only with labels, and there are none.", param=name
                )
        return
    if request.window is not None:
        raise InvalidInput(
            "window and labels do not go together; leave one of them out.", param="window"
        )
    if request.activation != "auto" or request.use_activation is False:
        raise InvalidInput(
            "activation and labels do not go together: the score of a label is a probability.",
            param="activation",
        )
    pairs = len(request.input) * len(request.labels)
    if pairs > limits.texts:
        raise TooLarge(
            f"labels and texts make {pairs} pairs, the limit is {limits.texts}; send several"
            " requests.",
            param="labels",
        )
    question = Question(
        labels=request.labels,
        template=TEMPLATE if request.hypothesis_template is None else request.hypothesis_template,
        multi_label=bool(request.multi_label),
        entailment_label=request.entailment_label,
        contradiction_label=request.contradiction_label,
    )
    hypotheses = question.hypotheses
    chars = sum([len(text.text) for text in request.input]) * len(hypotheses)
    chars += sum(map(len, hypotheses)) * len(request.input)
    check_pair_chars(chars, "labels and texts", "labels", limits)
    for text in request.input:
        if text.pair is not None:
            field = f"{text.field}.text_pair"
            raise InvalidInput(
                f"{field}: labels judge single texts; leave out text_pair.", param=field
            )
    request.input = tuple(
        Text(text.text, hypothesis, text.field, keeps_pair=True)
        for text in request.input
        for hypothesis in hypotheses
    )
    request._question = question


def check_pair_chars(chars: int, parts: str, param: str, limits: Limits) -> None:
    """Raise TooLarge if pairs that the service makes have too many characters together.

    One long text in a thousand pairs is tokenized a thousand times, and is in the body once.
    """
    if limits.pair_chars is not None and chars > limits.pair_chars:
        raise TooLarge(
            f"{parts} make pairs of {chars} characters together, the limit is"
            f" {limits.pair_chars}; send several requests.",
            param=param,
        )


def check_text_chars(text: str, field: str, limits: Limits) -> None:
    """Raise TooLarge, which names the field, for a text that is too long."""
    if len(text) > limits.text_chars:
        raise TooLarge(
            f"{field} has {len(text)} characters, the limit is {limits.text_chars}.", param=field
        )


def _check_limits(value: object, limits: Limits) -> None:
    """Check the limits before anything is built from a list or a text that exceeds them."""
    items = value if isinstance(value, list) else [value]
    if len(items) > limits.texts:
        raise TooLarge(
            f"input holds {len(items)} texts, the limit is {limits.texts}; send several requests.",
            param="input",
        )
    for i, item in enumerate(items):
        text = f"input[{i}]" if isinstance(value, list) else "input"
        halves = {text: item}
        if isinstance(item, dict):
            halves = {f"{text}.{name}": item.get(name) for name in ("text", "text_pair")}
        for field, half in halves.items():
            if isinstance(half, str):
                check_text_chars(half, field, limits)


def _position(error: orjson.JSONDecodeError) -> str:
    # orjson's message ends with "line 1 column 5 (char 4)"; it never quotes the document.
    return str(error)


def _refusal(error: ValidationError) -> InvalidInput:
    first = error.errors(include_url=False, include_input=False)[0]
    field = ".".join(str(part) for part in first["loc"])
    if first["type"] == "missing":
        return InvalidInput(f"{field} is missing.", param=field)
    return InvalidInput(f"{field}: {first['msg']}.", param=field)
