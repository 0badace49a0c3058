"""
The setup of the GPU benchmark: three artifacts of one size with random weights, and their engines.
"""

from __future__ import annotations

import importlib.metadata
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.harness.weightless import randomize_weights, remove_weights
from command import BadInput
from service.artifact import Artifact, read_artifact
from service.batching.shapes import GPU, Grid
from service.classifier import Classifier
from service.host import gpus
from service.runtimes.auto import Choice, load
from service.runtimes.cuda import CudaRuntime

VARIANT = "cuda-fp16"
POSITIONS = {"base": 512, "tiny": 64}
MODELS = {"bert": 0, "drbert": 0, "drbert-with-decoder": 2}
"""Layers that each model has beyond its size's; the kept decoder is the proof's control."""
PACKAGES = (
    "onnxruntime-gpu",
    "onnxruntime",
    "torch",
    "transformers",
    "tokenizers",
    "nvidia-cudnn-cu13",
    "nvidia-cublas",
    "tensorrt",
)


class CpuStandIn(CudaRuntime):
    """The GPU runtime's buckets and bindings on the CPU's provider, for a dry run."""

    device = "CPU"

    def __init__(self, model: Path, labels: int, max_tokens: int, grid: Grid) -> None:
        self.grid = grid
        self._open(model, labels, max_tokens, [("CPUExecutionProvider", {})], "cpu")


@dataclass(frozen=True)
class GpuSetup:
    """The models, texts and folders that all stages share."""

    size: str
    artifacts: dict[str, Artifact]
    """Artifacts by the names in MODELS."""
    texts: Sequence[str]
    folder: Path
    """Temporary folder of this run."""
    dry_run: bool
    """Whether the CPU stands in for the GPU."""
    evidence: Path | None = None
    """Folder that keeps the proof's evidence; None puts it into `folder`."""
    _engines: dict[str, CudaRuntime] = field(default_factory=dict)

    def engine(self, name: str = "bert") -> CudaRuntime:
        """Return the engine of a model, which is loaded once."""
        if name not in self._engines:
            self._engines[name] = self._load(self.artifacts[name])
        return self._engines[name]

    def classifier(self, name: str = "bert") -> Classifier:
        """Return a classifier over the engine of a model."""
        return Classifier(self.artifacts[name], self.engine(name))

    def _load(self, artifact: Artifact) -> CudaRuntime:
        manifest = artifact.manifest
        if self.dry_run:
            grid = Grid(
                (1, 2, 4), ((16, 8),), 16, max_batch_tokens=256, padded_rows=True, warm_up_all=True
            )
            return CpuStandIn(
                artifact.path(manifest.variants[VARIANT].files[0]),
                len(manifest.labels),
                manifest.max_tokens,
                grid,
            )
        runtime = load(artifact, Choice(VARIANT, "cuda", "benchmark"), 1)
        assert isinstance(runtime, CudaRuntime)
        return runtime

    @property
    def grid(self) -> Grid:
        """Grid of the engine's shapes."""
        return self.engine().grid if self.dry_run else GPU

    def versions(self) -> str:
        """Return the versions of the packages and of the driver, as one line."""
        installed = {
            distribution.name: distribution.version
            for distribution in importlib.metadata.distributions()
        }
        versions = [f"{name} {installed[name]}" for name in PACKAGES if name in installed]
        if driver := gpus.driver_version():
            versions.append(f"NVIDIA driver {driver}")
        return ", ".join(versions)


def pack(folder: Path, size: str, variants: Sequence[str] = (VARIANT,)) -> None:
    """Write weightless models to `folder`, for a machine where nothing can be exported.

    Raises BadInput if `folder` is not empty.
    """
    if folder.exists() and any(folder.iterdir()):
        raise BadInput(f"{folder} is not empty; choose a new folder.")
    # Imported here: a machine that only uses the models has no package that exports.
    from benchmarks.harness.checkpoints import SIZES, write_checkpoint
    from export.pipeline import export

    with tempfile.TemporaryDirectory() as temporary:
        for name, more_layers in MODELS.items():
            checkpoint, artifact = Path(temporary) / f"{name}-checkpoint", Path(temporary) / name
            layers = SIZES[size]["num_hidden_layers"] + more_layers
            # With the usual initial weights, attention is nearly uniform and answers hardly depend
            # on the mask.
            deviation = 1.5 / math.sqrt(SIZES[size]["hidden_size"])
            write_checkpoint(
                checkpoint,
                size,
                seed=0,
                positions=POSITIONS[size],
                num_hidden_layers=layers,
                initializer_range=deviation,
            )
            export(str(checkpoint), artifact, variants=("cpu-fp32", VARIANT))
            remove_weights(artifact, folder / name, variants)
            size_bytes = sum(path.stat().st_size for path in (folder / name).iterdir())
            print(f"{folder / name}: {size_bytes / 1e6:.1f} MB", flush=True)


def build(
    folder: Path,
    models: Path | None,
    size: str,
    texts: Sequence[str],
    dry_run: bool,
    evidence: Path | None = None,
) -> GpuSetup:
    """Return a setup whose artifacts are in `folder`, with random weights.

    They are made from the weightless models in `models`; None exports those first.
    """
    if models is None:
        models = folder / "weightless"
        # The servers of a dry run use the CPU.
        pack(models, size, ("cpu-fp32", VARIANT) if dry_run else (VARIANT,))
    artifacts = {}
    for seed, name in enumerate(MODELS):
        artifacts[name] = read_artifact(randomize_weights(models / name, folder / name, seed))
    return GpuSetup(size, artifacts, texts, folder, dry_run, evidence)
