"""
Reads texts for calibration and for the accuracy gate: one per line, or one JSON object per line.

    a charming and often affecting journey
    {"text": "Is it any good?", "text_pair": "It is very good.", "label": "POSITIVE"}

A file whose name ends in .jsonl holds objects. A file that ends in .txt, or has no suffix, holds
plain texts. Lines end with a line feed, with or without a carriage return, and with nothing else.
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
BUNDLED_TEXTS = Path(__file__).parent / "calibration.txt"
"""File of calibration texts that comes with the package."""
OBJECT_FIELDS = {"text", "text_pair", "label"}


@dataclass(frozen=True)
class LabelledText:
    """A text or a pair, and its right label if it is known."""

    text: TextOrPair
    label: str | None = None


def read_texts(path: Path, labels: Sequence[str]) -> list[LabelledText]:
    """Return the distinct texts of a file, in order.

    Raises BadInput with the line that cannot be used, and Unavailable if the file cannot be read.
    """
    parse = PARSERS.get(path.suffix.lower())
    if parse is None:
        raise BadInput(
            f"{path} ends in {path.suffix!r}. Use a .txt file with one text per line, or a .jsonl"
            " file with one object per line that has a text."
        )
    try:
        content = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise Unavailable(f"{path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise BadInput(
            f"{path} is not UTF-8: {error.reason} at byte {error.start}. Save it as UTF-8."
        ) from None
    texts: dict[TextOrPair, LabelledText] = {}
    # Not splitlines: it also splits at eight other characters, which texts may contain.
    for number, line in enumerate(content.split("\n"), 1):
        if line.strip():
            item = parse(line.removesuffix("\r"), f"{path}, line {number}", labels)
            texts[item.text] = item
    if not texts:
        raise BadInput(f"{path} holds no text; it needs at least one line that is not blank.")
    return list(texts.values())


def excluding(
    texts: Sequence[LabelledText], excluded: Collection[TextOrPair]
) -> list[LabelledText]:
    """Return the items of `texts` whose text is not in `excluded`."""
    known = set(excluded)
    return [item for item in texts if item.text not in known]


def _parse_plain(line: str, location: str, labels: Sequence[str]) -> LabelledText:
    return LabelledText(line.strip())


def _parse_object(line: str, location: str, labels: Sequence[str]) -> LabelledText:
    try:
        values = json.loads(line)
    except ValueError as error:
        raise BadInput(f"{location} is not JSON: {error}.") from None
    if not isinstance(values, dict) or not values.keys() <= OBJECT_FIELDS:
        raise BadInput(
            f"{location} must be an object with a text, and optionally a text_pair and a label."
        )
    for name, value in values.items():
        if not isinstance(value, str) or not value.strip():
            raise BadInput(
                f"{location}: {name} is {json.dumps(value)[:40]}; it must be a string that is not"
                " empty."
            )
        if SURROGATE.search(value):
            raise BadInput(
                f"{location}: {name} holds half of a surrogate pair, which is not a character."
            )
    if "text" not in values:
        raise BadInput(f"{location} has no text.")
    label = values.get("label")
    if label is not None and label not in labels:
        names = ", ".join(labels[:8]) + (", …" if len(labels) > 8 else "")
        raise BadInput(f"{location}: label {label!r} is not a label of the model ({names}).")
    if "text_pair" in values:
        return LabelledText((values["text"], values["text_pair"]), label)
    return LabelledText(values["text"], label)


PARSERS: dict[str, Callable[[str, str, Sequence[str]], LabelledText]] = {
    "": _parse_plain,
    ".txt": _parse_plain,
    ".jsonl": _parse_object,
}
"""Parser of a line by the suffix of the file's name, in lower case."""
