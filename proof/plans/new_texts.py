"""
New texts for the level `repeat`: a text that no server can have seen, with a known length.

A cache that another level, an earlier restart or an earlier run has filled would also answer the
"first" request for a text of the plan. So each text has letters in front that depend on the run,
the restart, the block and the arm: two arms may be one model of one server, which share its cache.
"""

from __future__ import annotations

import hashlib

LETTERS = 8
"""Letters in front of a new text: 26^8 combinations."""
PREFIX_CHARS = 2 * LETTERS
"""Characters that they add: each letter is followed by a space."""
PREFIX_TOKENS = 2 * LETTERS
"""Tokens that they add at most: WordPiece reads a single letter as one, other tokenizers as two."""


def make_new(text: str, run: str, restart: int, block_id: int, arm: str) -> str:
    """Return the text with the letters of this block and arm in front."""
    digest = hashlib.sha256(f"{run} {restart} {block_id} {arm}".encode()).digest()
    letters = [chr(ord("a") + byte % 26) for byte in digest[:LETTERS]]
    return f"{' '.join(letters)} {text}"
