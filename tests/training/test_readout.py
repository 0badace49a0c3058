"""A frozen encoder is measured alike, whatever decoder it was pretrained with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from command import BadInput
from tests.training.factories import TEXT, tiny, write_task
from training import probes
from training.corpus import Corpus, prepare
from training.frozen import load_frozen
from training.pretrain import pretrain
from training.probes import mean_accuracy, names, pooled_states, probe
from training.readout import ReadOut, read_out_loss

QUICK = ReadOut(steps=6, batch_size=8, warmup_steps=2)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint of several tiny designs."""
    folder = tmp_path_factory.mktemp("runs")
    for name in ("none", "drbert", "retro", "convbert-drbert"):
        pretrain(tiny(name, folder / f"{name}.toml"), TEXT, folder / name)
    return folder


@pytest.fixture(scope="module")
def corpus(runs: Path) -> Corpus:
    return prepare(tiny("none", runs / "none.toml").data, TEXT, runs)


def with_encoder_of(source: Path, target: Path, out: Path) -> Path:
    """Copy checkpoint `target`, and give it the encoder of `source`."""
    shutil.copytree(target, out)
    mixed = load_file(target / "model.safetensors")
    encoder = load_file(source / "model.safetensors")
    mixed |= {name: weight for name, weight in encoder.items() if name.startswith("bert.")}
    save_file(mixed, out / "model.safetensors")
    return out


@pytest.mark.parametrize("design", ["drbert", "retro"])
def test_the_read_out_loss_is_the_same_for_the_same_encoder_whatever_decoder_it_had(
    runs: Path, corpus: Corpus, tmp_path: Path, design: str
) -> None:
    plain, enhanced = (runs / name / "checkpoint" for name in ("none", design))
    same = with_encoder_of(plain, enhanced, tmp_path / "same")
    losses: list[float] = []
    for checkpoint in (plain, same, enhanced):
        torch.manual_seed(len(losses))
        losses.append(read_out_loss(load_frozen(checkpoint), corpus, QUICK))
    assert losses[0] == losses[1] != losses[2]


def test_only_the_output_layer_is_trained_and_it_learns(runs: Path, corpus: Corpus) -> None:
    encoder = load_frozen(runs / "none/checkpoint")
    before = {name: weight.clone() for name, weight in encoder.model.state_dict().items()}
    first = read_out_loss(encoder, corpus, ReadOut(steps=1, batch_size=8, peak_learning_rate=1e-9))
    assert read_out_loss(encoder, corpus, ReadOut(steps=60, batch_size=8)) < first - 0.1
    for name, weight in encoder.model.state_dict().items():
        assert torch.equal(weight, before[name])


def test_a_convbert_is_read_out_and_probed_too(runs: Path, corpus: Corpus, tmp_path: Path) -> None:
    encoder = load_frozen(runs / "convbert-drbert/checkpoint")
    assert 0 < read_out_loss(encoder, corpus, QUICK) < 20
    assert set(probe(encoder, write_task(tmp_path), "sst2")) == set(names("sst2"))


def test_the_states_of_a_text_do_not_depend_on_the_texts_next_to_it(runs: Path) -> None:
    encoder = load_frozen(runs / "none/checkpoint")
    texts = ["the cat sat", "the dog ran under the tree and then slept all day in the sun", "a"]
    together = pooled_states(encoder, texts, 32)
    for number, text in enumerate(texts):
        alone = pooled_states(encoder, [text], 32)
        for pooling in ("mean", "cls"):
            assert np.allclose(together[pooling][number], alone[pooling][0], atol=1e-5)
    ids = encoder.tokenizer(texts[:1], return_tensors="pt")["input_ids"]
    states = encoder.states(ids)
    assert np.allclose(together["mean"][0], states[0].mean(0).numpy(), atol=1e-5)
    assert np.allclose(together["cls"][0], states[0, 0].numpy(), atol=1e-5)


def test_probes_tell_texts_apart_and_answer_the_same_each_time(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_task(tmp_path)
    encoder = load_frozen(runs / "none/checkpoint")
    measured = probe(encoder, data, "sst2") | probe(encoder, data, "stsb")
    assert measured["sst2 logistic mean"] == measured["sst2 neighbours mean"] == 1.0
    assert measured["stsb cosine mean"] == pytest.approx(1.0)
    assert mean_accuracy({"a logistic mean": 0.5, "a logistic cls": 1.0, "a cosine": 9}) == 0.75
    monkeypatch.setattr(probes, "MOST_EXAMPLES", 20)
    assert probe(encoder, data, "sst2") == probe(encoder, data, "sst2")


def test_a_checkpoint_whose_tensors_do_not_fit_is_refused(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "none/checkpoint", tmp_path / "broken")
    path = tmp_path / "broken/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 5}))
    with pytest.raises(BadInput, match=r"do not fit its config.json: encoder.layer.2.* is None"):
        load_frozen(tmp_path / "broken")
    described = json.loads(path.read_text()) | {"num_hidden_layers": 2, "intermediate_size": 8}
    path.write_text(json.dumps(described))
    with pytest.raises(BadInput, match=r"is \(64,\), and the config describes \(8,\)"):
        load_frozen(tmp_path / "broken")
