"""
The student of an export: trained on texts of the user's, and compared with its teacher on others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from command import BadInput
from export.checkpoint.loading import Checkpoint
from export.checkpoint.reference import Reference, load_model
from export.checks.gate import MIN_TEXTS, Requirement, judge_logits, logits_of
from export.distillation import Distillation, Lessons, depth_of, distil
from export.manifest import Signature
from export.texts import LabelledText, excluding, read_texts
from service.artifact import Artifact, Distilled, Gate, Manifest
from service.classifier import Classifier
from service.host import cpus
from service.runtimes.auto import Choice, load


@dataclass(frozen=True)
class Student:
    """A model that learnt from a larger one, which it is compared with."""

    checkpoint: Checkpoint
    teacher: Checkpoint
    settings: Distillation
    texts: int
    """Number of texts that it learnt on."""
    gate_texts: list[LabelledText]
    """Texts that it did not learn on."""
    folder: Path
    """Folder of its training, next to the artifact; an interrupted one is found there again."""


def train_student(
    teacher: Checkpoint,
    tokenizer: PreTrainedTokenizerFast,
    signature: Signature,
    settings: Distillation,
    gate_texts: Sequence[LabelledText],
    target: Path,
) -> Student:
    """Return the student of a checkpoint, trained on texts that the gate does not have."""
    texts = excluding(
        read_texts(settings.texts, signature.labels), [item.text for item in gate_texts]
    )
    if not texts:
        raise BadInput(
            f"{settings.texts}: all of its texts are in the gate's file too. The gate needs texts"
            " that the student has not learnt on."
        )
    folder = target.with_name(f".{target.name}.distilling")
    checkpoint = distil(
        teacher,
        Lessons([item.text for item in texts], tokenizer, signature.task, signature.max_tokens),
        settings,
        # The artifact is called as the teacher is.
        folder / teacher.directory.resolve().name,
    )
    return Student(checkpoint, teacher, settings, len(texts), list(gate_texts), folder)


def gate_student(
    folder: Path,
    manifest: Manifest,
    student: Student,
    reference: Reference,
    required: float,
    required_per_label: float | None,
) -> Manifest:
    """Return the manifest with the student's agreement with its teacher.

    `required` and `required_per_label` are lower bounds of the share that agrees, as for int8. No
    variant passes its gate unless the student does: each of them computes the student.
    """
    artifact = Artifact(folder, manifest)
    usable = [
        item for item in student.gate_texts if isinstance(item.text, str) or manifest.takes_pairs
    ]
    if usable:
        print(f"comparing the student with its teacher on {len(usable):,} texts", flush=True)
        fp32 = load(artifact, Choice("cpu-fp32", "openvino", "verification"), cpus.usable())
        teacher = Reference(load_model(student.teacher), reference.tokenizer, reference.max_tokens)
        gate = judge_logits(
            teacher.logits([item.text for item in usable]),
            logits_of(Classifier(artifact, fp32), usable),
            artifact,
            usable,
            Requirement(required, required_per_label),
            exact="teacher",
        )
    else:
        gate = Gate(
            status="ungated",
            reason=f"no texts to gate it with; give --gate FILE with at least {MIN_TEXTS:,}",
        )
    layers = f"distilled to {student.settings.layers} of {depth_of(student.teacher)} layers"
    status = "FAILED its gate" if gate.status == "failed" else gate.status
    print(f"{layers}: {status}: {gate.reason}", flush=True)
    distilled = Distilled(
        teacher_sha256=student.teacher.weights_sha256(),
        teacher_layers=depth_of(student.teacher),
        layers=student.settings.layers,
        texts=student.texts,
        epochs=student.settings.epochs,
        gate=gate,
    )
    variants = manifest.variants
    if gate.status != "passed":
        variants = {
            name: variant
            if variant.gate.status == "failed"
            else variant.model_copy(
                update={
                    "gate": variant.gate.model_copy(
                        update={"status": gate.status, "reason": f"{layers}: {gate.reason}"}
                    )
                }
            )
            for name, variant in variants.items()
        }
    return manifest.model_copy(update={"distilled": distilled, "variants": variants})
