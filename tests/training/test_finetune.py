"""Fine-tuning learns, is reproducible, and keeps the pretraining decoder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from command import BadInput, Unavailable
from tests.training.factories import TEXT, tiny, write_task
from training.checkpoint import read_checkpoint
from training.finetune import Recipe, build_classifier, finetune
from training.pretrain import pretrain
from training.tasks import find_task

QUICK = Recipe(epochs=20, batch_size=8, learning_rate=3e-3)


def encoder(folder: Path, name: str) -> Path:
    pretrain(
        tiny(name, folder / f"{name}.toml", "[optimisation]\nsteps = 4"),
        TEXT,
        folder / f"{name}-mini",
    )
    return folder / f"{name}-mini/checkpoint"


def test_fine_tuning_learns_and_keeps_the_decoder_as_it_was(tmp_path: Path) -> None:
    pretrained, out = encoder(tmp_path, "drbert"), tmp_path / "drbert-mini-sst2"
    assert finetune(pretrained, find_task("sst2"), write_task(tmp_path / "data"), out, QUICK) == {
        "accuracy": 1.0
    }
    before, after = (
        load_file(pretrained / "model.safetensors"),
        load_file(out / "model.safetensors"),
    )
    decoder = [name for name in before if name.startswith("pretraining_decoder.")]
    assert decoder
    assert all(torch.equal(before[name].half(), after[name]) for name in decoder)
    assert not any(name.startswith("cls.") for name in after)
    assert {tensor.dtype for tensor in after.values()} == {torch.float16}
    assert json.loads((out / "predictions.json").read_text())["answers"] == [1.0, 0.0] * 32
    card = (out / "README.md").read_text()
    assert "1.0000 in torch" in card
    assert "reconstruction of DrBERT" in card


def test_classifiers_on_a_frozen_encoder_share_it_and_each_has_a_pooler(tmp_path: Path) -> None:
    pretrained, data = encoder(tmp_path, "none"), write_task(tmp_path / "data")
    for seed in (0, 1):
        recipe = replace(QUICK, epochs=2, seed=seed, freeze_encoder=True)
        finetune(pretrained, find_task("sst2"), data, tmp_path / str(seed), recipe)
    first, second = (load_file(tmp_path / str(seed) / "model.safetensors") for seed in (0, 1))
    differing = {name for name in first if not torch.equal(first[name], second[name])}
    assert {name.removeprefix("bert.").partition(".")[0] for name in differing} == {
        "pooler",
        "classifier",
    }


@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        ("none", "BertForSequenceClassification"),
        ("electra", "ElectraForSequenceClassification"),
        ("convbert", "ConvBertForSequenceClassification"),
    ],
)
def test_every_family_learns_pairs_and_scores(tmp_path: Path, name: str, architecture: str) -> None:
    out = tmp_path / "out"
    metrics = finetune(
        encoder(tmp_path, name), find_task("stsb"), write_task(tmp_path / "data"), out, QUICK
    )
    assert metrics["pearson"] > 0.9, metrics
    described = json.loads((out / "config.json").read_text())
    assert described["architectures"] == [architecture]
    assert described["problem_type"] == "regression"


def test_whatever_it_was_trained_in_a_classifier_is_measured_in_fp32(tmp_path: Path) -> None:
    data, out = write_task(tmp_path / "data"), tmp_path / "out"
    finetune(
        encoder(tmp_path, "none"),
        find_task("stsb"),
        data,
        out,
        Recipe(epochs=1, batch_size=8),
        precision="bf16",
    )
    assert json.loads((out / "training.json").read_text())["finetuning"]["precision"] == "bf16"
    model, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(out, dtype=torch.float32),
        AutoTokenizer.from_pretrained(out),
    )
    with torch.no_grad():
        score = model(**tokenizer("the cat slept", "a dog ran", return_tensors="pt")).logits.item()
    # bf16 has eight bits: it would be off by a thousandth.
    assert json.loads((out / "predictions.json").read_text())["answers"][1] == pytest.approx(
        score, rel=1e-5
    )


def test_the_same_seed_gives_the_same_classifier(tmp_path: Path) -> None:
    pretrained, data = encoder(tmp_path, "none"), write_task(tmp_path / "data")
    for name, seed in (("first", 1), ("second", 1), ("other", 2)):
        finetune(
            pretrained,
            find_task("sst2"),
            data,
            tmp_path / name,
            Recipe(epochs=1, batch_size=8, seed=seed),
        )
    first, second, other = (
        load_file(tmp_path / name / "model.safetensors") for name in ("first", "second", "other")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_a_missing_encoder_and_a_folder_with_content_are_named(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match=r"is not a checkpoint: it has no config\.json"):
        finetune(tmp_path, find_task("sst2"), tmp_path, tmp_path / "out", QUICK)
    pretrained = encoder(tmp_path, "none")
    with pytest.raises(BadInput, match="is not empty; remove it"):
        finetune(pretrained, find_task("sst2"), tmp_path, pretrained, QUICK)


@pytest.mark.parametrize("name", ["none", "electra", "convbert"])
def test_every_family_can_be_built_where_there_is_a_gpu(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretrain(
        tiny(name, tmp_path / "c.toml", "[optimisation]\nsteps = 3"), TEXT, tmp_path / "encoder"
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    model = build_classifier(
        *read_checkpoint(tmp_path / "encoder/checkpoint"),
        find_task("sst2"),
        ("NEGATIVE", "POSITIVE"),
        dropout=0.1,
    )
    assert model.config._attn_implementation == ("sdpa" if name == "none" else "eager")
