"""
Reads texts to calibrate and to gate with: one a line, or one JSON object a line.

    a charming and often affecting journey
    {"text": "Is it any good?", "text_pair": "It is very good.", "label": "POSITIVE"}

A file whose name ends in .jsonl holds objects; one that ends in .txt, or in nothing, holds plain
texts. Lines end with a line feed, with or without a carriage return; nothing else ends one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from command import BadInput, Unavailable
from export.checkpoint.reference import TextOrPair

SURROGATE = re.compile("[\ud800-\udfff]")
SHIPPED = Path(__file__).parent / "calibration.txt"


@dataclass(frozen=True)
class Labelled:
    """A text or a pair, and its right label where that is known."""

    text: TextOrPair
    label: str | None = None


def read_texts(path: Path, labels: Sequence[str]) -> list[Labelled]:
    """The texts of a file, each once, in order; BadInput names the line that cannot be used."""
    read = READERS.get(path.suffix.lower())
    if read is None:
        raise BadInput(
            f"{path}: a file of texts ends in {', '.join(filter(None, READERS))}, and has a text a"
            " line, or a JSON object with text a line."
        )
    try:
        # Not splitlines: it ends a line at eight more characters, which texts may hold.
        lines = [
            line.removesuffix("\r") for line in path.read_bytes().decode("utf-8-sig").split("\n")
        ]
    except OSError as error:
        raise Unavailable(f"{path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not UTF-8: {error.reason} at byte {error.start}.") from None
    found = [
        read(line, f"{path}, line {number}", labels)
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not found:
        raise BadInput(f"{path} holds no text.")
    return list({item.text: item for item in found}.values())


def without(texts: Sequence[Labelled], others: Collection[TextOrPair]) -> list[Labelled]:
    """Those of `texts` that are not among `others`."""
    known = set(others)
    return [item for item in texts if item.text not in known]


def _plain(line: str, where: str, labels: Sequence[str]) -> Labelled:
    return Labelled(line.strip())


def _object(line: str, where: str, labels: Sequence[str]) -> Labelled:
    try:
        values = json.loads(line)
    except ValueError as error:
        raise BadInput(f"{where} is not JSON: {error}.") from None
    if not isinstance(values, dict) or not values.keys() <= {"text", "text_pair", "label"}:
        raise BadInput(
            f"{where} must be an object with text, and with text_pair and label if they are known."
        )
    for name, value in values.items():
        if not isinstance(value, str) or not value.strip():
            raise BadInput(
                f"{where}: {name} is {json.dumps(value)[:40]}; it must be a string that is not"
                " empty."
            )
        if SURROGATE.search(value):
            raise BadInput(f"{where}: {name} holds half a surrogate pair, which is no character.")
    if "text" not in values:
        raise BadInput(f"{where} has no text.")
    label = values.get("label")
    if label is not None and label not in labels:
        raise BadInput(
            f"{where}: label {label!r} is none of the model's"
            f" ({', '.join(labels[:8])}{', …' if len(labels) > 8 else ''})."
        )
    return Labelled(
        (values["text"], values["text_pair"]) if "text_pair" in values else values["text"], label
    )


READERS: dict[str, Callable[[str, str, Sequence[str]], Labelled]] = {
    "": _plain,
    ".txt": _plain,
    ".jsonl": _object,
}
"""By what a file's name ends in."""
