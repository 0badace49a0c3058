"""
What is measured: three artifacts of one size with random weights, and the engines that run them.
"""

from __future__ import annotations

import importlib.metadata
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.harness.weightless import grow, strip
from command import BadInput
from service.artifact import Artifact, read_artifact
from service.batching.shapes import GPU, Grid
from service.classifier import Classifier
from service.host import gpus
from service.runtimes.auto import Choice, load
from service.runtimes.cuda import CudaRuntime

VARIANT = "cuda-fp16"
POSITIONS = {"base": 512, "tiny": 64}
# A decoder kept as two layers more is the proof's control.
MODELS = {"bert": 0, "drbert": 0, "drbert-with-decoder": 2}
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


class Rehearsal(CudaRuntime):
    """Buckets and bindings by the CPU's provider, where there is no GPU."""

    device = "CPU"

    def __init__(self, model: Path, labels: int, max_tokens: int, grid: Grid) -> None:
        self.grid = grid
        self._open(model, labels, max_tokens, [("CPUExecutionProvider", {})], "cpu")


@dataclass(frozen=True)
class Rig:
    size: str
    artifacts: dict[str, Artifact]
    texts: Sequence[str]
    folder: Path
    rehearsal: bool
    evidence: Path | None = None
    """Where the proof's evidence is kept; None: it goes with the folder."""
    _engines: dict[str, CudaRuntime] = field(default_factory=dict)

    def engine(self, name: str = "bert") -> CudaRuntime:
        """The engine of that model, loaded once."""
        if name not in self._engines:
            self._engines[name] = self._load(self.artifacts[name])
        return self._engines[name]

    def classifier(self, name: str = "bert") -> Classifier:
        return Classifier(self.artifacts[name], self.engine(name))

    def _load(self, artifact: Artifact) -> CudaRuntime:
        manifest = artifact.manifest
        if self.rehearsal:
            grid = Grid(
                (1, 2, 4), ((16, 8),), 16, max_batch_tokens=256, padded_rows=True, all_warm=True
            )
            return Rehearsal(
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
        return self.engine().grid if self.rehearsal else GPU

    def versions(self) -> str:
        installed = {
            distribution.name: distribution.version
            for distribution in importlib.metadata.distributions()
        }
        driver = gpus.driver_version()
        return ", ".join(
            [f"{name} {installed[name]}" for name in PACKAGES if name in installed]
            + ([f"NVIDIA driver {driver}"] if driver else [])
        )


def pack(folder: Path, size: str, variants: Sequence[str] = (VARIANT,)) -> None:
    """Skeletons of the models in `folder`, for a machine where nothing can be exported."""
    if folder.exists() and any(folder.iterdir()):
        raise BadInput(f"{folder} is not empty; choose a new folder.")
    # Here only: where skeletons are grown, none of what exports is installed.
    from benchmarks.harness.checkpoints import SIZES, write_checkpoint
    from export.pipeline import export

    with tempfile.TemporaryDirectory() as temporary:
        for name, more_layers in MODELS.items():
            checkpoint, artifact = Path(temporary) / f"{name}-checkpoint", Path(temporary) / name
            layers = SIZES[size]["num_hidden_layers"] + more_layers
            # Weights as they are drawn for training make attention look everywhere alike, and
            # answers that hardly depend on who is masked.
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
            strip(artifact, folder / name, variants)
            print(
                f"{folder / name}:"
                f" {sum(path.stat().st_size for path in (folder / name).iterdir()) / 1e6:.1f} MB",
                flush=True,
            )


def build(
    folder: Path,
    models: Path | None,
    size: str,
    texts: Sequence[str],
    rehearsal: bool,
    evidence: Path | None = None,
) -> Rig:
    """The artifacts in `folder`, grown from the skeletons in `models`, or from ones that are made
    now.
    """
    if models is None:
        models = folder / "skeletons"
        # A rehearsal's servers run on the CPU.
        pack(models, size, ("cpu-fp32", VARIANT) if rehearsal else (VARIANT,))
    grown = {name: grow(models / name, folder / name, seed) for seed, name in enumerate(MODELS)}
    return Rig(
        size,
        {name: read_artifact(path) for name, path in grown.items()},
        texts,
        folder,
        rehearsal,
        evidence,
    )
