"""
Texts to send, a line each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from command import Unavailable

TEXTS = Path("examples/texts/sentences.txt")


def evenly(texts: Sequence[str]) -> list[str]:
    """The same texts in an order in which any few in a row are about as long as all: who answers
    few of them answers what the others do.

    Those sorted by length, taken at steps of the golden ratio (a Weyl sequence).
    """
    ordered = sorted(texts, key=len)
    places = sorted(range(len(ordered)), key=lambda i: i * 0.6180339887498949 % 1.0)
    found = [""] * len(ordered)
    for text, place in zip(ordered, places, strict=True):
        found[place] = text
    return found


def read_lines(path: Path, most: int = 128) -> list[str]:
    """At most so many of the file's lines, spread over it."""
    try:
        lines = [line for line in path.read_text().splitlines() if line.strip()]
    except OSError as error:
        raise Unavailable(f"{path} cannot be read: {error.strerror}.") from None
    if not lines:
        raise Unavailable(f"{path} holds no text.")
    return lines[:: math.ceil(len(lines) / most)]
