"""
Runs the production Classifier against the torch reference, alone and padded in company.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from command import BadInput
from export.checkpoint.reference import Reference, TextOrPair
from export.graph.onnx_file import read_inputs
from service.answers import own_activation
from service.artifact import Artifact, Parity, Precision, Probe, SelfCheck
from service.classifier import Classifier, Encoded
from service.errors import ModelOutputInvalid
from service.runtimes import Logits, RuntimeUnavailable
from service.runtimes.auto import ON_A_GPU, Choice, load
from service.runtimes.onnxruntime import lacks
from service.runtimes.openvino import OpenVinoRuntime
from service.self_check import answers

# A padded text that moves its logits further than this share of them was changed by its padding,
# not by rounding.
PADDING_TOLERANCE = 1e-3
# Of the self-check: the share of a variant's distance from fp32 that another host may differ by,
# and the least tolerance as a share of the largest logit.
NOISE_SHARE = {"f32": 0.0, "bf16": 4.0, "f16": 4.0, "i8": 0.5}
LEAST_TOLERANCE = 1e-3
# Tokens of the texts that show whether a graph runs other lengths than the traced one.
SHORT, LONG = 5, 29


def engine_here(artifact: Artifact, variant: str) -> Choice:
    """What runs a variant for verification: its own engine, or ONNX Runtime on the CPU where a
    GPU's cannot be had.
    """
    runtime = artifact.manifest.variants[variant].runtime
    return Choice(
        variant,
        "onnxruntime" if runtime in ON_A_GPU and lacks(runtime) is not None else runtime,
        "verification",
    )


def check_lengths(model: Path, family: str, most: int, rows: int) -> None:
    """Run a graph on texts of other lengths than the traced one; BadInput if the engine fails.

    A family whose code looks at a text's length leaves that length in its graph, as a shape that
    no other text has. `rows` is how many tokens have an embedding.
    """
    try:
        runtime = OpenVinoRuntime(model, "f32", 1)
        for texts, tokens in ((1, min(SHORT, most)), (3, min(LONG, most))):
            ids = np.arange(texts * tokens).reshape(texts, tokens) % rows
            arrays = {
                "input_ids": ids,
                "attention_mask": np.ones_like(ids),
                "token_type_ids": np.zeros_like(ids),
            }
            runtime.start({name: arrays[name] for name in read_inputs(model)})()
    except (RuntimeUnavailable, RuntimeError) as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise BadInput(
            f"The model cannot be served: code of its family {family} looks at a text's length,"
            f" which its graph holds fixed, or the engine cannot run it: {lines[-1].strip()[:200]}"
        ) from None


def check_tokens(
    artifact: Artifact, reference: Reference, texts: Sequence[TextOrPair], threads: int
) -> None:
    """BadInput, with the first text and what differs, if the service would read one otherwise than
    the checkpoint's own tokenizer does.
    """
    classifier = Classifier(artifact, OpenVinoRuntime(artifact.path("model.onnx"), "f32", threads))
    for text in texts:
        encoded, wanted = _encode(classifier, text), reference.encode(text)
        # A tokenizer that gives no types leaves them to the model, which takes the first.
        types = wanted.get("token_type_ids", np.zeros_like(wanted["input_ids"]))[0].tolist()
        pairs = [("input_ids", list(encoded.ids), wanted["input_ids"][0].tolist())]
        if "token_type_ids" in artifact.manifest.inputs:
            pairs.append(("token_type_ids", list(encoded.type_ids), types))
        for field, ours, theirs in pairs:
            if ours == theirs or not theirs:
                continue
            place = next(
                (
                    place
                    for place, (one, other) in enumerate(zip(ours, theirs, strict=False))
                    if one != other
                ),
                min(len(ours), len(theirs)),
            )
            raise BadInput(
                f"The service would read {_told(text)} otherwise than the checkpoint's own"
                f" tokenizer ({type(reference.tokenizer).__name__}): {field} differ from place"
                f" {place} on, {ours[place : place + 6]} where it has {theirs[place : place + 6]}."
            )


def _told(text: TextOrPair) -> str:
    """A text for a message, cut."""
    return " and ".join(
        repr(half if len(half) <= 60 else f"{half[:60]}…")
        for half in (text if isinstance(text, tuple) else (text,))
    )


def measure_parity(
    artifact: Artifact,
    choice: Choice,
    reference: Reference,
    texts: Sequence[TextOrPair],
    tolerance: float | None,
    threads: int,
) -> Parity:
    """How far the variant's probabilities are from the reference's, over every text alone and in
    mixed batches.
    """
    classifier = Classifier(artifact, load(artifact, choice, threads))
    expected = _probabilities(reference.logits(texts), artifact)
    alone = _probabilities(_alone(classifier, texts), artifact)
    company = alone
    if artifact.manifest.padding_safe:
        company = _probabilities(_in_company(classifier, texts), artifact)
    worst = max(float(np.abs(alone - expected).max()), float(np.abs(company - expected).max()))
    agreement = float(
        np.mean([alone.argmax(1) == expected.argmax(1), company.argmax(1) == expected.argmax(1)])
    )
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
    tolerance: float,
) -> tuple[Parity, SelfCheck]:
    """What bf16 does to the answers by torch's arithmetic, where the processor has no instructions
    and the engine refuses: every text alone.
    """
    rounded = reference.in_bf16()
    expected, found = (_probabilities(one.logits(texts), artifact) for one in (reference, rounded))
    parity = Parity(
        texts=len(texts),
        max_probability_difference=float(np.abs(found - expected).max()),
        tolerance=tolerance,
        label_agreement=float(np.mean(found.argmax(1) == expected.argmax(1))),
    )
    if not np.isfinite(found).all():
        raise ModelOutputInvalid("The model answers NaN or infinity in bf16.")
    own = [
        probe.text if probe.text_pair is None else (probe.text, probe.text_pair) for probe in probes
    ]
    exact, logits = reference.logits(own), rounded.logits(own)
    return parity, _self_check("bf16", exact, {"bf16": logits})


def read_probes(artifact: Artifact, texts: Sequence[TextOrPair], threads: int) -> list[Probe]:
    """Return texts of the self-check, with what the model reads of each."""
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
    fp32. So the tolerance is a share of that distance (NOISE_SHARE), or LEAST_TOLERANCE of the
    largest logit.
    """
    runtimes = [load(artifact, choice, threads)]
    if (
        artifact.manifest.variants[choice.variant].precision == "i8"
        and runtimes[0].computes_in != "f32"
    ):
        runtimes.append(load(artifact, choice, threads, rest="f32"))
    exact = reference.logits(
        [
            probe.text if probe.text_pair is None else (probe.text, probe.text_pair)
            for probe in probes
        ]
    )
    found = {
        runtime.computes_in: answers(Classifier(artifact, runtime), probes)[0]
        for runtime in runtimes
    }
    return _self_check(artifact.manifest.variants[choice.variant].precision, exact, found)


def _self_check(precision: Precision, exact: Logits, found: Mapping[str, Logits]) -> SelfCheck:
    """The answers to the probes by what they were computed in, and the tolerance that follows from
    their distance to the exact ones.
    """
    noise = max(float(np.abs(logits - exact).max()) for logits in found.values())
    least = LEAST_TOLERANCE * max(1.0, float(np.abs(exact).max()))
    rounded = {
        computed_in: [[float(f"{value:.8g}") for value in row] for row in logits.tolist()]
        for computed_in, logits in found.items()
    }
    return SelfCheck.model_validate(
        {"logits": rounded, "tolerance": float(f"{max(least, NOISE_SHARE[precision] * noise):.3g}")}
    )


def measure_padding_safety(
    artifact: Artifact, graph: Path, texts: Sequence[TextOrPair], threads: int
) -> bool:
    """Whether a text's logits stay what they are when longer neighbours pad it; asked of the fp32
    graph, whatever is built of it.
    """
    classifier = Classifier(artifact, OpenVinoRuntime(graph, "f32", threads))
    alone, company = _alone(classifier, texts), _in_company(classifier, texts)
    return float(np.abs(alone - company).max()) < PADDING_TOLERANCE * max(
        1.0, float(np.abs(alone).max())
    )


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
    wide, activation = logits.astype(np.float64), own_activation(artifact.manifest)
    if activation == "softmax":
        exponents = np.exp(wide - wide.max(axis=1, keepdims=True))
        return np.asarray(exponents / exponents.sum(axis=1, keepdims=True))
    small = np.exp(-np.abs(wide))
    return (
        np.where(wide >= 0, 1 / (1 + small), small / (1 + small))
        if activation == "sigmoid"
        else wide
    )
