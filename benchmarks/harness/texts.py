"""
The texts that benchmarks send, one per line of a file.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from command import Unavailable

TEXTS = Path("examples/texts/sentences.txt")


def mix_lengths(texts: Sequence[str]) -> list[str]:
    """Return the texts in an order in which any few in a row are about as long as all of them.

    A server that answers few of them then answers the same mix as a fast one. The order takes the
    texts, sorted by length, at steps of the golden ratio (a Weyl sequence).
    """
    by_length = sorted(texts, key=len)
    positions = sorted(range(len(by_length)), key=lambda i: i * 0.6180339887498949 % 1.0)
    mixed = [""] * len(by_length)
    for text, position in zip(by_length, positions, strict=True):
        mixed[position] = text
    return mixed


def read_texts(path: Path, most: int = 128) -> list[str]:
    """Return at most `most` non-empty lines of a file, spread evenly over it.

    Raises Unavailable if the file cannot be read or has no text.
    """
    try:
        texts = [line for line in path.read_text().splitlines() if line.strip()]
    except OSError as error:
        raise Unavailable(
            f"{path} cannot be read: {error.strerror}. Pass a file with one text per line."
        ) from None
    if not texts:
        raise Unavailable(f"{path} has no text. Pass a file with one text per line.")
    return texts[:: math.ceil(len(texts) / most)]
