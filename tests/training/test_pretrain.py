from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from command import BadInput, Unavailable
from tests.training.worlds import write_config, write_text
from training.config import read_config
from training.corpus import prepare
from training.masking import mask_tokens
from training.model import PretrainingModel
from training.pretrain import Log, build_optimiser, generator_of, masked_loss, pretrain


@pytest.mark.parametrize("design", ["none", "drbert"])
def test_the_loss_falls_on_repeated_steps(tmp_path: Path, design: str) -> None:
    config = write_config(tmp_path / "c.toml", design, dropout=0.0)
    corpus = prepare(config.data, write_text(tmp_path / "text"), tmp_path)
    model = PretrainingModel(config, corpus.vocabulary_size)
    optimiser = build_optimiser(model, config.optimisation)
    masked = mask_tokens(corpus.batch(0, 8, 0), 0.15, corpus.vocabulary_size, np.random.default_rng(0))
    losses = []
    for _ in range(60):
        loss = masked_loss(model, masked, generator_of(0, 0), torch.device("cpu"))
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def break_off_at(last: int) -> Callable[..., None]:
    real = Log.add

    def add(self: Log, step: int, *rest: Any) -> None:
        real(self, step, *rest)
        if step == last:
            raise KeyboardInterrupt

    return add


@pytest.mark.parametrize("design", ["none", "drbert"])
def test_a_run_that_was_stopped_and_resumed_ends_as_if_it_had_not_been(
    tmp_path: Path, design: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(tmp_path / "c.toml", design)
    text = write_text(tmp_path / "text")
    pretrain(config, text, tmp_path / "whole")
    # Broken off at step 7, three steps after the last save, with dropout and the decoder's dice in play.
    with monkeypatch.context() as patched:
        patched.setattr(Log, "add", break_off_at(7))
        with pytest.raises(KeyboardInterrupt):
            pretrain(config, text, tmp_path / "parts")
    assert not (tmp_path / "parts/checkpoint").exists()
    pretrain(config, text, tmp_path / "parts", resume=True)
    whole, parts = (load_file(tmp_path / name / "checkpoint/model.safetensors") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    losses = [[row["loss"] for row in csv.DictReader((tmp_path / name / "log.csv").read_text().splitlines())] for name in ("whole", "parts")]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 12


def test_twins_begin_with_the_same_encoder_and_see_the_same_text(tmp_path: Path) -> None:
    vanilla, enhanced = (write_config(tmp_path / f"{d}.toml", d) for d in ("none", "drbert"))
    first, second = PretrainingModel(vanilla, 80).state_dict(), PretrainingModel(enhanced, 80).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert {name.split(".")[0] for name in second.keys() - first.keys()} == {"pretraining_decoder"}


def test_a_checkpoint_is_a_hugging_face_folder_with_the_decoder_beside_the_encoder(tmp_path: Path) -> None:
    from transformers import BertForMaskedLM, PreTrainedTokenizerFast

    config = write_config(tmp_path / "c.toml", steps=2)
    pretrain(config, write_text(tmp_path / "text"), tmp_path / "out")
    folder = tmp_path / "out/checkpoint"
    described = json.loads((folder / "config.json").read_text())
    assert described["pretraining_decoder"]["design"] == "drbert"
    model, report = BertForMaskedLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert all(name.startswith("pretraining_decoder.layer.") for name in report["unexpected_keys"])
    assert PreTrainedTokenizerFast.from_pretrained(folder)("the cat").input_ids[0] == 2
    assert model.config.num_hidden_layers == 2


def test_a_full_folder_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/log.csv").write_text("precious")
    with pytest.raises(BadInput, match="not empty; give --resume"):
        pretrain(write_config(tmp_path / "c.toml"), write_text(tmp_path / "text"), tmp_path / "out")


def test_resuming_with_another_config_or_other_text_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, config = write_text(tmp_path / "text"), write_config(tmp_path / "c.toml")
    with monkeypatch.context() as patched:
        patched.setattr(Log, "add", break_off_at(5))
        with pytest.raises(KeyboardInterrupt):
            pretrain(config, text, tmp_path / "out")
    with pytest.raises(BadInput, match="begun with another config"):
        pretrain(write_config(tmp_path / "d.toml", steps=20), text, tmp_path / "out", resume=True)
    with pytest.raises(BadInput, match="begun with another corpus"):
        pretrain(config, write_text(tmp_path / "other", documents=50), tmp_path / "out", resume=True)


def test_text_that_is_trained_on_cannot_be_held_out(tmp_path: Path) -> None:
    config = write_config(tmp_path / "c.toml")
    text = write_text(tmp_path / "text")
    swapped = dataclasses.replace(config.data, text=["held.txt.gz"], held_out=["shard.txt.gz"])
    first, second = prepare(config.data, text, tmp_path), prepare(swapped, text, tmp_path)
    assert first.directory != second.directory
    with pytest.raises(BadInput, match="is among the text and the held-out text"):
        prepare(dataclasses.replace(config.data, text=["*.txt.gz"]), text, tmp_path)


def test_a_missing_data_folder_says_what_and_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="does not exist; --data names the folder"):
        pretrain(write_config(tmp_path / "c.toml"), tmp_path / "nowhere", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ('[decoder]\ndesign = "emd"', "design 'emd' is unknown"),
        ("[decoder]\nlayers = 3", "does not go with layers = 3"),
        ("[encoder]\nheads = 3", "no multiple of heads 3"),
        ("[data]\ncolour = 1", "no key 'colour'"),
        ("[colour]\nx = 1", r"unknown section \[colour\]"),
        ('[encoder]\nlayers = "two"', "is not of type int"),
        ("[", "is not TOML"),
    ],
)
def test_a_config_that_cannot_work_is_refused_by_name(tmp_path: Path, change: str, words: str) -> None:
    base = Path("training/configs/bert-mini.toml").resolve()
    (tmp_path / "c.toml").write_text(f'extends = "{base}"\n{change}\n')
    with pytest.raises(BadInput, match=words):
        read_config(tmp_path / "c.toml")


def test_the_twins_configs_differ_in_the_decoder_alone() -> None:
    vanilla, enhanced = (read_config(Path(f"training/configs/{name}-mini.toml")).as_dict() for name in ("bert", "drbert"))
    assert vanilla.pop("decoder") != enhanced.pop("decoder")
    assert vanilla == enhanced
