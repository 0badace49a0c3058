"""
Logits into labels: what a caller reads of a model's row.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from service.artifact import Manifest
from service.classifier import Encoded, sigmoid, softmax
from service.runtimes import Logits
from service.schemas import Activation

MULTI_LABEL_THRESHOLD = 0.5


def classification(
    index: int, logits: Logits, encoded: Encoded, manifest: Manifest,
    activation: Activation = "auto", top_k: int | None = None, threshold: float | None = None,
) -> dict[str, Any]:
    """The answer for one text from its logits, (labels,)."""
    probs = activated(logits, activation if activation != "auto" else own_activation(manifest))
    order = np.argsort(-probs, kind="stable")
    best = int(order[0])
    shown = [int(i) for i in order if threshold is None or probs[i] >= threshold][:top_k]
    answer: dict[str, Any] = {"index": index, "label": manifest.labels[best], "score": float(probs[best])}
    if manifest.task == "multi_label":
        # Decided on the model's own probabilities, whatever form of them the caller wants to see.
        own, cut = activated(logits, "sigmoid"), MULTI_LABEL_THRESHOLD if threshold is None else threshold
        answer["labels"] = [manifest.labels[i] for i in order if own[i] >= cut]
    return answer | {
        "probs": probs.tolist(),
        "num_classes": len(manifest.labels),
        "scores": [{"label": manifest.labels[i], "score": float(probs[i])} for i in shown],
        "tokens": encoded.tokens,
        "truncated": encoded.truncated,
    }


def own_activation(manifest: Manifest) -> Activation:
    return {"single_label": "softmax", "multi_label": "sigmoid", "regression": "none"}[manifest.task]  # type: ignore[return-value]


def activated(logits: Logits, activation: Activation) -> np.ndarray[Any, np.dtype[np.float64]]:
    if activation == "softmax":
        return softmax(logits)
    if activation == "sigmoid":
        return sigmoid(logits)
    return logits.astype(np.float64)
