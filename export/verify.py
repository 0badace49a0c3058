"""
Runs the production Classifier against the torch reference, alone and padded in company.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from export.reference import Reference, TextOrPair
from service.artifact import Artifact, Parity
from service.classifier import Classifier, Encoded
from service.runtimes import Logits
from service.runtimes.auto import ON_A_GPU, Choice, load
from service.runtimes.onnxruntime import lacks
from service.runtimes.openvino import OpenVinoRuntime

# A padded text that moves its logits further than this share of them was changed by its padding, not by rounding.
PADDING_TOLERANCE = 1e-3


def engine_here(artifact: Artifact, variant: str) -> Choice:
    """What runs a variant for verification: its own engine, or ONNX Runtime on the CPU where a GPU's cannot be had."""
    runtime = artifact.manifest.variants[variant].runtime
    return Choice(variant, "onnxruntime" if runtime in ON_A_GPU and lacks(runtime) is not None else runtime, "verification")


def measure_parity(
    artifact: Artifact, choice: Choice, reference: Reference, texts: Sequence[TextOrPair], tolerance: float | None, threads: int
) -> Parity:
    """How far the variant's probabilities are from the reference's, over every text alone and in mixed batches."""
    classifier = Classifier(artifact, load(artifact, choice, threads))
    expected = _probabilities(reference.logits(texts), artifact)
    alone = _probabilities(_alone(classifier, texts), artifact)
    company = alone
    if artifact.manifest.padding_safe:
        company = _probabilities(_in_company(classifier, texts), artifact)
    worst = max(float(np.abs(alone - expected).max()), float(np.abs(company - expected).max()))
    agreement = float(np.mean([alone.argmax(1) == expected.argmax(1), company.argmax(1) == expected.argmax(1)]))
    return Parity(
        texts=len(texts), max_probability_difference=worst, tolerance=tolerance, label_agreement=agreement
    )


def measure_padding_safety(artifact: Artifact, graph: Path, texts: Sequence[TextOrPair], threads: int) -> bool:
    """Whether a text's logits stay what they are when longer neighbours pad it; asked of the fp32 graph, whatever is built of it."""
    classifier = Classifier(artifact, OpenVinoRuntime(graph, "f32", threads))
    alone, company = _alone(classifier, texts), _in_company(classifier, texts)
    return float(np.abs(alone - company).max()) < PADDING_TOLERANCE * max(1.0, float(np.abs(alone).max()))


def _alone(classifier: Classifier, texts: Sequence[TextOrPair]) -> Logits:
    return np.concatenate([classifier.predict([_encode(classifier, text)]) for text in texts])


def _in_company(classifier: Classifier, texts: Sequence[TextOrPair]) -> Logits:
    encoded = [_encode(classifier, text) for text in texts]
    logits = np.empty((len(encoded), len(classifier.manifest.labels)), np.float32)
    for batch in classifier.batches([text.tokens for text in encoded]):
        logits[batch] = classifier.predict([encoded[place] for place in batch])
    return logits


def _encode(classifier: Classifier, text: TextOrPair) -> Encoded:
    return classifier.encode(*text) if isinstance(text, tuple) else classifier.encode(text)


def _probabilities(logits: Logits, artifact: Artifact) -> npt.NDArray[np.float64]:
    """What callers see by default: (texts, labels)."""
    wide, task = logits.astype(np.float64), artifact.manifest.task
    if task == "single_label":
        exponents = np.exp(wide - wide.max(axis=1, keepdims=True))
        return np.asarray(exponents / exponents.sum(axis=1, keepdims=True))
    small = np.exp(-np.abs(wide))
    return np.where(wide >= 0, 1 / (1 + small), small / (1 + small)) if task == "multi_label" else wide
