"""
Runs the service's Classifier against the torch reference: each text alone, and padded in batches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from command import BadInput
from export.checkpoint.reference import Reference, TextOrPair
from export.graph.onnx_file import read_inputs
from service.answers import default_activation
from service.artifact import Artifact, Parity, Precision, Probe, SelfCheck
from service.classifier import Classifier, Encoded
from service.errors import ModelOutputInvalid
from service.runtimes import Logits, RuntimeUnavailable
from service.runtimes.auto import ON_A_GPU, Choice, load
from service.runtimes.onnxruntime import missing_requirement
from service.runtimes.openvino import OpenVinoRuntime
from service.self_check import answers

PADDING_TOLERANCE = 1e-3
"""Largest change of a logit, as a share of the largest logit, that is rounding. A larger change
means that the answer depends on the padding around a text.
"""
NOISE_SHARE = {"f32": 0.0, "bf16": 4.0, "f16": 4.0, "i8": 0.5}
"""Tolerance of the self-check by precision, as a share of the variant's distance from fp32."""
MIN_SELF_CHECK_TOLERANCE = 1e-3
"""Smallest tolerance of the self-check, as a share of the largest logit."""
SHORT_LENGTH, LONG_LENGTH = 5, 29
"""Token counts that a graph is run with, both different from the length that was traced."""


def select_engine(artifact: Artifact, variant: str) -> Choice:
    """Return the engine that verifies a variant.

    It is the variant's own engine, or ONNX Runtime on the CPU if that is a GPU engine that this
    host cannot run.
    """
    runtime = artifact.manifest.variants[variant].runtime
    if runtime in ON_A_GPU and missing_requirement(runtime) is not None:
        return Choice(variant, "onnxruntime", "verification")
    return Choice(variant, runtime, "verification")


def check_lengths(model: Path, family: str, max_tokens: int, embedding_rows: int) -> None:
    """Run a graph on other lengths than the traced one; raise BadInput if the engine fails.

    A family whose code branches on a text's length leaves the traced length in its graph, as a
    shape that no other text has. Token ids stay below `embedding_rows`.
    """
    names = read_inputs(model)
    try:
        runtime = OpenVinoRuntime(model, "f32", 1)
        for texts, tokens in (
            (1, min(SHORT_LENGTH, max_tokens)),
            (3, min(LONG_LENGTH, max_tokens)),
        ):
            ids = np.arange(texts * tokens).reshape(texts, tokens) % embedding_rows
            arrays = {
                "input_ids": ids,
                "attention_mask": np.ones_like(ids),
                "token_type_ids": np.zeros_like(ids),
            }
            runtime.start({name: arrays[name] for name in names})()
    except (RuntimeUnavailable, RuntimeError) as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise BadInput(
            f"The model cannot be served. The code of its family {family} depends on a text's"
            " length, which a graph fixes at one value, or the engine cannot run the graph:"
            f" {lines[-1].strip()[:200]}"
        ) from None


def check_tokens(
    artifact: Artifact, reference: Reference, texts: Sequence[TextOrPair], threads: int
) -> None:
    """Raise BadInput for a text whose tokens differ between the service and the checkpoint.

    The message holds the first such text, and the first tokens that differ.
    """
    classifier = Classifier(artifact, OpenVinoRuntime(artifact.path("model.onnx"), "f32", threads))
    for text in texts:
        encoded = _encode(classifier, text)
        expected = reference.encode(text)
        expected_ids = expected["input_ids"]
        _check_same(reference, text, "input_ids", encoded.ids, expected_ids[0].tolist())
        if "token_type_ids" in artifact.manifest.inputs:
            # A tokenizer without types leaves them to the model, which takes the first type.
            types = expected.get("token_type_ids", np.zeros_like(expected_ids))[0].tolist()
            _check_same(reference, text, "token_type_ids", encoded.type_ids, types)


def _check_same(
    reference: Reference,
    text: TextOrPair,
    field: str,
    values: Sequence[int],
    expected: Sequence[int],
) -> None:
    """Raise BadInput if a field of an encoded text differs from the reference's."""
    values = list(values)
    if values == expected or not expected:
        return
    differing = (
        index
        for index, (value, other) in enumerate(zip(values, expected, strict=False))
        if value != other
    )
    start = next(differing, min(len(values), len(expected)))
    raise BadInput(
        f"The service would read {_quoted(text)} differently from the checkpoint's own tokenizer"
        f" ({type(reference.tokenizer).__name__}): {field} differ from index {start} on,"
        f" {values[start : start + 6]} in the service and {expected[start : start + 6]} in the"
        " checkpoint."
    )


def _quoted(text: TextOrPair) -> str:
    """Return a text in quotes for a message, cut after 60 characters."""
    halves = text if isinstance(text, tuple) else (text,)
    return " and ".join(repr(half if len(half) <= 60 else f"{half[:60]}…") for half in halves)


def measure_parity(
    artifact: Artifact,
    choice: Choice,
    reference: Reference,
    texts: Sequence[TextOrPair],
    tolerance: float | None,
    threads: int,
) -> Parity:
    """Measure how far a variant's probabilities are from the reference's.

    Every text runs alone and, if the model is padding-invariant, in a padded batch.
    """
    classifier = Classifier(artifact, load(artifact, choice, threads))
    expected = _probabilities(reference.logits(texts), artifact)
    single = _probabilities(_single_logits(classifier, texts), artifact)
    batched = single
    if artifact.manifest.padding_invariant:
        batched = _probabilities(_batched_logits(classifier, texts), artifact)
    worst = max(float(np.abs(single - expected).max()), float(np.abs(batched - expected).max()))
    both = np.concatenate([single, batched])
    agreement = _label_agreement(both, np.concatenate([expected, expected]), artifact)
    return Parity(
        texts=len(texts),
        max_probability_difference=worst,
        tolerance=tolerance,
        label_agreement=agreement,
    )


def emulate_bf16(
    artifact: Artifact,
    reference: Reference,
    texts: Sequence[TextOrPair],
    probes: Sequence[Probe],
    tolerance: float | None,
) -> tuple[Parity, SelfCheck]:
    """Measure bf16 with torch, for a processor without bf16 instructions: every text alone.

    Raises ModelOutputInvalid if the model overflows in bf16.
    """
    rounded = reference.in_bf16()
    expected = _probabilities(reference.logits(texts), artifact)
    answered = _probabilities(rounded.logits(texts), artifact)
    parity = Parity(
        texts=len(texts),
        max_probability_difference=float(np.abs(answered - expected).max()),
        tolerance=tolerance,
        label_agreement=_label_agreement(answered, expected, artifact),
    )
    if not np.isfinite(answered).all():
        raise ModelOutputInvalid("The model answers NaN or infinity in bf16.")
    probe_texts = _texts_of(probes)
    exact = reference.logits(probe_texts)
    answered_probes = {"bf16": rounded.logits(probe_texts)}
    return parity, _self_check("bf16", exact, answered_probes, artifact)


def read_probes(artifact: Artifact, texts: Sequence[TextOrPair], threads: int) -> list[Probe]:
    """Return the texts of the self-check, with the token ids that the model reads of each."""
    classifier = Classifier(artifact, OpenVinoRuntime(artifact.path("model.onnx"), "f32", threads))
    probes = []
    for text in texts:
        encoded = _encode(classifier, text)
        first, second = text if isinstance(text, tuple) else (text, None)
        probes.append(
            Probe(
                text=first,
                text_pair=second,
                input_ids=list(encoded.ids),
                token_type_ids=list(encoded.type_ids),
            )
        )
    return probes


def record_self_check(
    artifact: Artifact,
    choice: Choice,
    reference: Reference,
    probes: Sequence[Probe],
    threads: int,
) -> SelfCheck:
    """Return a variant's answers to the probes, and how far another host's may be from them.

    Between processors with the same instructions fp32 was measured to move by 2e-6 of a logit and
    int8 by nothing, while int8 without VNNI saturates and moves by 0.8 to 1.2 of its distance from
    fp32. So the tolerance is a share of that distance (NOISE_SHARE), or MIN_SELF_CHECK_TOLERANCE of
    the largest logit.
    """
    precision = artifact.manifest.variants[choice.variant].precision
    runtimes = [load(artifact, choice, threads)]
    if precision == "i8" and runtimes[0].computes_in != "f32":
        runtimes.append(load(artifact, choice, threads, unquantized_precision="f32"))
    exact = reference.logits(_texts_of(probes))
    answered = {
        runtime.computes_in: answers(Classifier(artifact, runtime), probes)[0]
        for runtime in runtimes
    }
    return _self_check(precision, exact, answered, artifact)


def _texts_of(probes: Sequence[Probe]) -> list[TextOrPair]:
    return [
        probe.text if probe.text_pair is None else (probe.text, probe.text_pair) for probe in probes
    ]


def _self_check(
    precision: Precision, exact: Logits, answered: Mapping[str, Logits], artifact: Artifact
) -> SelfCheck:
    """Return the answers to the probes by arithmetic precision, rounded to 8 digits.

    The tolerance of a head follows from the distance of its logits to the exact ones.
    """
    tolerances = []
    for part in artifact.manifest.parts:
        head = exact[:, part.columns]
        noise = max(
            float(np.abs(logits[:, part.columns] - head).max()) for logits in answered.values()
        )
        smallest = MIN_SELF_CHECK_TOLERANCE * max(1.0, float(np.abs(head).max()))
        tolerances.append(float(f"{max(smallest, NOISE_SHARE[precision] * noise):.3g}"))
    rounded = {}
    for computed_in, logits in answered.items():
        rounded[computed_in] = [[float(f"{value:.8g}") for value in row] for row in logits.tolist()]
    return SelfCheck.model_validate(
        {
            "logits": rounded,
            "tolerance": max(tolerances),
            "tolerances": tolerances if artifact.manifest.heads else [],
        }
    )


def is_padding_invariant(
    artifact: Artifact, graph: Path, texts: Sequence[TextOrPair], threads: int
) -> bool:
    """Return whether a text's logits stay the same when longer texts in the batch pad it.

    The fp32 graph decides for all variants, because reduced precision adds rounding of its own.
    """
    classifier = Classifier(artifact, OpenVinoRuntime(graph, "f32", threads))
    single = _single_logits(classifier, texts)
    batched = _batched_logits(classifier, texts)
    for part in artifact.manifest.parts:
        head = single[:, part.columns]
        tolerance = PADDING_TOLERANCE * max(1.0, float(np.abs(head).max()))
        if float(np.abs(head - batched[:, part.columns]).max()) >= tolerance:
            return False
    return True


def _single_logits(classifier: Classifier, texts: Sequence[TextOrPair]) -> Logits:
    return np.concatenate([classifier.predict([_encode(classifier, text)]) for text in texts])


def _batched_logits(classifier: Classifier, texts: Sequence[TextOrPair]) -> Logits:
    return classifier.predict_all([_encode(classifier, text) for text in texts])


def _encode(classifier: Classifier, text: TextOrPair) -> Encoded:
    return classifier.encode(*text) if isinstance(text, tuple) else classifier.encode(text)


def _probabilities(logits: Logits, artifact: Artifact) -> npt.NDArray[np.float64]:
    """Return what callers get by default, (texts, labels)."""
    wide = logits.astype(np.float64)
    return np.concatenate(
        [
            _activate(wide[:, part.columns], default_activation(part.manifest))
            for part in artifact.manifest.parts
        ],
        axis=1,
    )


def _activate(wide: npt.NDArray[np.float64], activation: str) -> npt.NDArray[np.float64]:
    if activation == "softmax":
        exponents = np.exp(wide - wide.max(axis=1, keepdims=True))
        return np.asarray(exponents / exponents.sum(axis=1, keepdims=True))
    if activation == "sigmoid":
        # exp of a negative number only: the other form overflows for a large negative logit.
        small = np.exp(-np.abs(wide))
        return np.where(wide >= 0, 1 / (1 + small), small / (1 + small))
    return wide


def _label_agreement(
    probabilities: npt.NDArray[np.float64], expected: npt.NDArray[np.float64], artifact: Artifact
) -> float:
    """Return the share of the texts that get the same best label, by the head that agrees least."""
    return min(
        float(
            np.mean(probabilities[:, part.columns].argmax(1) == expected[:, part.columns].argmax(1))
        )
        for part in artifact.manifest.parts
    )
