"""
The accuracy gate: decides whether a variant may answer in place of the exact one.

A variant with a tolerance (bf16, fp16) passes if no probability differs from the checkpoint's by
more. A quantised variant (int8) passes if it agrees with fp32 often enough, on texts that it was
not calibrated with. The share of agreeing texts says little without their number, so the gate
requires its lower confidence bound (Clopper and Pearson 1934, one-sided, 95 %) over at least 5,000
texts.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

from command import BadInput
from export.graph.variants import RECIPES
from export.texts import LabelledText
from service.artifact import (
    Agreement,
    Artifact,
    Gate,
    LabelAgreement,
    Manifest,
    Parity,
    Task,
    UnquantizedPrecision,
)
from service.classifier import Classifier, Encoded
from service.runtimes import Logits
from service.runtimes.auto import Choice, load
from service.runtimes.openvino import OpenVinoRuntime

MIN_TEXTS = 5_000
"""Number of texts below which an agreement gate fails, whatever they agree on."""
RARE_LABEL_TEXTS = 50
"""Number of texts below which a label is reported as rare: most of its texts may disagree without
moving the share of all texts.
"""
CONFIDENCE = 0.95
REGRESSION_TOLERANCE = 0.1
"""Largest difference between two regression answers that agree, as a share of the standard
deviation of the fp32 answers.
"""


def gate_by_parity(variant: str, parity: Parity, runtime: str) -> Gate:
    """Return the gate of a variant with a tolerance; `runtime` is the engine that ran it.

    Raises BadInput if the variant is fp32: a graph that is not the checkpoint must not be exported.
    """
    recipe = RECIPES[variant]
    reason = (
        f"{parity.texts} texts, labels agree {parity.label_agreement:.1%}, largest difference of a"
        f" probability {parity.max_probability_difference:.1e} (at most {parity.tolerance:.0e})"
    )
    if runtime != recipe.runtime:
        reason += "; run by onnxruntime on the CPU, not yet on a GPU"
    if parity.tolerance is None or parity.max_probability_difference <= parity.tolerance:
        return Gate(status="passed", reason=reason)
    if recipe.precision == "f32":
        raise BadInput(
            f"{variant} does not reproduce the checkpoint: {reason}. This graph cannot be trusted."
        )
    return Gate(status="failed", reason=reason)


def gate_by_agreement(
    artifact: Artifact,
    variant: str,
    texts: Sequence[LabelledText],
    required: float,
    required_per_label: float | None,
    threads: int,
) -> Gate:
    """Return the gate of a quantised variant, from its agreement with cpu-fp32 on `texts`.

    Without a text that the model can read, the variant stays ungated.
    """
    usable = [item for item in texts if isinstance(item.text, str) or artifact.manifest.takes_pairs]
    if not usable:
        return Gate(
            status="ungated",
            reason=f"no texts to gate it with; give --gate FILE with at least {MIN_TEXTS:,}",
        )
    exact, reduced = (
        Classifier(artifact, load(artifact, Choice(name, runtime, "verification"), threads))
        for name, runtime in (("cpu-fp32", "openvino"), (variant, RECIPES[variant].runtime))
    )
    engine = reduced.runtime
    return judge(
        exact,
        reduced,
        artifact,
        usable,
        required,
        engine.unquantized_precision if isinstance(engine, OpenVinoRuntime) else None,
        required_per_label,
    )


def judge(
    exact: Classifier,
    reduced: Classifier,
    artifact: Artifact,
    texts: Sequence[LabelledText],
    required: float,
    unquantized_precision: UnquantizedPrecision | None = None,
    required_per_label: float | None = None,
) -> Gate:
    """Return the gate of `reduced`: whether the lower bound of its agreement reaches `required`.

    `unquantized_precision` is the precision of the operators that `reduced` does not quantise. With
    `required_per_label` the lower bound of every label must reach that share too, over the texts to
    which fp32 gives the label.
    """
    encoded = [
        exact.encode(*item.text) if isinstance(item.text, tuple) else exact.encode(item.text)
        for item in texts
    ]
    expected = _logits(exact, encoded)
    answered = _logits(reduced, encoded)
    return judge_logits(
        expected,
        answered,
        artifact,
        texts,
        Requirement(required, required_per_label),
        unquantized_precision,
        tokens=[text.tokens for text in encoded],
    )


@dataclass(frozen=True)
class Requirement:
    """What an agreement must reach."""

    lower_bound: float
    """Lower bound of the share of texts that agree, 0 to 1."""
    of_each_label: float | None = None
    """The same of each label; None: nothing is required of them."""


def judge_logits(
    expected: Logits,
    answered: Logits,
    artifact: Artifact,
    texts: Sequence[LabelledText],
    required: Requirement,
    unquantized_precision: UnquantizedPrecision | None = None,
    exact: str = "fp32",
    tokens: Sequence[int] = (),
) -> Gate:
    """Return the gate of logits that should agree with those of an exact model, (texts, labels).

    `exact` is what the gate calls that model. `tokens` is the number of each text's tokens, if the
    model labels tokens; the logits are then those of all tokens.
    """
    by_part = [
        _agree(
            _compared_task(part.manifest),
            expected[:, part.columns],
            answered[:, part.columns],
            tokens,
        )
        for part in artifact.manifest.parts
    ]
    agrees = np.all(by_part, axis=0)
    agreeing = int(agrees.sum())
    agreement = Agreement(
        texts=len(texts),
        agreeing=agreeing,
        lower_bound=lower_bound(agreeing, len(texts)),
        required_lower_bound=required.lower_bound,
        accuracy=_accuracy(artifact, answered, texts),
        accuracy_of_fp32=_accuracy(artifact, expected, texts),
        unquantized_precision=unquantized_precision,
        labels=_agreement_per_label(artifact.manifest, expected, by_part),
        required_per_label=required.of_each_label,
    )
    passed = len(texts) >= MIN_TEXTS and agreement.lower_bound >= required.lower_bound
    if required.of_each_label is not None:
        bounds = [label.lower_bound for label in agreement.labels.values()]
        passed = passed and all(bound >= required.of_each_label for bound in bounds)
    return Gate(
        status="passed" if passed else "failed",
        reason=_reason(agreement, exact),
        agreement=agreement,
    )


def lower_bound(agreeing: int, texts: int) -> float:
    """Return the lower confidence bound of the share `agreeing / texts`.

    The true share lies below it with a probability of 5 % at most.
    """
    return float(
        stats.binomtest(agreeing, texts, alternative="greater")
        .proportion_ci(CONFIDENCE, "exact")
        .low
    )


def _compared_task(manifest: Manifest) -> Task:
    """Return the task by which answers are compared.

    A single label is compared as a number, because as a label it would always agree.
    """
    if manifest.labels_tokens:
        return "token_labels"
    return "regression" if len(manifest.labels) == 1 else manifest.task


def _agreement_per_label(
    manifest: Manifest, expected: Logits, agreeing_by_part: Sequence[npt.NDArray[np.bool_]]
) -> dict[str, LabelAgreement]:
    """Return the agreement over the texts to which fp32 gives each label, of the label's head.

    There are none for a number, and for labels of tokens.
    """
    agreements = {}
    names = iter(manifest.labels)
    for part, agrees in zip(manifest.parts, agreeing_by_part, strict=True):
        task, logits = _compared_task(part.manifest), expected[:, part.columns]
        for index, name in enumerate(itertools.islice(names, len(part.manifest.labels))):
            if task in ("regression", "token_labels"):
                continue
            given_by_fp32 = (
                logits[:, index] > 0 if task == "multi_label" else logits.argmax(1) == index
            )
            texts = int(given_by_fp32.sum())
            agreeing = int(agrees[given_by_fp32].sum())
            agreements[name] = LabelAgreement(
                texts=texts,
                agreeing=agreeing,
                lower_bound=lower_bound(agreeing, texts) if texts else 0.0,
            )
    return agreements


def _reason(agreement: Agreement, exact: str) -> str:
    """Return the gate's sentence: the agreement, the weakest label, rare labels, and accuracy."""
    whose = "fp32" if exact == "fp32" else f"{exact}'s"
    enough = "" if agreement.texts >= MIN_TEXTS else f", over at least {MIN_TEXTS:,} texts"
    reason = (
        f"{agreement.agreeing:,} of {agreement.texts:,} texts get the {whose} answer,"
        f" {agreement.agreeing / agreement.texts:.2%}, at least {agreement.lower_bound:.2%} at"
        f" {CONFIDENCE:.0%} confidence (asked: {agreement.required_lower_bound:.2%}{enough})"
    )
    if agreement.required_per_label is not None and agreement.labels:
        reason += _label_clause(agreement.labels, agreement.required_per_label, exact)
    rare = [
        f"{name!r} {label.texts}"
        for name, label in agreement.labels.items()
        if label.texts < RARE_LABEL_TEXTS
    ]
    if rare:
        names = ", ".join(rare[:4]) + (", …" if len(rare) > 4 else "")
        reason += f"; says little of labels with fewer than {RARE_LABEL_TEXTS} texts: {names}"
    if agreement.accuracy is not None:
        reason += f"; accuracy {agreement.accuracy:.2%}, {exact}'s {agreement.accuracy_of_fp32:.2%}"
    return reason


def _label_clause(labels: Mapping[str, LabelAgreement], required: float, exact: str) -> str:
    """Return the part of a gate's sentence about labels without texts, or the weakest label."""
    missing = [name for name, label in labels.items() if not label.texts]
    if missing:
        return (
            f"; {exact} gives no text the label {', '.join(map(repr, missing[:4]))}, so nothing can"
            " be said of it: add texts of it"
        )
    weakest = min(labels, key=lambda name: labels[name].lower_bound)
    label = labels[weakest]
    return (
        f"; least of {weakest!r}: {label.agreeing:,} of {label.texts:,}, at least"
        f" {label.lower_bound:.2%} (asked of each label: {required:.2%})"
    )


def _logits(classifier: Classifier, encoded: Sequence[Encoded]) -> Logits:
    """Return the logits in the order of `encoded`, (texts, labels), or of all tokens.

    Texts run sorted by length, in the batches that the service would make.
    """
    order = sorted(range(len(encoded)), key=lambda i: encoded[i].tokens)
    logits = classifier.predict_all([encoded[i] for i in order])
    rows = [encoded[i].tokens if classifier.manifest.labels_tokens else 1 for i in order]
    by_text = np.split(logits, np.cumsum(rows)[:-1])
    return np.concatenate([by_text[place] for place in np.argsort(order)])


def _agree(
    task: Task, expected: Logits, answered: Logits, tokens: Sequence[int]
) -> npt.NDArray[np.bool_]:
    """Return for each text whether both answers agree, (texts,).

    They agree if the best label is the same, if every label's decision is the same (multi_label),
    if the numbers are close (regression), or if all tokens get the same label (token_labels).
    `tokens` is the number of each text's tokens.
    """
    match task:
        case "token_labels":
            same = expected.argmax(1) == answered.argmax(1)
            if expected.shape[1] == 1:
                same = _are_close(expected, answered)
            return np.array([part.all() for part in np.split(same, np.cumsum(tokens)[:-1])])
        case "single_label":
            return np.asarray(expected.argmax(1) == answered.argmax(1))
        case "multi_label":
            return np.asarray(((expected > 0) == (answered > 0)).all(1))
        case _:
            return _are_close(expected, answered)


def _are_close(expected: Logits, answered: Logits) -> npt.NDArray[np.bool_]:
    tolerance = REGRESSION_TOLERANCE * max(float(expected.std()), 1e-6)
    return np.asarray((np.abs(expected - answered) <= tolerance).all(1))


def logits_of(classifier: Classifier, texts: Sequence[LabelledText]) -> Logits:
    """Return a classifier's logits of texts in their order, (texts, labels)."""
    encoded = [
        classifier.encode(*item.text)
        if isinstance(item.text, tuple)
        else classifier.encode(item.text)
        for item in texts
    ]
    return _logits(classifier, encoded)


def _accuracy(artifact: Artifact, logits: Logits, texts: Sequence[LabelledText]) -> float | None:
    """Return the share of labelled texts with the right best label; None if no text is labelled."""
    if _compared_task(artifact.manifest) != "single_label":
        return None
    labels = artifact.manifest.labels
    right = [
        labels[int(row.argmax())] == item.label
        for row, item in zip(logits, texts, strict=True)
        if item.label is not None
    ]
    return float(np.mean(right)) if right else None
