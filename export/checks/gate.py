"""
Judges a reduced variant by how often it gives the fp32 variant's answer, on texts it was not
calibrated with.

A share of agreeing texts says little without their number: the gate asks for the lower end of its
interval (Clopper and Pearson 1934, one-sided, 95 %), over at least 5,000 texts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy import stats

from export.texts import Labelled
from service.artifact import Agreement, Artifact, Gate, LabelAgreement, Rest, Task
from service.classifier import Classifier, Encoded
from service.runtimes import Logits

FEWEST_TEXTS = 5_000
FEWEST_OF_A_LABEL = 50
"""With fewer texts of a label, most of them may differ without the share of all texts showing it.
"""
CONFIDENCE = 0.95
# A regression's answer agrees if it moved by no more than this share of the spread of the fp32
# answers.
NEAR = 0.1


def judge(
    exact: Classifier,
    reduced: Classifier,
    artifact: Artifact,
    texts: Sequence[Labelled],
    wanted: float,
    rest: Rest | None = None,
    wanted_per_label: float | None = None,
) -> Gate:
    """Whether `reduced` may stand in for `exact`: the agreement's lower bound reaches `wanted`,
    over enough texts.

    `rest` is the precision in which it computes what it does not quantise. With `wanted_per_label`
    the lower bound of every label has to reach that, over the texts to which fp32 gives it.
    """
    encoded = [
        exact.encode(*item.text) if isinstance(item.text, tuple) else exact.encode(item.text)
        for item in texts
    ]
    expected, answered = (_logits(classifier, encoded) for classifier in (exact, reduced))
    task = _judged_as(artifact)
    agrees = _agree(task, expected, answered)
    agreeing, labels = int(agrees.sum()), _by_label(artifact, expected, agrees)
    agreement = Agreement(
        texts=len(texts),
        agreeing=agreeing,
        lower_bound=lower_bound(agreeing, len(texts)),
        wanted=wanted,
        accuracy=_accuracy(artifact, answered, texts),
        accuracy_of_fp32=_accuracy(artifact, expected, texts),
        rest=rest,
        labels=labels,
        wanted_per_label=wanted_per_label,
    )
    enough = len(texts) >= FEWEST_TEXTS
    least = min(labels, key=lambda label: labels[label].lower_bound, default=None)
    missing = [label for label, one in labels.items() if not one.texts]
    by_label = (
        wanted_per_label is None or least is None or labels[least].lower_bound >= wanted_per_label
    )
    passed = enough and agreement.lower_bound >= wanted and by_label
    said = (
        f"{agreeing:,} of {len(texts):,} texts get the fp32 answer, {agreeing / len(texts):.2%}, at"
        f" least {agreement.lower_bound:.2%} at {CONFIDENCE:.0%} confidence (asked:"
        f" {wanted:.2%}{'' if enough else f', over at least {FEWEST_TEXTS:,} texts'})"
    )
    if missing and wanted_per_label is not None:
        said += (
            f"; fp32 gives no text the label {', '.join(map(repr, missing[:4]))}, so nothing can be"
            " said of it: add texts of it"
        )
    elif least is not None and wanted_per_label is not None:
        one = labels[least]
        said += (
            f"; least of {least!r}: {one.agreeing:,} of {one.texts:,}, at least"
            f" {one.lower_bound:.2%} (asked of each label: {wanted_per_label:.2%})"
        )
    if rare := [label for label, one in labels.items() if one.texts < FEWEST_OF_A_LABEL]:
        few = ", ".join(f"{label!r} {labels[label].texts}" for label in rare[:4]) + (
            ", …" if len(rare) > 4 else ""
        )
        said += f"; says little of labels with fewer than {FEWEST_OF_A_LABEL} texts: {few}"
    if agreement.accuracy is not None:
        said += f"; accuracy {agreement.accuracy:.2%}, fp32's {agreement.accuracy_of_fp32:.2%}"
    return Gate(status="passed" if passed else "failed", reason=said, agreement=agreement)


def _judged_as(artifact: Artifact) -> Task:
    """The task whose answers are compared: a single label is a number, for as a label it would
    always agree.
    """
    return "regression" if len(artifact.manifest.labels) == 1 else artifact.manifest.task


def _by_label(
    artifact: Artifact, expected: Logits, agrees: npt.NDArray[np.bool_]
) -> dict[str, LabelAgreement]:
    """The agreement over the texts to which fp32 gives each label; none for a number."""
    names, task = artifact.manifest.labels, _judged_as(artifact)
    if task == "regression":
        return {}
    found = {}
    for place, name in enumerate(names):
        own = agrees[
            expected[:, place] > 0 if task == "multi_label" else expected.argmax(1) == place
        ]
        agreeing = int(own.sum())
        found[name] = LabelAgreement(
            texts=len(own),
            agreeing=agreeing,
            lower_bound=lower_bound(agreeing, len(own)) if len(own) else 0.0,
        )
    return found


def lower_bound(agreeing: int, texts: int) -> float:
    """Of a share seen as `agreeing` of `texts`: the value below which it lies with a probability of
    5 % at most.
    """
    return float(
        stats.binomtest(agreeing, texts, alternative="greater")
        .proportion_ci(CONFIDENCE, "exact")
        .low
    )


def _logits(classifier: Classifier, encoded: Sequence[Encoded]) -> Logits:
    """In the order asked, run sorted by length in batches as the service makes them."""
    order = sorted(range(len(encoded)), key=lambda i: encoded[i].tokens)
    rows = np.empty((len(encoded), len(classifier.manifest.labels)), np.float32)
    for batch in classifier.batches([encoded[i].tokens for i in order]):
        places = [order[place] for place in batch]
        rows[places] = classifier.predict([encoded[i] for i in places])
    return rows


def _agree(task: Task, expected: Logits, answered: Logits) -> npt.NDArray[np.bool_]:
    """(texts): the best label is the same; of several labels, all decisions; of a number, nearly
    the same number.
    """
    match task:
        case "single_label":
            return np.asarray(expected.argmax(1) == answered.argmax(1))
        case "multi_label":
            return np.asarray(((expected > 0) == (answered > 0)).all(1))
        case _:
            return np.asarray(
                (np.abs(expected - answered) <= NEAR * max(float(expected.std()), 1e-6)).all(1)
            )


def _accuracy(artifact: Artifact, logits: Logits, texts: Sequence[Labelled]) -> float | None:
    """Share of the labelled texts whose best label is the right one."""
    if _judged_as(artifact) != "single_label":
        return None
    labels = artifact.manifest.labels
    right = [
        labels[int(row.argmax())] == item.label
        for row, item in zip(logits, texts, strict=True)
        if item.label is not None
    ]
    return float(np.mean(right)) if right else None
