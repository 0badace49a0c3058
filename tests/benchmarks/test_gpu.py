"""The stages for a GPU, in a dry run on the CPU with a tiny model, and the weightless models."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from benchmarks import gpu
from benchmarks.commands import main
from benchmarks.gpu import STAGES, engine, gpu_setup, serving, torch_side, twins
from benchmarks.gpu.gpu_setup import MODELS, VARIANT, GpuSetup
from benchmarks.harness.findings import Findings, read
from benchmarks.harness.weightless import STATISTICS, randomize_weights
from command import BadInput, BadUsage, Unavailable
from proof.plans.plan_file import read_plan
from service.artifact import read_artifact
from service.batching.shapes import GPU, Shapes, read_grid
from service.classifier import Classifier
from service.host import gpus
from service.runtimes.auto import Choice, load
from tests.requirements import no_gpu

pytestmark = pytest.mark.filterwarnings(
    "ignore"
)  # torch's tracer warns of what verification checks
TEXTS = [
    "a charming and often affecting journey",
    "bad",
    "no apparent joy",
    "it is not that the film is dull",
]


@pytest.fixture(scope="module")
def weightless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpu") / "weightless"
    gpu_setup.pack(folder, "tiny", ("cpu-fp32", VARIANT))
    return folder


@pytest.fixture(scope="module")
def setup(weightless: Path, tmp_path_factory: pytest.TempPathFactory) -> GpuSetup:
    folder = tmp_path_factory.mktemp("artifacts")
    return gpu_setup.build(folder, weightless, "tiny", TEXTS, dry_run=True)


def test_without_a_gpu_it_ends_with_one_line_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "visible", tuple)
    with pytest.raises(
        Unavailable, match=r"needs an NVIDIA GPU: .* try the stages on the CPU with --dry-run"
    ):
        main(["gpu"])
    with pytest.raises(BadUsage, match="Unknown stage 'speed'; known are providers, engine"):
        main(["gpu", "--stages", "speed"])


@no_gpu
def test_on_a_machine_without_a_gpu_the_command_exits_69() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "gpu"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (69, "", 1)
    assert "there is no NVIDIA driver" in done.stderr


def test_the_stages_need_nothing_of_what_exports() -> None:
    """A machine that only uses weightless models has none of these packages."""
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('export', 'openvino', 'nncf'))); import"
        " benchmarks.gpu"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("stage", [name for name in STAGES if name != "twins"])
def test_a_stage_runs_whole(stage: str, setup: GpuSetup) -> None:
    findings = STAGES[stage](setup)
    assert findings.name == stage
    assert findings.tables[0].rows
    assert findings.values
    # A dry run claims nothing about a GPU.
    assert not [
        target for target in findings.targets if target.holds and "CPU's" not in target.name
    ]


def test_a_stage_that_fails_costs_the_others_nothing(
    setup: GpuSetup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_: GpuSetup) -> Findings:
        raise RuntimeError("operation not permitted when stream is capturing")

    def version(name: str, real: Callable[[str], str] = importlib.metadata.version) -> str:
        if name in ("nncf", "onnxruntime"):  # as on a machine with onnxruntime-gpu
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setitem(STAGES, "torch", fails)
    with pytest.raises(Unavailable, match="Not measured: torch; the page says why"):
        gpu._run(["torch", "offline"], setup, tmp_path / "GPU.md", {}, "python -m benchmarks gpu")
    page = (tmp_path / "GPU.md").read_text()
    assert "Not measured: RuntimeError: operation not permitted when stream is capturing" in page
    assert "## offline" in page


def test_resuming_with_some_stages_keeps_what_the_page_holds_of_others(
    setup: GpuSetup, tmp_path: Path
) -> None:
    out = tmp_path / "GPU.md"
    gpu._run(["offline"], setup, out, {}, "python -m benchmarks gpu")
    before = {findings.name: findings for findings in read(out)}
    gpu._run(["providers"], setup, out, {"offline": before["offline"]}, "python -m benchmarks gpu")
    after = {findings.name: findings for findings in read(out)}
    assert list(after) == ["where", "providers", "offline"]
    assert after["offline"] == before["offline"]


def test_a_peer_that_stumbles_costs_our_figures_nothing(
    setup: GpuSetup, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = serving._loads

    def loads(command: list[str], *rest: Any) -> Any:
        if "app_pipeline:app" in command:
            raise Unavailable("server did not get ready.")
        return real(command, *rest)

    monkeypatch.setattr(serving, "_loads", loads)
    findings = serving.measure(setup)
    assert {row[0] for row in findings.tables[0].rows} == {"DrBERT Serve"}
    assert (
        "FastAPI over torch was not measured: server did not get ready." in findings.tables[0].note
    )


def test_a_graph_that_keeps_its_first_lengths_is_seen(
    setup: GpuSetup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A capture that holds a value instead of reading it again would do that."""
    runtime = setup.engine()
    real, first = runtime._run, dict[tuple[int, ...], Any]()

    def stale(batch: Any) -> Any:
        mask = first.setdefault(batch["input_ids"].shape, batch["attention_mask"])
        return real({**batch, "attention_mask": mask})

    monkeypatch.setattr(runtime, "_run", stale)
    findings = engine.providers(setup)
    right, wrong = findings.values["differences"][0::3], findings.values["differences"][1::3]
    assert max(right) < 1e-3
    assert max(wrong) > engine.TOLERANCE * max(findings.values["spreads"])
    assert findings.targets[0].holds is False


@torch.no_grad()
def test_a_mask_that_can_be_captured_masks_the_same() -> None:
    shape = {
        "vocab_size": 50,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    model = BertForSequenceClassification(BertConfig(**shape, attn_implementation="sdpa")).eval()
    mask = np.array([[1, 1, 1, 0], [1, 1, 1, 1]])
    batch = {
        "input_ids": np.array([[5, 6, 7, 0], [5, 6, 7, 8]]),
        "attention_mask": mask,
        "token_type_ids": np.zeros_like(mask),
    }
    expected = model(**{name: torch.from_numpy(array) for name, array in batch.items()}).logits
    assert torch.allclose(model(**torch_side.for_capture(torch, batch)).logits, expected, atol=1e-6)
    assert not torch.allclose(
        model(torch.from_numpy(batch["input_ids"])).logits, expected, atol=1e-6
    )


def test_the_proofs_plan_can_be_read(setup: GpuSetup, tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(TEXTS * 40) + "\n")
    folders = {name: str(artifact.directory) for name, artifact in setup.artifacts.items()}
    path = tmp_path / "plan.toml"
    path.write_text(
        twins.PLAN.format(
            texts=texts,
            bert=folders["bert"],
            drbert=folders["drbert"],
            kept=folders["drbert-with-decoder"],
            port=8000,
            restarts=8,
            tuples=32,
        )
    )
    plan = read_plan(path)
    assert {arm.role for arm in plan.arms} == {"reference", "candidate", "control", "delayed"}


def test_a_weightless_artifact_is_small_and_becomes_an_artifact_that_answers(
    weightless: Path, tmp_path: Path
) -> None:
    assert {path.name for path in weightless.iterdir()} == set(MODELS)
    assert sum(path.stat().st_size for path in (weightless / "bert").iterdir()) < 400_000
    twin, other = (
        read_artifact(randomize_weights(weightless / name, tmp_path / name, seed))
        for seed, name in enumerate(("bert", "drbert"))
    )
    assert (
        twin.manifest.variants[VARIANT].encoder_digest
        == other.manifest.variants[VARIANT].encoder_digest
    )
    assert (
        twin.manifest.files["model-cuda-fp16.onnx"] == other.manifest.files["model-cuda-fp16.onnx"]
    )
    assert (
        twin.manifest.files["model-cuda-fp16.onnx.weights"]
        != other.manifest.files["model-cuda-fp16.onnx.weights"]
    )
    for variant, runtime in (("cpu-fp32", "openvino"), (VARIANT, "onnxruntime")):
        classifier = Classifier(twin, load(twin, Choice(variant, runtime, "test"), 1))
        logits = classifier.predict([classifier.encode(text) for text in TEXTS])
        assert np.isfinite(logits).all()
        assert len({tuple(row) for row in logits.tolist()}) == len(TEXTS)


def test_one_seed_makes_one_artifact(weightless: Path, tmp_path: Path) -> None:
    files = [
        read_artifact(
            randomize_weights(weightless / "bert", tmp_path / str(n), seed=5)
        ).manifest.files
        for n in range(2)
    ]
    assert files[0] == files[1]


def test_a_folder_that_is_not_a_weightless_artifact_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="is not a weightless artifact"):
        randomize_weights(tmp_path, tmp_path / "artifact", 0)
    (tmp_path / STATISTICS).write_text("{")
    with pytest.raises(BadInput, match="benchmarks gpu --pack"):
        randomize_weights(tmp_path, tmp_path / "artifact", 0)
    with pytest.raises(BadInput, match="is not empty"):
        gpu_setup.pack(tmp_path, "tiny")


def test_calibration_writes_a_grid_that_the_service_reads(setup: GpuSetup, tmp_path: Path) -> None:
    engine.calibrate(setup, tmp_path / "grid.json")
    grid = read_grid(tmp_path / "grid.json", "CPU")
    assert grid.padded_rows
    assert Shapes(64, grid=grid).lengths[-1] == 64
    assert len(json.loads((tmp_path / "grid.json").read_text())["measured"]) >= len(grid.lengths)


def test_a_shape_that_takes_as_long_as_the_next_is_not_kept() -> None:
    # Free up to 32 tokens a batch, then in proportion: half lengths and half batches gain something
    # only from there on.
    times = [
        (size, length, max(1.0, size * length / 32))
        for size in (1, 2, 4, 8)
        for length in (8, 16, 32, 64)
    ]
    grid = engine.worthwhile_grid(times, GPU)
    assert grid.lengths == (8, 16, 32, 64)
    assert grid.batch_sizes == (1, 2, 4, 8)
    assert grid.max_batch_tokens == 32
    flat = engine.worthwhile_grid(
        [(size, length, 1.0 + (length == 64)) for size in (1, 2) for length in (8, 16, 64)], GPU
    )
    assert flat.lengths == (16, 64)
    assert flat.batch_sizes == (2,)
