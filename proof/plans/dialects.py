"""
How a classifier is asked in the words of the server it runs in.

A dialect is a path and the body of one text; the answer is read for its number of tokens alone.
Only our own service says in `Server-Timing` where the time went, so elsewhere nothing but the
time end to end can be claimed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from command import BadInput


@dataclass(frozen=True)
class Dialect:
    path: str
    body: Callable[[str | None, str], Mapping[str, Any]]
    """(model, text) → what is sent as JSON."""
    server_timing: bool = False
    """Whether answers say how long inference took."""


def _named(model: str | None, fields: Mapping[str, Any]) -> Mapping[str, Any]:
    return fields if model is None else {"model": model, **fields}


DIALECTS: Mapping[str, Dialect] = {
    "drbert": Dialect(
        "/classify", lambda model, text: _named(model, {"input": text}), server_timing=True
    ),
    "vllm": Dialect("/classify", lambda model, text: _named(model, {"input": text})),
    "infinity": Dialect("/classify", lambda model, text: _named(model, {"input": [text]})),
    # A flat list of two is a pair there; a bare string is one text. The server has one model.
    "tei": Dialect("/predict", lambda model, text: {"inputs": text}),
    "hf": Dialect("/", lambda model, text: {"inputs": text}),
    "kserve-v1": Dialect("/v1/models/{model}:predict", lambda model, text: {"instances": [text]}),
}


def tokens_of(answer: bytes) -> int:
    """The number of tokens an answer tells, or 0."""
    try:
        usage = json.loads(answer)["usage"]
        return int(usage["prompt_tokens"])
    except (ValueError, KeyError, TypeError):
        return 0


def headers_from(variable: str | None) -> dict[str, str]:
    """Headers, a `Name: value` a line, from an environment variable: secrets have no place in a
    plan.
    """
    if variable is None:
        return {}
    if variable not in os.environ:
        raise BadInput(f"The plan takes headers from the variable {variable}, which is not set.")
    lines = [line.partition(":") for line in os.environ[variable].splitlines() if line.strip()]
    if not all(colon for _, colon, _ in lines):
        raise BadInput(
            f"The variable {variable} holds a line without a colon; write `Name: value` lines."
        )
    headers = {name.strip(): value.strip() for name, _, value in lines}
    for name in headers:
        # They would make an arm slower, or its rows another's.
        if name.lower() in ("x-busy-wait", "x-request-id", "content-type", "content-length"):
            raise BadInput(
                f"The variable {variable} sets {name}, which is the proof's own; leave it out."
            )
    return headers
