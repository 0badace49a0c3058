"""A pretraining run resumes exactly, and its checkpoint is a Hugging Face folder."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from command import BadInput, Unavailable
from tests.training.factories import CONFIGS, TEXT, TINY, tiny, vocabulary, write_text
from training.checkpoint import WeightSum
from training.config import read_config
from training.corpus import prepare
from training.masking import MASKING_SPLITS, mask_tokens
from training.model import build_model
from training.pretrain import Log, MicroBatches, build_optimiser, forward, masked_batch, pretrain
from training.rng import make_rng


def break_off_at(last: int) -> Callable[..., None]:
    real = Log.add

    def add(self: Log, step: int, *rest: Any) -> None:
        real(self, step, *rest)
        if step == last:
            raise KeyboardInterrupt

    return add


def logged(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "log.csv").read_text().splitlines()))


def same_weights(first: Path, second: Path) -> bool:
    weights, others = (
        load_file(folder / "checkpoint/model.safetensors") for folder in (first, second)
    )
    assert weights.keys() == others.keys()
    return all(torch.equal(weights[name], others[name]) for name in weights)


def test_there_is_a_tiny_config_of_every_design_and_encoder() -> None:
    configs = [read_config(CONFIGS / f"{name}.toml") for name in TINY]
    assert {config.decoder.design for config in configs} == {
        "none",
        "plain",
        "gua",
        "mix",
        "drbert",
        "emd",
        "mae",
        "retro",
    }
    assert {(config.encoder.family, config.objective.name) for config in configs} == {
        ("bert", "mlm"),
        ("electra", "mlm"),
        ("electra", "rtd"),
        ("convbert", "mlm"),
        ("convbert", "rtd"),
    }


@pytest.mark.parametrize("name", TINY)
def test_a_run_that_was_stopped_and_resumed_ends_as_if_it_had_not_been(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = read_config(CONFIGS / f"{name}.toml")
    pretrain(config, TEXT, tmp_path / "whole")
    # Broken off at step 7, three steps after the last save, where dropout and the decoder draw
    # random numbers.
    with monkeypatch.context() as patched:
        patched.setattr(Log, "add", break_off_at(7))
        with pytest.raises(KeyboardInterrupt):
            pretrain(config, TEXT, tmp_path / "parts")
    assert not (tmp_path / "parts/checkpoint").exists()
    pretrain(config, TEXT, tmp_path / "parts", resume=True)
    assert same_weights(tmp_path / "whole", tmp_path / "parts")
    whole, parts = ([row["loss"] for row in logged(tmp_path / name)] for name in ("whole", "parts"))
    assert whole == parts
    assert len(whole) == 12
    summary = json.loads((tmp_path / "whole/checkpoint/training.json").read_text())
    assert summary["tokens"] == 12 * 8 * 32
    assert summary["flops"] > 0


def test_the_checkpoint_is_the_mean_of_the_last_saves_also_after_a_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    added: list[dict[str, torch.Tensor]] = []
    add = WeightSum.add

    def remember(self: WeightSum, model: nn.Module) -> None:
        add(self, model)
        added.append({name: weight.clone() for name, weight in model.state_dict().items()})

    monkeypatch.setattr(WeightSum, "add", remember)
    config = tiny("none", tmp_path / "c.toml", "[optimisation]\nsteps = 10\naverage = 2")
    pretrain(config, TEXT, tmp_path / "whole")
    assert len(added) == 2  # of the saves at steps 4, 8 and 10
    weights = load_file(tmp_path / "whole/checkpoint/model.safetensors")
    for name, weight in weights.items():
        assert torch.allclose(weight, (added[0][name] + added[1][name]) / 2)
    with monkeypatch.context() as patched:
        patched.setattr(Log, "add", break_off_at(9))
        with pytest.raises(KeyboardInterrupt):
            pretrain(config, TEXT, tmp_path / "parts")
    pretrain(config, TEXT, tmp_path / "parts", resume=True)
    assert same_weights(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("name", TINY)
def test_the_loss_falls_on_repeated_steps(tmp_path: Path, name: str) -> None:
    config = tiny(name.removeprefix("tiny-"), tmp_path / "c.toml", "[encoder]\ndropout = 0.0")
    corpus = prepare(config.data, TEXT, tmp_path)
    model = build_model(config, corpus.vocabulary)
    optimiser = build_optimiser(model, config.optimisation)
    masked = mask_tokens(
        corpus.batch(0, 8, 0),
        0.15,
        corpus.vocabulary,
        np.random.default_rng(0),
        split=MASKING_SPLITS[config.objective.name],
    )
    losses = []
    for _ in range(60):
        part_losses = forward(model, masked, make_rng(0, "test"), torch.device("cpu"))
        part_losses["loss"].backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        optimiser.zero_grad()
        losses.append({name: loss.item() for name, loss in part_losses.items()})
    for part in model.loss_parts or ("loss",):
        assert losses[-1][part] < 0.7 * losses[0][part], part


SIGNALLED = "[optimisation]\nsteps = 150\ncheckpoint_every = 15"


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    tiny("drbert", folder / "c.toml", SIGNALLED)
    subprocess.run(command(folder / "c.toml", folder / "whole"), check=True, capture_output=True)
    return folder / "whole"


def command(config: Path, out: Path) -> list[str]:
    return [
        sys.executable,
        "-m",
        "training.pretrain",
        str(config),
        "--data",
        str(TEXT),
        "--threads",
        "1",
        "--out",
        str(out),
    ]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_checkpoint_from_which_the_run_resumes_exactly(
    tmp_path: Path, uninterrupted: Path, number: signal.Signals
) -> None:
    tiny("drbert", tmp_path / "c.toml", SIGNALLED)
    parts = tmp_path / "parts"
    process = subprocess.Popen(
        command(tmp_path / "c.toml", parts),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while not (parts / "progress").exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    process.send_signal(number)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 130, output
    assert "--resume continues from there" in output
    stopped_at = json.loads((parts / "progress/progress.json").read_text())["step"]
    assert 15 <= stopped_at < 150
    assert len(logged(parts)) == stopped_at
    subprocess.run(
        [*command(tmp_path / "c.toml", parts), "--resume"], check=True, capture_output=True
    )
    assert same_weights(uninterrupted, parts)


def test_two_processes_train_the_weights_of_one_that_accumulates(tmp_path: Path) -> None:
    tiny("drbert", tmp_path / "two.toml", "[encoder]\ndropout = 0.0")
    accumulated = tiny(
        "drbert", tmp_path / "one.toml", "[encoder]\ndropout = 0.0\n[optimisation]\naccumulate = 2"
    )
    pretrain(accumulated, TEXT, tmp_path / "one")
    launched = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--main_process_port",
        "0",
        "-m",
        "training.pretrain",
    ]
    done = subprocess.run(
        [
            *launched,
            str(tmp_path / "two.toml"),
            "--data",
            str(TEXT),
            "--out",
            str(tmp_path / "two"),
        ],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "two/checkpoint/training.json").read_text())["processes"] == 2
    weights = [
        load_file(tmp_path / name / "checkpoint/model.safetensors") for name in ("one", "two")
    ]
    # The gradient of a key's bias is zero but for rounding, and Adam makes steps of rounding.
    assert all(
        torch.allclose(weights[0][name], weights[1][name], rtol=0, atol=1e-4)
        for name in weights[0]
        if not name.endswith("key.bias")
    )
    losses = [[float(row["loss"]) for row in logged(tmp_path / name)] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_micro_batches_are_the_batch_in_pieces() -> None:
    whole = [rows for _, rows, _ in MicroBatches(16, 1, 0, 1)]
    pieces = [part for process in range(2) for part in MicroBatches(16, 2, process, 2)]
    assert whole == [slice(0, 16)]
    assert [(number, rows, last) for number, rows, last in pieces] == [
        (0, slice(0, 4), False),
        (1, slice(4, 8), True),
        (2, slice(8, 12), False),
        (3, slice(12, 16), True),
    ]
    with pytest.raises(
        BadInput, match="batch_size 16 is not a multiple of 3 processes × accumulate 2"
    ):
        MicroBatches(16, 3, 0, 2)


def test_twins_begin_with_the_same_encoder_and_see_the_same_text(tmp_path: Path) -> None:
    vanilla, enhanced = (tiny(name, tmp_path / f"{name}.toml") for name in ("none", "drbert"))
    corpus = prepare(vanilla.data, TEXT, tmp_path)
    for step in range(3):
        batch, twin = (masked_batch(corpus, config, step) for config in (vanilla, enhanced))
        assert (batch.inputs == twin.inputs).all()
        assert (batch.positions == twin.positions).all()
    first, second = (
        build_model(config, vocabulary(80)).state_dict() for config in (vanilla, enhanced)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert {name.split(".")[0] for name in second.keys() - first.keys()} == {"pretraining_decoder"}


def test_a_checkpoint_is_a_hugging_face_folder_with_encoder_and_decoder(
    tmp_path: Path,
) -> None:
    from transformers import BertForMaskedLM, PreTrainedTokenizerFast

    pretrain(
        tiny("drbert", tmp_path / "c.toml", "[optimisation]\nsteps = 3"), TEXT, tmp_path / "out"
    )
    folder = tmp_path / "out/checkpoint"
    described = json.loads((folder / "config.json").read_text())
    assert described["pretraining_decoder"]["design"] == "drbert"
    model, report = BertForMaskedLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert all(name.startswith("pretraining_decoder.layer.") for name in report["unexpected_keys"])
    assert PreTrainedTokenizerFast.from_pretrained(folder)("the cat").input_ids[0] == 2
    assert model.config.num_hidden_layers == 2


@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        ("electra", "ElectraForPreTraining"),
        ("electra-mlm", "ElectraForMaskedLM"),
        ("convbert-drbert", "ConvBertForMaskedLM"),
        ("convbert", "ConvBertModel"),
    ],
)
def test_every_familys_checkpoint_loads_whole_into_the_class_it_names(
    tmp_path: Path, name: str, architecture: str
) -> None:
    import transformers

    pretrain(tiny(name, tmp_path / "c.toml", "[optimisation]\nsteps = 3"), TEXT, tmp_path / "out")
    folder = tmp_path / "out/checkpoint"
    assert json.loads((folder / "config.json").read_text())["architectures"] == [architecture]
    _, report = getattr(transformers, architecture).from_pretrained(
        folder, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert all(
        key.startswith(("pretraining_decoder.", "discriminator_predictions."))
        for key in report["unexpected_keys"]
    )


def test_a_folder_with_content_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/log.csv").write_text("precious")
    with pytest.raises(BadInput, match="not empty; give --resume to continue it"):
        pretrain(tiny("none", tmp_path / "c.toml"), TEXT, tmp_path / "out")


def test_resuming_with_another_config_or_other_text_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny("none", tmp_path / "c.toml")
    with monkeypatch.context() as patched:
        patched.setattr(Log, "add", break_off_at(5))
        with pytest.raises(KeyboardInterrupt):
            pretrain(config, TEXT, tmp_path / "out")
    before = (tmp_path / "out/log.csv").read_bytes()
    with pytest.raises(
        BadInput, match="started with another config, optimisation steps 12 and not 20;"
    ):
        pretrain(
            tiny("none", tmp_path / "d.toml", "[optimisation]\nsteps = 20"),
            TEXT,
            tmp_path / "out",
            resume=True,
        )
    with pytest.raises(BadInput, match="started with another corpus"):
        pretrain(config, write_text(tmp_path / "other"), tmp_path / "out", resume=True)
    assert (tmp_path / "out/log.csv").read_bytes() == before


def test_a_run_records_the_fingerprint_that_it_needs_to_resume(tmp_path: Path) -> None:
    config = tiny("none", tmp_path / "c.toml")
    pretrain(config, TEXT, tmp_path / "out")
    progress = json.loads((tmp_path / "out/progress/progress.json").read_text())
    assert progress.pop("seconds") > 0
    # The corpus' digest is of the text, the tokenizer's size and the order of sources.
    assert progress == {
        "step": 12,
        "config": config.as_dict(),
        "corpus": "corpus-0479eca7bcad",
        "precision": "fp32",
        "processes": 1,
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def test_a_loss_that_is_no_number_ends_the_run_and_leaves_what_was_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny("none", tmp_path / "c.toml")
    steps = 0

    def fails(model: torch.nn.Module, *arguments: Any) -> Any:
        nonlocal steps
        steps += model.training
        losses = forward(model, *arguments)
        return (
            losses if steps != 7 or not model.training else {"loss": losses["loss"] * float("nan")}
        )

    monkeypatch.setattr("training.pretrain.forward", fails)
    with pytest.raises(BadInput, match="The loss is nan at step 6; lower peak_learning_rate"):
        pretrain(config, TEXT, tmp_path / "out")
    assert json.loads((tmp_path / "out/progress/progress.json").read_text())["step"] == 4


def test_a_missing_data_folder_is_named_with_its_option(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="does not exist; --data names the folder"):
        pretrain(tiny("none", tmp_path / "c.toml"), tmp_path / "nowhere", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tensorboard_has_what_the_log_has_also_after_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = tiny("none", tmp_path / "c.toml")
    with monkeypatch.context() as patched:
        patched.setattr(Log, "add", break_off_at(7))
        with pytest.raises(KeyboardInterrupt):
            pretrain(config, TEXT, tmp_path / "out", tensorboard=True)
    pretrain(config, TEXT, tmp_path / "out", resume=True, tensorboard=True)
    board = EventAccumulator(str(tmp_path / "out/tensorboard"))
    board.Reload()
    rows = logged(tmp_path / "out")
    assert [event.step for event in board.Scalars("loss")] == [int(row["step"]) for row in rows]
    assert [event.value for event in board.Scalars("loss")] == pytest.approx(
        [float(row["loss"]) for row in rows], abs=1e-5
    )
    assert [event.value for event in board.Scalars("held_out_loss")] == pytest.approx(
        [float(row["held_out_loss"]) for row in rows if row["held_out_loss"]], abs=1e-5
    )
