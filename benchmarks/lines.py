"""
Texts to send, a line each.
"""

from __future__ import annotations

import math
from pathlib import Path

from command import Unavailable

TEXTS = Path("examples/texts/sentences.txt")


def read_lines(path: Path, most: int = 128) -> list[str]:
    """At most so many of the file's lines, spread over it."""
    try:
        lines = [line for line in path.read_text().splitlines() if line.strip()]
    except OSError as error:
        raise Unavailable(f"{path} cannot be read: {error.strerror}.") from None
    if not lines:
        raise Unavailable(f"{path} holds no text.")
    return lines[:: math.ceil(len(lines) / most)]
