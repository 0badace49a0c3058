"""
How one text is sent to a server, and how its answer is read.

A format is a dialect's name, or a mapping for a home-made server:

    {"path": "/predict", "body": {"text": "{text}"}, "label": "result.label",
     "score": "result.score"}
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

from command import BadInput, BadUsage
from proof.plans.answers import Scores, read_scores
from proof.plans.dialects import DIALECTS, DialectName

UNREADABLE = (KeyError, TypeError, ValueError, IndexError, OverflowError, AttributeError)
"""What reading an answer raises if it is no classification."""


@dataclass(frozen=True)
class Answer:
    """A server's answer for one text."""

    label: str
    """The best label, or the one that the server names."""
    scores: Mapping[str, float]
    """Score of each label in the answer."""


@dataclass(frozen=True)
class Format:
    """How one text is sent to a server, and how its answer is read."""

    name: str
    path: str
    body: Callable[[str], Any]
    """Text → the request's JSON."""
    read: Callable[[Any], Answer]
    """The answer's JSON → the answer; raises one of UNREADABLE."""
    model: str | None = None
    """The model that requests name; None: the server's default."""


def printable(text: str) -> str:
    """Return a text whose control characters, and half characters, are replaced."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)


def dialect_format(name: DialectName, model: str | None) -> Format:
    """Return a dialect as a format."""
    dialect = DIALECTS[name]
    path = dialect.path.format(model=model or "")
    return Format(name, path, lambda text: dialect.body(model, text), _read_dialect, model)


def plain_format(path: str, field_name: str) -> Format:
    """Return the format of a home-made server that takes the text in one field."""
    return Format(f"plain {field_name!r}", path, lambda text: {field_name: text}, _read_plain)


def _read_dialect(body: Any) -> Answer:
    scores, label = read_scores(body)
    return _answer(scores, label)


def _read_plain(body: Any) -> Answer:
    """Read a pipeline's answer as home-made servers pass it on."""
    if isinstance(body, dict) and "label" in body:
        label = str(body["label"])
        return Answer(label, {label: float(body.get("score", 1.0))})
    if isinstance(body, dict) and len(body) == 1:
        [body] = body.values()
    return _read_dialect(body)


def _answer(scores: Scores, label: str | None = None) -> Answer:
    best = max(scores, key=lambda each: each[1])[0]
    named = {printable(name): score for name, score in scores}
    return Answer(printable(best if label is None else label), named)


def parse_format(text: str, model: str | None) -> Format:
    """Return the format of a dialect's name, of a mapping as JSON, or of a file with one.

    Raises BadUsage for anything else.
    """
    if text in get_args(DialectName):
        return dialect_format(cast(DialectName, text), model)
    if text.lstrip().startswith("{"):
        return mapping_format(text, "the mapping")
    path = Path(text)
    if path.is_file():
        return mapping_format(path.read_text(encoding="utf-8"), text)
    raise BadUsage(
        f"{text} is no format: give one of {', '.join(get_args(DialectName))}, a mapping"
        ' such as \'{"path": "/predict", "body": {"text": "{text}"}, "label": "label", "score":'
        ' "score"}\', or a file with one.'
    )


def mapping_format(text: str, name: str) -> Format:
    """Return the format of a mapping in JSON; raises BadInput if a key is missing or unknown.

    `path` and `body` are the request's; "{text}" in the body stands for the text. `label` and
    `score` are the places of the best answer in the response, as `result.0.label`. With `scores`
    instead, the place of a list of {"label", "score"}.
    """
    try:
        values = json.loads(text)
    except ValueError as error:
        raise BadInput(f"{name} is not JSON: {error}.") from None
    if not isinstance(values, dict):
        raise BadInput(f"{name} is not a JSON object.")
    unknown = sorted(values.keys() - {"path", "body", "label", "score", "scores"})
    if unknown:
        raise BadInput(
            f"{name} has an unknown key {unknown[0]!r}; known are path, body, label, score, scores."
        )
    if "path" not in values or "body" not in values or not ({"label", "scores"} & values.keys()):
        raise BadInput(f"{name} needs path, body, and label or scores.")
    body, path = values["body"], str(values["path"])
    if "{text}" not in json.dumps(body):
        raise BadInput(f'{name}: body has no "{{text}}", which stands for the text.')

    def read(answer: Any) -> Answer:
        if "scores" in values:
            entries = _at(answer, str(values["scores"]))
            return _answer([(str(each["label"]), float(each["score"])) for each in entries])
        label = printable(str(_at(answer, str(values["label"]))))
        score = float(_at(answer, str(values["score"]))) if "score" in values else 1.0
        return Answer(label, {label: score})

    return Format(
        "mapping", path if path.startswith("/") else f"/{path}", lambda t: _filled(body, t), read
    )


def _at(value: Any, place: str) -> Any:
    """Return what lies at `result.0.label` in nested dictionaries and lists."""
    for part in filter(None, place.split(".")):
        value = value[int(part)] if isinstance(value, list) else value[part]
    return value


def _filled(body: Any, text: str) -> Any:
    """Return a body with the text in place of "{text}"."""
    if isinstance(body, dict):
        return {key: _filled(value, text) for key, value in body.items()}
    if isinstance(body, list):
        return [_filled(value, text) for value in body]
    return body.replace("{text}", text) if isinstance(body, str) else body
