"""
Logits into labels: what a caller reads of a model's row.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import exp
from typing import Any

import numpy as np

from service.artifact import Manifest
from service.classifier import Encoded
from service.runtimes import Logits
from service.schemas import Activation, Pool

MULTI_LABEL_THRESHOLD = 0.5


def classification(
    index: int,
    logits: Logits,
    encoded: Encoded,
    manifest: Manifest,
    activation: Activation = "auto",
    top_k: int | None = None,
    threshold: float | None = None,
    with_probs: bool = True,
) -> dict[str, Any]:
    """The answer for one text from its logits, (labels,)."""
    # Plain numbers: an array of two is ten times dearer than two of them.
    values: list[float] = logits.tolist()
    probs = activated(values, activation if activation != "auto" else own_activation(manifest))
    # By logits: probabilities keep their order, but large ones all round to 1.
    order = sorted(range(len(values)), key=lambda i: -values[i])
    best = order[0]
    shown = [i for i in order if threshold is None or probs[i] >= threshold][:top_k]
    answer: dict[str, Any] = {"index": index, "label": manifest.labels[best], "score": probs[best]}
    if manifest.task == "multi_label":
        # Decided on the model's own probabilities, whatever form of them the caller wants to see.
        own, cut = (
            activated(values, "sigmoid"),
            MULTI_LABEL_THRESHOLD if threshold is None else threshold,
        )
        answer["labels"] = [manifest.labels[i] for i in order if own[i] >= cut]
    return (
        answer
        | ({"probs": probs} if with_probs else {})
        | {
            "num_classes": len(manifest.labels),
            "scores": [{"label": manifest.labels[i], "score": probs[i]} for i in shown],
            "tokens": encoded.tokens,
            "truncated": encoded.truncated,
        }
    )


def pooled(windows: Sequence[Logits], pool: Pool) -> Logits:
    """The logits of a long text, (labels,), from those of its windows: before any activation, so
    that probabilities still add up.
    """
    if pool == "first":
        return windows[0]
    stacked = np.stack(windows)  # (windows, labels)
    made: Logits = stacked.mean(axis=0) if pool == "mean" else stacked.max(axis=0)
    return made


def own_activation(manifest: Manifest) -> Activation:
    """What turns the model's logits into probabilities where a caller asks for nothing else."""
    if manifest.activation is not None:
        return manifest.activation
    return {"single_label": "softmax", "multi_label": "sigmoid", "regression": "none"}[
        manifest.task
    ]  # type: ignore[return-value]


def activated(values: list[float], activation: Activation) -> list[float]:
    if activation == "softmax":
        return softmax(values)
    if activation == "sigmoid":
        return [sigmoid(value) for value in values]
    return values


def softmax(values: list[float]) -> list[float]:
    """Stable for any finite logits."""
    highest = max(values)
    exponents = [exp(value - highest) for value in values]
    whole = sum(exponents)
    return [exponent / whole for exponent in exponents]


def sigmoid(value: float) -> float:
    """Stable for any finite logit."""
    small = exp(-abs(value))
    return 1 / (1 + small) if value >= 0 else small / (1 + small)
