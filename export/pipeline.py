"""
Exports a fine-tuned checkpoint to an artifact; `export` lists the steps in their order.

A reduced variant that fails its gate is still part of the artifact, marked as failed. An export
that raises leaves nothing behind.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from command import BadInput, BadUsage
from export.checkpoint.loading import Checkpoint, build_model, embedding_rows, read_checkpoint
from export.checkpoint.reference import PROBES, Reference, TextOrPair, texts_for
from export.checkpoint.tokenizer import load_tokenizer, write_tokenizer
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
from export.manifest import (
    Network,
    Signature,
    accepts_pairs,
    describe_artifact,
    read_provenance,
    read_signature,
    write_manifest,
)
from export.model_source import (
    check_options_of_graph,
    choose_reference,
    count_parameters,
    read_imported_model,
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
    source: str,
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
    Raises BadInput, BadUsage or Unavailable for a checkpoint that cannot be exported, with the
    reason.
    """
    is_gated = any(RECIPES[name].gated_by_agreement for name in variants)
    is_compared = is_gated or distillation is not None
    if is_compared and "cpu-fp32" not in variants:
        variants = ("cpu-fp32", *variants)
    target = resolve_target(target)
    checkpoint = read_checkpoint(source, revision)
    if checkpoint.graph is not None:
        check_options_of_graph(checkpoint, keep_decoder, distillation)
    model = read_imported_model(checkpoint) or build_model(checkpoint, keep_decoder)
    tokenizer = load_tokenizer(checkpoint.directory)
    signature = read_signature(checkpoint, model.config, tokenizer, task)
    if signature.task == "token_labels":
        _check_for_token_labels(variants, quantization, distillation)
    calibration_texts, gate_texts = _read_quantization_texts(quantization, signature.labels)
    _report_discarded(checkpoint, keep_decoder)
    student: Student | None = None
    if distillation is not None:
        student = train_student(checkpoint, tokenizer, signature, distillation, gate_texts, target)
        checkpoint, gate_texts = student.checkpoint, student.gate_texts
        model = build_model(checkpoint)

    with draft_artifact(target) as folder:
        flushed = _write_graph(folder, checkpoint, model, tokenizer, signature)
        reference = choose_reference(checkpoint, model, tokenizer, signature, keep_decoder)
        _build_variants(folder, model.config, variants, reference, calibration_texts, quantization)
        manifest = describe_artifact(
            folder,
            checkpoint,
            Network(model.config, count_parameters(model)),
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


def _write_graph(
    folder: Path,
    checkpoint: Checkpoint,
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    signature: Signature,
) -> int:
    """Write tokenizer.json and the fp32 graph; return how many subnormal weights became zero."""
    graph, max_tokens = folder / "model.onnx", signature.max_tokens
    if isinstance(model, ImportedModel):
        rows = model.embedding_rows
        shutil.copyfile(model.graph, graph)
    else:
        print("exporting the graph", flush=True)
        rows = embedding_rows(model)
        export_onnx(
            with_export_attention(model),
            graph,
            graph_inputs(model, tokenizer.model_input_names),
            max_tokens,
            labels_tokens=signature.task == "token_labels",
        )
    write_tokenizer(tokenizer, checkpoint.directory, rows, folder / "tokenizer.json")
    check_lengths(graph, model.config.model_type, max_tokens, rows)
    flushed = flush_subnormal_weights(graph)
    if flushed:
        print(
            f"sets {flushed:,} subnormal weights to zero: they change no answer and slow processors"
            " down",
            flush=True,
        )
    return flushed


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
