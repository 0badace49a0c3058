from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from command import BadInput, Unavailable
from tests.needs import SHARED, shared_data
from tests.training.worlds import write_config, write_task, write_text
from training.finetune import finetune
from training.pretrain import pretrain
from training.tasks import read_examples, task_named


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    pretrain(write_config(tmp_path / "c.toml", steps=4), write_text(tmp_path / "text"), tmp_path / "drbert-mini")
    return tmp_path / "drbert-mini/checkpoint"


def test_fine_tuning_learns_and_carries_the_decoder_along_untouched(tmp_path: Path, encoder: Path) -> None:
    out = tmp_path / "drbert-mini-sst2"
    finetune(encoder, task_named("sst2"), write_task(tmp_path / "data"), out, epochs=8, batch_size=8, learning_rate=3e-3)
    before, after = load_file(encoder / "model.safetensors"), load_file(out / "model.safetensors")
    decoder = [name for name in before if name.startswith("pretraining_decoder.")]
    assert decoder
    assert all(torch.equal(before[name].half(), after[name]) for name in decoder)
    assert not any(name.startswith("cls.") for name in after)
    assert {tensor.dtype for tensor in after.values()} == {torch.float16}
    trained = json.loads((out / "training.json").read_text())
    assert trained["finetuning"]["dev_accuracy_in_torch"] == 1.0
    card = (out / "README.md").read_text()
    assert "100.00% in torch" in card
    assert "reconstruction of DrBERT" in card


def test_an_encoder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match=r"is no checkpoint: it has no config\.json"):
        finetune(tmp_path, task_named("sst2"), tmp_path, tmp_path / "out")


def test_missing_labels_are_named(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match=r"sst2/train\.tsv does not exist"):
        read_examples(task_named("sst2"), tmp_path, "train")


def test_a_label_outside_the_task_is_named_by_its_line(tmp_path: Path) -> None:
    (tmp_path / "sst2").mkdir()
    (tmp_path / "sst2/dev.tsv").write_text("sentence\tlabel\nfine\t1\nodd\t7\n")
    with pytest.raises(BadInput, match="line 3: label '7'"):
        read_examples(task_named("sst2"), tmp_path, "dev")


def test_an_unknown_task_lists_the_known_ones() -> None:
    with pytest.raises(BadInput, match="known are sst2"):
        task_named("sst3")


@shared_data
def test_the_real_sst2_is_read_whole() -> None:
    assert [len(read_examples(task_named("sst2"), SHARED, split)) for split in ("train", "dev")] == [67349, 872]
