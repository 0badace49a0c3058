"""
What is measured: the example twin, and a classifier of BERT-base's size with random weights, both
in every variant this processor runs.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness.checkpoints import write_checkpoint
from export.graph.variants import RECIPES
from export.pipeline import Quantization, export
from service.artifact import Artifact, ArtifactError, read_artifact
from service.classifier import Classifier
from service.host import cpus
from service.runtimes.openvino import OpenVinoRuntime

FOLDER = Path("build/bench")
MINI = Path("examples/checkpoints/bert-mini-sst2")


@dataclass(frozen=True)
class Subject:
    name: str
    checkpoint: Path
    artifact: Artifact

    @property
    def variants(self) -> list[str]:
        """Those that this processor has instructions for, fastest last."""
        native = cpus.native_precisions()
        return [
            name
            for name, variant in self.artifact.manifest.variants.items()
            if variant.precision in native
        ]


def subject(name: str, gate: Path | None = None) -> Subject:
    """`mini`, `base` or `tiny`, made below FOLDER the first time it is asked for, and again when it
    has become unreadable.

    Its int8 is held against fp32 by the texts of `gate`; without them it is ungated.
    """
    checkpoint = MINI if name == "mini" else FOLDER / "checkpoints" / name
    if name != "mini" and not (checkpoint / "model.safetensors").is_file():
        write_checkpoint(checkpoint, name, seed=0)
    target = FOLDER / "artifacts" / name
    try:
        artifact = read_artifact(target)
        if gate is not None and any(
            variant.gate.status == "ungated" for variant in artifact.manifest.variants.values()
        ):
            shutil.rmtree(target)
            raise ArtifactError(f"{target} was made without texts to gate it with.")
    except ArtifactError:
        # An emulated precision would take minutes to verify and is measured nowhere.
        native = cpus.native_precisions()
        export(
            str(checkpoint),
            target,
            variants=[variant for variant, recipe in RECIPES.items() if recipe.precision in native],
            quantization=Quantization(gate=gate),
        )
        artifact = read_artifact(target)
    return Subject(name, checkpoint, artifact)


def shapes_of(short: bool) -> Sequence[tuple[int, int]]:
    """Batch × length."""
    return (
        ((1, 16), (1, 128), (8, 32), (8, 128))
        if short
        else ((1, 16), (1, 32), (1, 128), (8, 32), (8, 128), (16, 32))
    )


def a_row_each(artifact: Artifact, variant: str, threads: int) -> Classifier:
    """A classifier whose texts share no rows."""
    chosen = artifact.manifest.variants[variant]
    return Classifier(
        artifact,
        OpenVinoRuntime(
            artifact.path(chosen.files[0]), chosen.precision, threads, chosen.lowest_rest
        ),
    )
