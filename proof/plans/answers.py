"""
What an answer says: its best label, and numbers that stand for all of its scores.

Scores of one text differ in their last digits between batches, so a digest of rounded scores would
change whenever a score lies at the edge of rounding. A checksum that is a sum can be compared
within a tolerance instead:

    checksum = Σ weight(label) · score,   weight(label) in [0, 1), from the label's SHA-256

If no score has moved by more than t, the checksum has not moved by more than t for each score.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

MAX_LABEL_CHARS = 100
"""Characters of a label that evidence holds."""
Scores = list[tuple[str, float]]
"""(label, score) of each label in an answer."""


@dataclass(frozen=True)
class Answer:
    """What one answer says of its text. The defaults are those of an answer that is unreadable."""

    tokens: int = 0
    """Number of tokens that it reports, or 0."""
    label: str = ""
    """Label with the highest score; empty if the answer is no classification."""
    score: float = 0.0
    """Score of that label."""
    score_count: int = 0
    """Number of labels that it scores; 0 if it is no classification."""
    score_checksum: float = 0.0
    """Weighted sum of all scores, which changes if any of them does."""


def read_answer(content: bytes) -> Answer:
    """Return what the body of an answer says, in any dialect.

    An answer whose `label` does not have the highest of its scores is no classification.
    """
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        return Answer()
    tokens = _tokens_of(body)
    try:
        scores, label = read_scores(body)
        return summarize(scores, label, tokens)
    except (KeyError, TypeError, ValueError, IndexError, OverflowError):
        return Answer(tokens)


def summarize(scores: Scores, label: str | None = None, tokens: int = 0) -> Answer:
    """Return the answer with these scores, and with the label that the server named, if any.

    Raise ValueError if a score is not finite, or if `label` has a lower score than another one.
    """
    best, score = max(scores, key=lambda each: each[1])
    if not all(math.isfinite(each) for _, each in scores):
        raise ValueError("a score is not finite")
    if label is not None and dict(scores).get(label, score) != score:
        raise ValueError(f"the label {label} has not the highest score")
    # A row of evidence is one line. Five digits are finer than any tolerance, and repeat.
    return Answer(
        tokens=tokens,
        label=" ".join((best if label is None else label).split())[:MAX_LABEL_CHARS],
        score=float(f"{score:.5g}"),
        score_count=len(scores),
        score_checksum=float(f"{score_checksum(scores):.5g}"),
    )


def score_checksum(scores: Sequence[tuple[str, float]]) -> float:
    """Return Σ weight(label) · score, whatever the order of the scores."""
    return sum(_weight(label) * score for label, score in scores)


@functools.lru_cache(maxsize=100_000)
def _weight(label: str) -> float:
    return int.from_bytes(hashlib.sha256(label.encode()).digest()[:6], "big") / 2**48


def _tokens_of(body: Any) -> int:
    try:
        return int(body["usage"]["prompt_tokens"])
    except (KeyError, TypeError, ValueError):
        return 0


def read_scores(body: Any) -> tuple[Scores, str | None]:
    """Return the scores of the one text that was sent, and the label that the answer names, if any.

    Raises KeyError, TypeError, ValueError, IndexError or OverflowError if it is no classification.

    drbert      {"data": [{"label": …, "scores": [{"label": …, "score": …}, …]}]}
    vllm        {"data": [{"label": …, "probs": […]}]}
    infinity    {"data": [[{"label": …, "score": …}, …]]}
    tei         [{"label": …, "score": …}, …]
    hf          [[{"label": …, "score": …}, …]] or as tei
    kserve-v1   {"predictions": [{LABEL: score, …} or CLASS or [score, …]]}
    """
    if isinstance(body, dict):
        [item] = body["data"] if "data" in body else body["predictions"]
    else:
        item = body[0] if isinstance(body[0], list) else body
    if isinstance(item, list):
        if isinstance(item[0], dict):
            return [(str(each["label"]), float(each["score"])) for each in item], None
        return [(str(i), float(score)) for i, score in enumerate(item)], None
    if not isinstance(item, dict):
        return [(str(int(item)), 1.0)], None
    if "label" not in item:
        return [(str(label), float(score)) for label, score in item.items()], None
    if "scores" in item:
        scores = [(str(each["label"]), float(each["score"])) for each in item["scores"]]
        return scores, str(item["label"])
    if "probs" in item:  # of labels without names
        return [(str(i), float(score)) for i, score in enumerate(item["probs"])], str(item["label"])
    return [(str(item["label"]), float(item["score"]))], None
