"""
Exports a fine-tuned checkpoint to an artifact; `export` lists the steps in their order.

A reduced variant that fails its gate is still part of the artifact, marked as failed. An export
that raises leaves nothing behind.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from command import BadInput, BadUsage
from export.checkpoint.loading import Checkpoint, build_model, embedding_rows
from export.checkpoint.reference import PROBES, Reference, TextOrPair, texts_for
from export.checkpoint.tokenizer import write_tokenizer
from export.checks.gate import MIN_TEXTS, gate_by_agreement, gate_by_parity
from export.checks.verify import (
    check_lengths,
    check_tokens,
    emulate_bf16,
    is_padding_invariant,
    measure_parity,
    read_probes,
    record_self_check,
    select_engine,
)
from export.distillation import Distillation
from export.graph.attention import with_export_attention
from export.graph.imported_graph import ImportedModel
from export.graph.onnx_file import export_onnx, flush_subnormal_weights, graph_inputs, read_inputs
from export.graph.variants import DEFAULT_VARIANTS, RECIPES, VariantSource
from export.heads import (
    Classifier,
    HeadsReference,
    joined_signature,
    merge_graphs,
    read_classifier,
)
from export.manifest import (
    Network,
    Signature,
    accepts_pairs,
    describe_artifact,
    read_provenance,
    write_manifest,
)
from export.model_source import (
    check_options_of_graph,
    choose_reference,
    count_parameters,
)
from export.package import draft_artifact, replace_artifact, resolve_target
from export.student import Student, gate_student, train_student
from export.texts import BUNDLED_TEXTS, LabelledText, excluding, read_texts
from service.artifact import (
    Artifact,
    Gate,
    Manifest,
    Parity,
    SelfCheck,
    Task,
    Variant,
)
from service.errors import ModelOutputInvalid
from service.host import cpus
from service.runtimes import Inputs, RuntimeUnavailable


@dataclass(frozen=True)
class Quantization:
    """How a calibrated variant (cpu-int8) is made and judged."""

    calibration: Path = BUNDLED_TEXTS
    """File of texts that the variant is calibrated with, one per line or .jsonl."""
    gate: Path | None = None
    """File of texts on which the variant must agree with cpu-fp32; without one it is ungated."""
    agreement: float = 0.99
    """Required lower confidence bound of the share of gate texts that agree, 0 to 1."""
    agreement_per_label: float | None = None
    """Required lower bound for the texts of each label, 0 to 1; None requires nothing of them."""
    reduce_range: bool | None = None
    """Whether weights are limited to 7 bits. None limits them if this processor has no VNNI, on
    which 8-bit products saturate.
    """

    @property
    def has_reduced_range(self) -> bool:
        """Whether weights are limited to 7 bits on this processor."""
        if self.reduce_range is None:
            return "i8" not in cpus.native_precisions()
        return self.reduce_range


def export(
    source: str | Mapping[str, str],
    target: Path,
    *,
    variants: Sequence[str] = DEFAULT_VARIANTS,
    task: Task | None = None,
    keep_decoder: bool = False,
    revision: str | None = None,
    quantization: Quantization = Quantization(),
    distillation: Distillation | None = None,
) -> Manifest:
    """Write the artifact of the checkpoint `source` to `target`, and return its manifest.

    An int8 variant is compared with cpu-fp32, which is therefore built with it. With
    `distillation`, the artifact is of a smaller model, which learns from the checkpoint first.
    Several checkpoints on one encoder, by the names of their heads, become one model.
    Raises BadInput, BadUsage or Unavailable for a checkpoint that cannot be exported, with the
    reason.
    """
    is_gated = any(RECIPES[name].gated_by_agreement for name in variants)
    is_compared = is_gated or distillation is not None
    if is_compared and "cpu-fp32" not in variants:
        variants = ("cpu-fp32", *variants)
    target = resolve_target(target)
    heads = {"": source} if isinstance(source, str) else source
    if len(heads) > 1:
        _check_for_heads(task, keep_decoder, revision, distillation)
    classifiers = {
        name: read_classifier(head, revision, task, keep_decoder) for name, head in heads.items()
    }
    _check_graphs_and_report(list(classifiers.values()), keep_decoder, distillation)
    [classifier, *others] = classifiers.values()
    checkpoint, tokenizer = classifier.checkpoint, classifier.tokenizer
    signature = joined_signature(classifiers) if others else classifier.signature
    if signature.task == "token_labels":
        _check_for_token_labels(variants, quantization, distillation)
    calibration_texts, gate_texts = _read_quantization_texts(quantization, signature.labels)
    student: Student | None = None
    if distillation is not None:
        student = train_student(checkpoint, tokenizer, signature, distillation, gate_texts, target)
        checkpoint, gate_texts = student.checkpoint, student.gate_texts
        classifier = replace(classifier, checkpoint=checkpoint, model=build_model(checkpoint))
        classifiers = {"": classifier}

    with draft_artifact(target) as folder:
        parameters = _write_graph(folder, classifiers, signature)
        flushed = _flush_subnormal_weights(folder / "model.onnx")
        reference = _choose_reference(list(classifiers.values()), keep_decoder)
        config = classifier.model.config
        _build_variants(folder, config, variants, reference, calibration_texts, quantization)
        manifest = describe_artifact(
            folder,
            checkpoint,
            Network(config, parameters),
            signature,
            variants,
            keep_decoder=keep_decoder,
            flushed_weights=flushed,
            provenance=read_provenance(checkpoint, variants, quantization.has_reduced_range),
        )
        manifest = _verify(folder, manifest, reference, gate_texts, quantization)
        if student is not None:
            manifest = gate_student(
                folder,
                manifest,
                student,
                reference,
                quantization.agreement,
                quantization.agreement_per_label,
            )
        manifest = write_manifest(folder, manifest)
        replace_artifact(folder, target)
    if student is not None:
        shutil.rmtree(student.folder)
    return manifest


def _check_for_heads(
    task: Task | None,
    keep_decoder: bool,
    revision: str | None,
    distillation: Distillation | None,
) -> None:
    """Raise BadUsage for options that a model with several heads does not have."""
    for option, is_given in (
        ("--distill", distillation is not None),
        ("--keep-decoder", keep_decoder),
        ("--task", task is not None),
        ("--revision", revision is not None),
    ):
        if is_given:
            raise BadUsage(f"{option} is for a model with one head; leave it out with --head.")


def _check_graphs_and_report(
    classifiers: Sequence[Classifier], keep_decoder: bool, distillation: Distillation | None
) -> None:
    """Raise BadUsage for options that ONNX graphs do not have; print what will be left out."""
    for classifier in classifiers:
        if classifier.checkpoint.graph is not None:
            check_options_of_graph(classifier.checkpoint, keep_decoder, distillation)
        _report_discarded(classifier.checkpoint, keep_decoder)


def _check_for_token_labels(
    variants: Sequence[str], quantization: Quantization, distillation: Distillation | None
) -> None:
    """Raise BadUsage for options that a model that labels tokens does not have."""
    for_gpus = [name for name in variants if not name.startswith("cpu-")]
    if for_gpus:
        raise BadUsage(
            f"The model labels tokens, for which there is no variant {for_gpus[0]}; leave it out of"
            " --variants."
        )
    for option, is_given in (
        ("--agreement-per-label", quantization.agreement_per_label is not None),
        ("--distill", distillation is not None),
    ):
        if is_given:
            raise BadUsage(
                f"The model labels tokens, and {option} is for models that label whole texts; leave"
                " it out."
            )


def _any_calibrated(variants: Sequence[str]) -> bool:
    return any(RECIPES[name].calibrated for name in variants)


def _read_quantization_texts(
    quantization: Quantization, labels: Sequence[str]
) -> tuple[list[LabelledText], list[LabelledText]]:
    """Return the texts for calibration and for the gate; the gate's exclude the calibration's."""
    calibration = read_texts(quantization.calibration, labels)
    if quantization.gate is None:
        return calibration, []
    gate = excluding(read_texts(quantization.gate, labels), [item.text for item in calibration])
    if not gate:
        raise BadInput(
            f"{quantization.gate}: all of its texts are in the calibration file"
            f" ({quantization.calibration}) too. A gate needs texts that calibration has not seen."
        )
    if len(gate) < MIN_TEXTS:
        print(
            f"{quantization.gate} has {len(gate):,} texts that calibration has not seen; the gate"
            f" needs {MIN_TEXTS:,}, so every int8 variant will fail it",
            flush=True,
        )
    return calibration, gate


def _report_discarded(checkpoint: Checkpoint, keep_decoder: bool) -> None:
    """Print which parts of the checkpoint the artifact will not have."""
    name = checkpoint.directory
    discarded = checkpoint.discarded()
    if checkpoint.graph is not None:
        print(
            f"{name}: takes {checkpoint.graph.name} as it is. Variants are compared with it, and it"
            " is not compared with torch."
        )
        return
    if keep_decoder:
        print(
            f"{name}: KEEPS its {discarded.layers} decoder layers as encoder layers. This is a"
            " positive control for the proof: its answers mean nothing."
        )
    elif discarded.parameters:
        print(
            f"{name}: drops the {discarded.design} decoder: {discarded.layers} layers,"
            f" {discarded.parameters:,} parameters, {discarded.share_of_file:.1%} of the file."
        )
    else:
        print(f"{name}: holds no decoder; nothing to drop.")
    if discarded.other_tensors:
        print(
            f"{name}: drops {len(discarded.other_tensors)} tensors of a pretraining head"
            f" ({discarded.other_tensors[0]}, …)."
        )


def _write_graph(folder: Path, classifiers: Mapping[str, Classifier], signature: Signature) -> int:
    """Write tokenizer.json and the fp32 graph; return the number of its weights."""
    graph, [classifier, *others] = folder / "model.onnx", classifiers.values()
    model = classifier.model
    parameters = count_parameters(model)
    if others:
        graphs = {name: folder / f"head-{name}.onnx" for name in classifiers}
        for name, path in graphs.items():
            _write_graph_of(classifiers[name], path)
        parameters += merge_graphs(graphs, graph, len(signature.labels))
    else:
        _write_graph_of(classifier, graph)
    is_imported = isinstance(model, ImportedModel)
    rows = model.embedding_rows if is_imported else embedding_rows(model)
    write_tokenizer(
        classifier.tokenizer, classifier.checkpoint.directory, rows, folder / "tokenizer.json"
    )
    check_lengths(graph, model.config.model_type, signature.max_tokens, rows)
    return parameters


def _write_graph_of(classifier: Classifier, path: Path) -> None:
    """Write the fp32 graph of one checkpoint."""
    model, signature = classifier.model, classifier.signature
    if isinstance(model, ImportedModel):
        shutil.copyfile(model.graph, path)
        return
    print("exporting the graph", flush=True)
    export_onnx(
        with_export_attention(model),
        path,
        graph_inputs(model, classifier.tokenizer.model_input_names),
        signature.max_tokens,
        labels_tokens=signature.task == "token_labels",
    )


def _flush_subnormal_weights(graph: Path) -> int:
    """Set subnormal weights to zero; return how many there were, and print it."""
    flushed = flush_subnormal_weights(graph)
    if flushed:
        print(
            f"sets {flushed:,} subnormal weights to zero: they change no answer and slow processors"
            " down",
            flush=True,
        )
    return flushed


def _choose_reference(classifiers: Sequence[Classifier], keep_decoder: bool) -> Reference:
    """Return what the variants are compared with."""
    references = [
        choose_reference(each.checkpoint, each.model, each.tokenizer, each.signature, keep_decoder)
        for each in classifiers
    ]
    return HeadsReference(references) if len(references) > 1 else references[0]


def _build_variants(
    folder: Path,
    config: Any,
    variants: Sequence[str],
    reference: Reference,
    calibration_texts: Sequence[LabelledText],
    quantization: Quantization,
) -> None:
    """Build every variant from the fp32 graph, in order; calibrate only if one needs it."""
    calibration: list[Inputs] = []
    if _any_calibrated(variants):
        _report_calibration(len(calibration_texts), quantization)
        calibration = _encode_calibration(folder, config, reference, calibration_texts)
    source = VariantSource(folder, config, calibration, quantization.has_reduced_range)
    for name in variants:
        RECIPES[name].build(source)


def _report_calibration(texts: int, quantization: Quantization) -> None:
    if quantization.calibration == BUNDLED_TEXTS:
        print(f"calibrating with {texts} bundled texts", flush=True)
    else:
        print(f"calibrating with {texts} texts of {quantization.calibration}", flush=True)
    if quantization.has_reduced_range:
        print("int8 weights are limited to 7 bits, for processors without VNNI", flush=True)


def _encode_calibration(
    folder: Path, config: Any, reference: Reference, texts: Sequence[LabelledText]
) -> list[Inputs]:
    """Return the graph's inputs for each text that the model can read."""
    names = read_inputs(folder / "model.onnx")
    pairs = accepts_pairs(names, config) and not reference.labels_tokens
    usable = [item.text for item in texts if isinstance(item.text, str) or pairs]
    if not usable:
        raise BadInput(
            "All calibration texts are pairs, but this model reads single texts only; pass single"
            " texts with --calibration."
        )
    inputs: list[Inputs] = []
    for text in usable:
        encoded = reference.encode(text)
        zeros = np.zeros_like(encoded["input_ids"])
        inputs.append({name: encoded.get(name, zeros) for name in names})
    return inputs


def _verify(
    folder: Path,
    manifest: Manifest,
    reference: Reference,
    gate_texts: Sequence[LabelledText],
    quantization: Quantization,
) -> Manifest:
    """Run every variant against torch; return the manifest with parity, gates and self-checks.

    Raises BadInput if the service would read texts differently, or if cpu-fp32 does not reproduce
    the checkpoint.
    """
    threads = cpus.usable()
    artifact = Artifact(folder, manifest)
    texts: list[TextOrPair] = [
        text
        for text in texts_for(reference.tokenizer, reference.embedding_rows)
        if isinstance(text, str) or manifest.takes_pairs
    ]
    check_tokens(artifact, reference, texts, threads)
    try:
        invariant = is_padding_invariant(artifact, folder / "model.onnx", texts, threads)
    except ModelOutputInvalid as error:
        raise BadInput(f"The model cannot be served, its weights may overflow: {error}") from None
    if not invariant:
        print("answers depend on padding: the service will batch texts of equal length only")
    manifest = manifest.model_copy(update={"padding_invariant": invariant})
    probe_texts = [text for text in PROBES if text in texts]
    probes = read_probes(Artifact(folder, manifest), probe_texts, threads)
    manifest = manifest.model_copy(update={"probes": probes})
    verification = _Verification(
        Artifact(folder, manifest), reference, texts, gate_texts, quantization, threads
    )
    variants = {name: verification.run(name) for name in manifest.variants}
    return manifest.model_copy(update={"variants": variants})


@dataclass(frozen=True)
class _Verification:
    """Verifies the variants of one artifact against one reference."""

    artifact: Artifact
    reference: Reference
    texts: Sequence[TextOrPair]
    """Texts of the parity test."""
    gate_texts: Sequence[LabelledText]
    """Texts of the agreement gate; empty if there is no file of them."""
    quantization: Quantization
    threads: int

    def run(self, name: str) -> Variant:
        """Return a variant with its parity, gate and self-check, and print the gate.

        Raises BadInput if the fp32 variant cannot be run; another variant is then marked ungated.
        """
        variant = self.artifact.manifest.variants[name]
        parity: Parity | None = None
        self_check: SelfCheck | None = None
        try:
            parity, self_check, gate = self._measure(name)
        except (RuntimeUnavailable, ModelOutputInvalid) as error:
            if variant.precision == "f32":
                raise BadInput(f"{name} cannot be run: {error}") from None
            gate = Gate(status="ungated", reason=f"not verified: {error}")
            if (
                variant.precision == "bf16"
                and isinstance(error, RuntimeUnavailable)
                and self.reference.can_emulate_bf16
            ):
                parity, self_check, gate = self._emulate_bf16(name)
        gate = gate.model_copy(update={"processor": cpus.describe()})
        status = "FAILED its gate" if gate.status == "failed" else gate.status
        print(f"{name}: {status}: {gate.reason}", flush=True)
        return variant.model_copy(update={"parity": parity, "gate": gate, "self_check": self_check})

    def _measure(self, name: str) -> tuple[Parity, SelfCheck, Gate]:
        """Run a variant on its engine; return its parity, self-check and gate."""
        engine = select_engine(self.artifact, name)
        tolerance = RECIPES[name].tolerance
        parity = measure_parity(
            self.artifact, engine, self.reference, self.texts, tolerance, self.threads
        )
        if tolerance is not None:
            gate = gate_by_parity(name, parity, engine.runtime)
        else:
            gate = gate_by_agreement(
                self.artifact,
                name,
                self.gate_texts,
                self.quantization.agreement,
                self.quantization.agreement_per_label,
                self.threads,
            )
        self_check = record_self_check(
            self.artifact, engine, self.reference, self.artifact.manifest.probes, self.threads
        )
        return parity, self_check, gate

    def _emulate_bf16(self, name: str) -> tuple[Parity | None, SelfCheck | None, Gate]:
        """Gate the bf16 variant by torch's arithmetic, on a processor without bf16 instructions."""
        try:
            parity, self_check = emulate_bf16(
                self.artifact,
                self.reference,
                self.texts,
                self.artifact.manifest.probes,
                RECIPES[name].tolerance,
            )
        except ModelOutputInvalid as overflow:
            return None, None, Gate(status="failed", reason=overflow.message)
        gate = gate_by_parity(name, parity, self.artifact.manifest.variants[name].runtime)
        reason = (
            f"{gate.reason}; emulated in bf16 by torch, because this processor has no bf16"
            " instructions; each start of the service on one that has them compares its engine"
            " with this result"
        )
        status = "emulated" if gate.status == "passed" else gate.status
        return parity, self_check, gate.model_copy(update={"status": status, "reason": reason})
