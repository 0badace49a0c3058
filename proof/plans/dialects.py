"""
API dialects of the servers that a plan can measure.

A dialect is a path and the body of one text. Answers are read in proof/plans/answers.py.
Our own service reports in `Server-Timing` how long each phase took. With other servers nothing but
the time end to end can be claimed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from command import BadInput

DialectName = Literal["drbert", "vllm", "infinity", "tei", "hf", "kserve-v1"]


@dataclass(frozen=True)
class Dialect:
    """How one text is sent to a server."""

    path: str
    """Path of the request; `{model}` stands for the model's name."""
    body: Callable[[str | None, str], Mapping[str, Any]]
    """(model, text) → the request's JSON."""
    server_timing: bool = False
    """Whether answers report the phases of a request in Server-Timing."""


def _with_model(model: str | None, fields: Mapping[str, Any]) -> Mapping[str, Any]:
    return fields if model is None else {"model": model, **fields}


DIALECTS: Mapping[DialectName, Dialect] = {
    "drbert": Dialect(
        "/classify", lambda model, text: _with_model(model, {"input": text}), server_timing=True
    ),
    "vllm": Dialect("/classify", lambda model, text: _with_model(model, {"input": text})),
    "infinity": Dialect("/classify", lambda model, text: _with_model(model, {"input": [text]})),
    # A flat list of two is a pair there; a bare string is one text. The server has one model.
    "tei": Dialect("/predict", lambda model, text: {"inputs": text}),
    "hf": Dialect("/", lambda model, text: {"inputs": text}),
    "kserve-v1": Dialect("/v1/models/{model}:predict", lambda model, text: {"instances": [text]}),
}


@dataclass(frozen=True)
class ServerTiming:
    """What a Server-Timing header reports of one request."""

    phases_ms: Mapping[str, float] = field(default_factory=dict)
    """Milliseconds by name, as `tokenize`, `queue`, `inference` and `total`."""
    batch_size: int = 0
    """Number of rows in the batch that the text ran in; 0 if it is not reported."""
    batch_tokens: int = 0
    """Number of tokens in that batch, padding included; 0 if it is not reported."""
    batch_id: int = -1
    """Number of that batch in the server's process; -1 if it is not reported."""
    first_of_shape: int = -1
    """1 if the model had not run a batch of that shape before, else 0; -1 if not reported."""


# As in `inference;dur=5.1;desc="b=8 t=128"`: 8 rows of 128 tokens.
_BATCH = re.compile(r'batch;desc="(\d+)( first)?"')
_PHASE = re.compile(r'(\w+);dur=([\d.]+)(?:;desc="b=(\d+) t=(\d+)")?')


def parse_server_timing(header: str) -> ServerTiming:
    """Return what a Server-Timing header reports; nothing is known of an empty one."""
    phases_ms = {}
    rows = tokens = 0
    for name, milliseconds, batch_rows, row_tokens in _PHASE.findall(header):
        phases_ms[name] = float(milliseconds)
        if batch_rows:
            rows = int(batch_rows)
            tokens = rows * int(row_tokens)
    batch = _BATCH.search(header)
    if batch is None:
        return ServerTiming(phases_ms, rows, tokens)
    return ServerTiming(phases_ms, rows, tokens, int(batch[1]), int(batch[2] is not None))


def read_headers(variable: str | None, named_by: str) -> dict[str, str]:
    """Return the headers in an environment variable's `Name: value` lines; without one, none.

    `named_by` says where the variable is named. Raise BadInput if it is not set, or is no such
    list.
    """
    if variable is None:
        return {}
    if variable not in os.environ:
        raise BadInput(f"{named_by} takes headers from the variable {variable}, which is not set.")
    lines = [line.partition(":") for line in os.environ[variable].splitlines() if line.strip()]
    if not all(colon for _, colon, _ in lines):
        raise BadInput(
            f"The variable {variable} holds a line without a colon; write `Name: value` lines."
        )
    return {name.strip(): value.strip() for name, _, value in lines}


def headers_from(variable: str | None) -> dict[str, str]:
    """Return headers from an environment variable with a `Name: value` line for each.

    Secrets have no place in a plan. Raise BadInput if the variable is not set, holds anything else,
    or sets a header that the proof itself sends.
    """
    headers = read_headers(variable, "The plan")
    for name in headers:
        # They would slow the arm down, or give its rows to another request.
        if name.lower() in ("x-busy-wait", "x-request-id", "content-type", "content-length"):
            raise BadInput(
                f"The variable {variable} sets {name}, which is the proof's own; leave it out."
            )
    return headers
