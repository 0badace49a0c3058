"""
Refuses a tokenizer.json that would exhaust the process's memory or hold its interpreter.

A file can cost seconds to load, or to apply to a few characters, and stop the answers to everybody.
These limits catch what is known to be expensive. They do not prove that a tokenizer is harmless:
artifacts must be trusted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from service.artifact import TOKENIZER, TOKENIZER_BYTES, Artifact, ArtifactError
from service.host.files import read_regular

MAX_ADDED_TOKENS = 20_000
# The time to build a matcher grows with the square of it: 100,000 characters took 25 s.
ADDED_TOKEN_CHARS = 256
# Replacements may make a text at most so many times longer.
MAX_GROWTH = 256
# Size of a normalizer or pre-tokenizer as JSON; a charsmap of SentencePiece takes 350 kB.
STEP_BYTES = 4 * 1024 * 1024
TEMPLATE_BYTES = 256 * 1024
# Keys that change what a tokenizer does. They may stand after its vocabulary.
STEPS = ("added_tokens", "normalizer", "pre_tokenizer", "post_processor")
# A regular expression with one of these may match between two characters, and so add something to
# each character of a text.
MAY_MATCH_NOTHING = re.compile(r"\(\?|\\[bBGKAzZ]|[\^$*?|]|\{0|\{,|^$")


def read_tokenizer(artifact: Artifact) -> bytes:
    """Return the bytes of an artifact's tokenizer.json.

    Raises ArtifactError if it cannot be read or exceeds a limit.
    """
    try:
        content, _ = read_regular(artifact.path(TOKENIZER), TOKENIZER_BYTES)
        check_tokenizer(content)
        return content
    except (OSError, ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ArtifactError(
            f"{artifact.directory / TOKENIZER} cannot be used: {reason}; export it again."
        ) from None


def check_tokenizer(content: bytes) -> None:
    """Raise ValueError for a tokenizer.json that would cost too much to load or to use."""
    steps = _steps(content)
    for name, most in (
        ("normalizer", STEP_BYTES),
        ("pre_tokenizer", STEP_BYTES),
        ("post_processor", TEMPLATE_BYTES),
    ):
        size = len(json.dumps(steps.get(name)))
        if size > most:
            raise ValueError(f"its {name} has {size} bytes, the limit is {most}")
    tokens = steps.get("added_tokens")
    tokens = tokens if isinstance(tokens, list) else []
    if len(tokens) > MAX_ADDED_TOKENS:
        raise ValueError(f"it adds {len(tokens)} tokens, the limit is {MAX_ADDED_TOKENS}")
    longest = max(
        (len(str(token.get("content"))) for token in tokens if isinstance(token, dict)), default=0
    )
    if longest > ADDED_TOKEN_CHARS:
        raise ValueError(
            f"a token that it adds has {longest} characters, the limit is {ADDED_TOKEN_CHARS}"
        )
    growth = 1
    for step in _dicts([steps.get("normalizer"), steps.get("pre_tokenizer")]):
        growth = min(growth * _growth(step), 10**9)  # a message needs no more digits
    if growth > MAX_GROWTH:
        raise ValueError(
            f"its replacements make a text up to {growth} times longer, the limit is {MAX_GROWTH}"
        )


def _steps(content: bytes) -> dict[str, Any]:
    """Return a tokenizer.json without its vocabulary, which takes longest to parse."""
    head, key, vocabulary = content.partition(b'"model"')
    if (
        key
        and not any(f'"{name}"'.encode() in vocabulary for name in STEPS)
        and b"\\u00" not in vocabulary
    ):
        try:
            return _object(head + b'"model":null}')
        except ValueError:  # not the key, but another "model"
            pass
    return _object(content)


def _object(content: bytes) -> dict[str, Any]:
    value = json.loads(content)
    if not isinstance(value, dict):
        raise ValueError("it is no JSON object")
    return value


def _dicts(value: object) -> Iterator[dict[str, Any]]:
    """Yield every object in a value, the value included."""
    if isinstance(value, dict):
        yield value
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            yield from _dicts(part)


def _growth(step: dict[str, Any]) -> int:
    """Return how many times longer a step can make a text; 1 if it replaces nothing."""
    content, pattern = step.get("content"), step.get("pattern")
    if (
        step.get("type") != "Replace"
        or not isinstance(content, str)
        or not isinstance(pattern, dict)
    ):
        return 1
    expression = pattern.get("Regex")
    adds = isinstance(expression, str) and MAY_MATCH_NOTHING.search(expression) is not None
    return max(1, len(content) + adds)
