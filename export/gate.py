"""
Judges a reduced variant by how often it gives the fp32 variant's answer, on texts it was not calibrated with.

A share of agreeing texts says little without their number: the gate asks for the lower end of its
interval (Clopper and Pearson 1934, one-sided, 95 %), over at least 5,000 texts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy import stats

from export.texts import Labelled
from service.artifact import Agreement, Artifact, Gate, Rest, Task
from service.classifier import Classifier, Encoded
from service.runtimes import Logits

FEWEST_TEXTS = 5_000
CONFIDENCE = 0.95
# A regression's answer agrees if it moved by no more than this share of the spread of the fp32 answers.
NEAR = 0.1


def judge(
    exact: Classifier, reduced: Classifier, artifact: Artifact, texts: Sequence[Labelled], wanted: float, rest: Rest | None = None,
) -> Gate:
    """Whether `reduced` may stand in for `exact`: the agreement's lower bound reaches `wanted`, over enough texts.

    `rest` is the precision in which it computes what it does not quantise.
    """
    encoded = [exact.encode(*item.text) if isinstance(item.text, tuple) else exact.encode(item.text) for item in texts]
    expected, answered = (_logits(classifier, encoded) for classifier in (exact, reduced))
    task = artifact.manifest.task
    agreeing = int(_agree(task, expected, answered).sum())
    agreement = Agreement(
        texts=len(texts), agreeing=agreeing, lower_bound=lower_bound(agreeing, len(texts)), wanted=wanted,
        accuracy=_accuracy(artifact, answered, texts), accuracy_of_fp32=_accuracy(artifact, expected, texts), rest=rest,
    )
    enough = len(texts) >= FEWEST_TEXTS
    passed = enough and agreement.lower_bound >= wanted
    said = (
        f"{agreeing:,} of {len(texts):,} texts get the fp32 answer, {agreeing / len(texts):.2%}, at least "
        f"{agreement.lower_bound:.2%} at {CONFIDENCE:.0%} confidence (asked: {wanted:.2%}"
        f"{'' if enough else f', over at least {FEWEST_TEXTS:,} texts'})"
    )
    if agreement.accuracy is not None:
        said += f"; accuracy {agreement.accuracy:.2%}, fp32's {agreement.accuracy_of_fp32:.2%}"
    return Gate(status="passed" if passed else "failed", reason=said, agreement=agreement)


def lower_bound(agreeing: int, texts: int) -> float:
    """Of a share seen as `agreeing` of `texts`: the value below which it lies with a probability of 5 % at most."""
    return float(stats.binomtest(agreeing, texts, alternative="greater").proportion_ci(CONFIDENCE, "exact").low)


def _logits(classifier: Classifier, encoded: Sequence[Encoded]) -> Logits:
    """In the order asked, run sorted by length in batches as the service makes them."""
    order = sorted(range(len(encoded)), key=lambda i: encoded[i].tokens)
    rows = np.empty((len(encoded), len(classifier.manifest.labels)), np.float32)
    for batch in classifier.batches([encoded[i].tokens for i in order]):
        places = [order[place] for place in batch]
        rows[places] = classifier.predict([encoded[i] for i in places])
    return rows


def _agree(task: Task, expected: Logits, answered: Logits) -> npt.NDArray[np.bool_]:
    """(texts): the best label is the same; of several labels, all decisions; of a number, nearly the same number."""
    match task:
        case "single_label":
            return np.asarray(expected.argmax(1) == answered.argmax(1))
        case "multi_label":
            return np.asarray(((expected > 0) == (answered > 0)).all(1))
        case _:
            return np.asarray((np.abs(expected - answered) <= NEAR * max(float(expected.std()), 1e-6)).all(1))


def _accuracy(artifact: Artifact, logits: Logits, texts: Sequence[Labelled]) -> float | None:
    """Share of the labelled texts whose best label is the right one."""
    if artifact.manifest.task != "single_label":
        return None
    labels = artifact.manifest.labels
    right = [labels[int(row.argmax())] == item.label for row, item in zip(logits, texts, strict=True) if item.label is not None]
    return float(np.mean(right)) if right else None
