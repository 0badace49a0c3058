"""The stages for a GPU, rehearsed whole on the CPU with a tiny model, and models carried as
skeletons.
"""

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
from benchmarks.gpu import STAGES, engine, rig, serving, torch_side, twins
from benchmarks.gpu.rig import MODELS, VARIANT, Rig
from benchmarks.harness.findings import Findings, read
from benchmarks.harness.weightless import SKELETON, grow
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
def skeletons(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpu") / "skeletons"
    rig.pack(folder, "tiny", ("cpu-fp32", VARIANT))
    return folder


@pytest.fixture(scope="module")
def made(skeletons: Path, tmp_path_factory: pytest.TempPathFactory) -> Rig:
    return rig.build(tmp_path_factory.mktemp("grown"), skeletons, "tiny", TEXTS, rehearsal=True)


def test_without_a_gpu_it_ends_with_one_line_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "visible", tuple)
    with pytest.raises(
        Unavailable, match=r"needs an NVIDIA GPU: .* --rehearse shows the stages on the CPU"
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
    """A machine that is given skeletons has none of it."""
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('export', 'openvino', 'nncf'))); import"
        " benchmarks.gpu"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("stage", [name for name in STAGES if name != "twins"])
def test_a_stage_runs_whole(stage: str, made: Rig) -> None:
    found = STAGES[stage](made)
    assert found.name == stage
    assert found.tables[0].rows
    assert found.values
    # A rehearsal claims nothing of a GPU.
    assert not [target for target in found.targets if target.holds and "CPU's" not in target.what]


def test_a_stage_that_fails_costs_the_others_nothing(
    made: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_: Rig) -> Findings:
        raise RuntimeError("operation not permitted when stream is capturing")

    def version(name: str, real: Callable[[str], str] = importlib.metadata.version) -> str:
        if name in ("nncf", "onnxruntime"):  # as on a machine with onnxruntime-gpu
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setitem(STAGES, "torch", fails)
    with pytest.raises(Unavailable, match="Not measured: torch; the page says why"):
        gpu._run(["torch", "offline"], made, tmp_path / "GPU.md", {}, "python -m benchmarks gpu")
    page = (tmp_path / "GPU.md").read_text()
    assert "Not measured: RuntimeError: operation not permitted when stream is capturing" in page
    assert "## offline" in page


def test_resuming_with_some_stages_keeps_what_the_page_holds_of_others(
    made: Rig, tmp_path: Path
) -> None:
    out = tmp_path / "GPU.md"
    gpu._run(["offline"], made, out, {}, "python -m benchmarks gpu")
    before = {one.name: one for one in read(out)}
    gpu._run(["providers"], made, out, {"offline": before["offline"]}, "python -m benchmarks gpu")
    after = {one.name: one for one in read(out)}
    assert list(after) == ["where", "providers", "offline"]
    assert after["offline"] == before["offline"]


def test_a_peer_that_stumbles_costs_our_figures_nothing(
    made: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = serving._loads

    def loads(command: list[str], *rest: Any) -> Any:
        if "app_pipeline:app" in command:
            raise Unavailable("server did not get ready.")
        return real(command, *rest)

    monkeypatch.setattr(serving, "_loads", loads)
    found = serving.measure(made)
    assert {row[0] for row in found.tables[0].rows} == {"DrBERT Serve"}
    assert "FastAPI over torch was not measured: server did not get ready." in found.tables[0].note


def test_a_graph_that_keeps_its_first_lengths_is_seen(
    made: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a capture of a value that should have been read anew would do."""
    runtime = made.engine()
    real, first = runtime._run, dict[tuple[int, ...], Any]()

    def stale(given: Any) -> Any:
        mask = first.setdefault(given["input_ids"].shape, given["attention_mask"])
        return real({**given, "attention_mask": mask})

    monkeypatch.setattr(runtime, "_run", stale)
    found = engine.providers(made)
    right, wrong = found.values["differences"][0::3], found.values["differences"][1::3]
    assert max(right) < 1e-3
    assert max(wrong) > engine.TOLERANCE * max(found.values["spreads"])
    assert found.targets[0].holds is False


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
    given = {
        "input_ids": np.array([[5, 6, 7, 0], [5, 6, 7, 8]]),
        "attention_mask": mask,
        "token_type_ids": np.zeros_like(mask),
    }
    expected = model(**{name: torch.from_numpy(array) for name, array in given.items()}).logits
    assert torch.allclose(model(**torch_side.for_capture(torch, given)).logits, expected, atol=1e-6)
    assert not torch.allclose(
        model(torch.from_numpy(given["input_ids"])).logits, expected, atol=1e-6
    )


def test_the_proofs_plan_can_be_read(made: Rig, tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(TEXTS * 40) + "\n")
    folders = {name: str(artifact.directory) for name, artifact in made.artifacts.items()}
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


def test_a_skeleton_is_small_and_grows_to_an_artifact_that_answers(
    skeletons: Path, tmp_path: Path
) -> None:
    assert {path.name for path in skeletons.iterdir()} == set(MODELS)
    assert sum(path.stat().st_size for path in (skeletons / "bert").iterdir()) < 400_000
    twin, other = (
        read_artifact(grow(skeletons / name, tmp_path / name, seed))
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


def test_one_seed_grows_one_artifact(skeletons: Path, tmp_path: Path) -> None:
    files = [
        read_artifact(grow(skeletons / "bert", tmp_path / str(n), seed=5)).manifest.files
        for n in range(2)
    ]
    assert files[0] == files[1]


def test_what_is_no_skeleton_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="is no skeleton of an artifact"):
        grow(tmp_path, tmp_path / "artifact", 0)
    (tmp_path / SKELETON).write_text("{")
    with pytest.raises(BadInput, match="benchmarks gpu --pack"):
        grow(tmp_path, tmp_path / "artifact", 0)
    with pytest.raises(BadInput, match="is not empty"):
        rig.pack(tmp_path, "tiny")


def test_calibration_writes_a_grid_that_the_service_reads(made: Rig, tmp_path: Path) -> None:
    engine.calibrate(made, tmp_path / "grid.json")
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
    kept = engine.keep(times, GPU)
    assert kept.lengths == (8, 16, 32, 64)
    assert kept.batch_sizes == (1, 2, 4, 8)
    assert kept.max_batch_tokens == 32
    flat = engine.keep(
        [(size, length, 1.0 + (length == 64)) for size in (1, 2) for length in (8, 16, 64)], GPU
    )
    assert flat.lengths == (16, 64)
    assert flat.batch_sizes == (2,)
