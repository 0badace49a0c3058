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
from service.requests.zero_shot import Question
from service.runtimes import Logits
from service.schemas import Activation, Pool

MULTI_LABEL_THRESHOLD = 0.5
"""Probability from which a label of a multi-label model is assigned, unless a caller sets one."""
TASK_ACTIVATIONS: Mapping[Task, Activation] = {
    "single_label": "softmax",
    "multi_label": "sigmoid",
    "regression": "none",
    "token_labels": "softmax",
    "heads": "none",
}
"""The activation of each task; each of several heads has that of its own task."""
OF_THE_TEXT = frozenset({"index", "tokens", "truncated"})
"""Fields of an answer that say nothing of a head."""


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
    assigned = None
    if manifest.task == "multi_label":
        # The sigmoid decides, whichever activation the caller wants to see.
        assigned = _assigned(order, activate(values, "sigmoid"), threshold)
    answer = _answer(index, manifest.labels, probs, order, assigned, top_k, threshold, with_probs)
    return answer | {"tokens": encoded.tokens, "truncated": encoded.truncated}


def heads_classification(by_head: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the answer for one text by several heads, from the answer of each.

    It is that of the first head, and has all of them under `heads`.
    """
    [first, *_] = by_head.values()
    heads = {
        name: {key: value for key, value in answer.items() if key not in OF_THE_TEXT}
        for name, answer in by_head.items()
    }
    return first | {"heads": heads}


def zero_shot_classification(
    index: int,
    pairs: Sequence[Logits],
    encoded: Sequence[Encoded],
    manifest: Manifest,
    question: Question,
    top_k: int | None = None,
    threshold: float | None = None,
    with_probs: bool = True,
) -> dict[str, Any]:
    """Return the answer for one text from its logits with each label's hypothesis, (labels,) each.

    It has the form of `classification`, with the request's labels; `labels` is there if several may
    apply.
    """
    entailment, contradiction = question.places(manifest)
    if question.multi_label or len(pairs) == 1:
        # Entailment against contradiction: their softmax is the sigmoid of the difference.
        logits = [float(each[entailment] - each[contradiction]) for each in pairs]
        probs = [sigmoid(value) for value in logits]
    else:
        logits = [float(each[entailment]) for each in pairs]
        probs = softmax(logits)
    order = sorted(range(len(logits)), key=lambda i: -logits[i])
    assigned = _assigned(order, probs, threshold) if question.multi_label else None
    answer = _answer(index, question.labels, probs, order, assigned, top_k, threshold, with_probs)
    return answer | {
        "tokens": sum([each.tokens for each in encoded]),
        "truncated": any(each.truncated for each in encoded),
    }


def _assigned(
    order: Sequence[int], probabilities: Sequence[float], threshold: float | None
) -> list[int]:
    """Return the labels of `order` that apply, where each may."""
    least = MULTI_LABEL_THRESHOLD if threshold is None else threshold
    return [i for i in order if probabilities[i] >= least]


def _answer(
    index: int,
    labels: Sequence[str],
    probs: list[float],
    order: Sequence[int],
    assigned: Sequence[int] | None,
    top_k: int | None,
    threshold: float | None,
    with_probs: bool,
) -> dict[str, Any]:
    """Return what an answer says of the labels, whose indices `order` has best first."""
    best = order[0]
    shown = [i for i in order if threshold is None or probs[i] >= threshold][:top_k]
    answer: dict[str, Any] = {"index": index, "label": labels[best], "score": probs[best]}
    if assigned is not None:
        answer["labels"] = [labels[i] for i in assigned]
    if with_probs:
        answer["probs"] = probs
    answer["num_classes"] = len(labels)
    answer["scores"] = [{"label": labels[i], "score": probs[i]} for i in shown]
    return answer


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
