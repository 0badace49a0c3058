"""
Classifications from logits: activations, labels and pooling of windows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import exp
from typing import Any

import numpy as np

from service.artifact import Manifest, Task
from service.classifier import Encoded
from service.runtimes import Logits
from service.schemas import Activation, Pool

MULTI_LABEL_THRESHOLD = 0.5
"""Probability from which a label of a multi-label model is assigned, unless a caller sets one."""
TASK_ACTIVATIONS: Mapping[Task, Activation] = {
    "single_label": "softmax",
    "multi_label": "sigmoid",
    "regression": "none",
}
"""The activation of each task."""


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
    """Return the answer for one text from its logits, (labels,).

    `scores` has the labels in descending order: at most `top_k` of them, with a probability of at
    least `threshold`. `labels`, of multi-label models only, has the assigned labels.
    """
    # Python floats, because a two-element numpy array costs ten times as much.
    values: list[float] = logits.tolist()
    probs = activate(values, activation if activation != "auto" else default_activation(manifest))
    # Sorted by logits: large ones differ where their probabilities all round to 1.
    order = sorted(range(len(values)), key=lambda i: -values[i])
    best = order[0]
    shown = [i for i in order if threshold is None or probs[i] >= threshold][:top_k]
    answer: dict[str, Any] = {"index": index, "label": manifest.labels[best], "score": probs[best]}
    if manifest.task == "multi_label":
        # The sigmoid decides, whichever activation the caller wants to see.
        probabilities = activate(values, "sigmoid")
        least = MULTI_LABEL_THRESHOLD if threshold is None else threshold
        answer["labels"] = [manifest.labels[i] for i in order if probabilities[i] >= least]
    if with_probs:
        answer["probs"] = probs
    return answer | {
        "num_classes": len(manifest.labels),
        "scores": [{"label": manifest.labels[i], "score": probs[i]} for i in shown],
        "tokens": encoded.tokens,
        "truncated": encoded.truncated,
    }


def pooled(windows: Sequence[Logits], pool: Pool) -> Logits:
    """Return the logits of a long text, (labels,), from those of its windows.

    They are pooled before the activation, so that probabilities still add up to 1.
    """
    if pool == "first":
        return windows[0]
    stacked = np.stack(windows)  # (windows, labels)
    logits: Logits = stacked.mean(axis=0) if pool == "mean" else stacked.max(axis=0)
    return logits


def default_activation(manifest: Manifest) -> Activation:
    """Return the activation where a caller requests none: the manifest's, or the task's."""
    if manifest.activation is not None:
        return manifest.activation
    return TASK_ACTIVATIONS[manifest.task]


def activate(values: list[float], activation: Activation) -> list[float]:
    """Return the scores of a text from its logits."""
    if activation == "softmax":
        return softmax(values)
    if activation == "sigmoid":
        return [sigmoid(value) for value in values]
    return values


def softmax(values: list[float]) -> list[float]:
    """Return the softmax of finite logits, without overflow."""
    highest = max(values)
    exponentials = [exp(value - highest) for value in values]
    total = sum(exponentials)
    return [exponential / total for exponential in exponentials]


def sigmoid(value: float) -> float:
    """Return the sigmoid of a finite logit, without overflow."""
    small = exp(-abs(value))
    return 1 / (1 + small) if value >= 0 else small / (1 + small)
