"""
The models that are measured: the example twin, and classifiers with random weights.

Each is exported once, in every variant that this processor runs natively.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness.checkpoints import CLASSES, write_checkpoint
from export.graph.variants import RECIPES
from export.pipeline import Quantization, export
from service.artifact import Artifact, ArtifactError, read_artifact
from service.classifier import Classifier
from service.host import cpus
from service.runtimes.openvino import OpenVinoRuntime

FOLDER = Path("build/bench")
MINI = Path("examples/checkpoints/bert-mini-sst2")
RERANKER = "reranker-"
"""Beginning of the names of cross-encoders: it is followed by their size."""


@dataclass(frozen=True)
class ModelUnderTest:
    """A model with its checkpoint and its exported artifact."""

    name: str
    """Size: `mini`, `base` or `tiny`; of a cross-encoder, `reranker-` and its size."""
    checkpoint: Path
    artifact: Artifact

    @property
    def variants(self) -> list[str]:
        """Names of the variants that this processor has instructions for, fastest last."""
        native = cpus.native_precisions()
        return [
            name
            for name, variant in self.artifact.manifest.variants.items()
            if variant.precision in native
        ]


def model_under_test(name: str, gate: Path | None = None) -> ModelUnderTest:
    """Return the model of that name, exported below FOLDER if it is not there yet.

    `mini` has real weights; `base`, `tiny` and cross-encoders (`reranker-mini`, …) random ones. An
    artifact that cannot be read is exported again. The texts in the file `gate` gate its int8
    against fp32; without them int8 is ungated.
    """
    checkpoint = MINI if name == "mini" else FOLDER / "checkpoints" / name
    if name != "mini" and not (checkpoint / "model.safetensors").is_file():
        size = name.removeprefix(RERANKER)
        write_checkpoint(checkpoint, size, seed=0, labels=CLASSES if size == name else ("SCORE",))
    folder = FOLDER / "artifacts" / name
    try:
        artifact = read_artifact(folder)
        statuses = {variant.gate.status for variant in artifact.manifest.variants.values()}
        if gate is not None and "ungated" in statuses:
            shutil.rmtree(folder)
            raise ArtifactError(f"{folder} was exported without gate texts.")
    except ArtifactError:
        # An emulated precision would take minutes to verify, and no benchmark measures it.
        native = cpus.native_precisions()
        export(
            str(checkpoint),
            folder,
            variants=[
                variant
                for variant, recipe in RECIPES.items()
                # cpu-int8-ort has a benchmark of its own: engines.
                if recipe.precision in native and recipe.runtime == "openvino"
            ],
            quantization=Quantization(gate=gate),
        )
        artifact = read_artifact(folder)
    return ModelUnderTest(name, checkpoint, artifact)


def batch_shapes(short: bool) -> Sequence[tuple[int, int]]:
    """Return the batch shapes to measure, each (texts, tokens); fewer of them if `short`."""
    if short:
        return ((1, 16), (1, 128), (8, 32), (8, 128))
    return ((1, 16), (1, 32), (1, 128), (8, 32), (8, 128), (16, 32))


def unpacked_classifier(artifact: Artifact, variant: str, threads: int) -> Classifier:
    """Return a classifier that gives each text a row of its own (no sequence packing)."""
    chosen = artifact.manifest.variants[variant]
    return Classifier(
        artifact,
        OpenVinoRuntime(
            artifact.path(chosen.files[0]),
            chosen.precision,
            threads,
            chosen.lowest_unquantized_precision,
        ),
    )
