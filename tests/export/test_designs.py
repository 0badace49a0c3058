"""Every pretraining design, from the text to the running service."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from command import BadUsage
from export.pipeline import export
from proof.verdict.identity import compare
from service.artifact import read_artifact
from service.classifier import Classifier
from service.runtimes.auto import Choice, load
from tests.service.test_server import serving
from tests.training.factories import TEXT, TINY, tiny, write_task
from training.checkpoint import read_checkpoint
from training.config import read_config
from training.corpus import prepare
from training.finetune import Recipe, build_classifier, finetune
from training.model import build_model
from training.pretrain import pretrain
from training.tasks import find_task

pytestmark = pytest.mark.filterwarnings(
    "ignore"
)  # torch's tracer warns of what verification checks

TEXTS = ("the cat", "the dog ran under the tree and then slept all day in the sun", "a")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Return the folders of the classifier and the artifact of every tiny config."""
    folder = tmp_path_factory.mktemp("designs")
    data = write_task(folder / "data")
    folders = {}
    for name in TINY:
        pretrain(
            tiny(name.removeprefix("tiny-"), folder / f"{name}.toml", "[optimisation]\nsteps = 3"),
            TEXT,
            folder / name,
        )
        finetune(
            folder / name / "checkpoint",
            find_task("sst2"),
            data,
            folder / f"{name}-sst2",
            Recipe(epochs=1, batch_size=8),
        )
        export(str(folder / f"{name}-sst2"), folder / f"{name}-artifact", variants=["cpu-fp32"])
        folders[name] = folder / f"{name}-sst2", folder / f"{name}-artifact"
    return folders


@torch.no_grad()
@pytest.mark.parametrize("name", TINY)
def test_the_artifact_answers_as_the_trained_model(
    built: dict[str, tuple[Path, Path]], name: str
) -> None:
    trained, exported = built[name]
    config = json.loads((trained / "config.json").read_text())
    tensors = {
        key: tensor.float() for key, tensor in load_file(trained / "model.safetensors").items()
    }
    model = build_classifier(
        config, tensors, find_task("sst2"), ("NEGATIVE", "POSITIVE"), dropout=0.0
    ).eval()
    head = {key: tensor for key, tensor in tensors.items() if key in model.state_dict()}
    model.load_state_dict(head, strict=True)
    artifact = read_artifact(exported)
    classifier = Classifier(
        artifact, load(artifact, Choice("cpu-fp32", "openvino", "test"), threads=1)
    )
    for text in TEXTS:
        encoded = classifier.encode(text)
        expected = model(torch.tensor([encoded.ids])).logits.numpy()
        assert np.allclose(classifier.predict([encoded]), expected, atol=1e-4), text


@torch.no_grad()
@pytest.mark.parametrize("name", TINY)
def test_fine_tuning_starts_from_the_pretrained_encoder(
    built: dict[str, tuple[Path, Path]], name: str
) -> None:
    folder = built[name][0].parent / name
    config = read_config(folder.with_suffix(".toml"))
    pretrained = build_model(config, prepare(config.data, TEXT, folder.parent).vocabulary).eval()
    pretrained.load_state_dict(load_file(folder / "progress/model.safetensors"))
    classifier = build_classifier(
        *read_checkpoint(folder / "checkpoint"),
        find_task("sst2"),
        ("NEGATIVE", "POSITIVE"),
        dropout=0.0,
    ).eval()
    ids = torch.randint(5, 100, (3, 17), generator=torch.Generator().manual_seed(0))
    expected = pretrained.encoder(input_ids=ids).last_hidden_state
    assert torch.allclose(
        classifier.base_model(input_ids=ids).last_hidden_state, expected, atol=1e-6
    )


@pytest.mark.parametrize(
    "name", [name for name in TINY if "convbert" not in name and "electra" not in name]
)
def test_a_bert_has_the_same_graph_whatever_decoder_it_was_pretrained_with(
    built: dict[str, tuple[Path, Path]], name: str
) -> None:
    assert compare(built["tiny-none"][1], built[name][1])["same"]


@pytest.mark.parametrize("name", ["tiny-convbert", "tiny-convbert-drbert"])
def test_a_convbert_has_another_graph_than_a_bert(
    built: dict[str, tuple[Path, Path]], name: str
) -> None:
    assert not compare(built["tiny-none"][1], built[name][1])["same"]


@pytest.mark.parametrize(
    "name", ["tiny-plain", "tiny-gua", "tiny-mix", "tiny-drbert", "tiny-mae", "tiny-retro"]
)
def test_a_kept_decoder_is_detected(
    built: dict[str, tuple[Path, Path]], name: str, tmp_path: Path
) -> None:
    export(str(built[name][0]), tmp_path / "kept", variants=["cpu-fp32"], keep_decoder=True)
    comparison = compare(built["tiny-none"][1], tmp_path / "kept")
    assert not comparison["same"]
    assert read_artifact(tmp_path / "kept").manifest.kept_decoder_layers == (
        1 if name == "tiny-retro" else 2
    )


@pytest.mark.parametrize(
    "name", ["tiny-none", "tiny-emd", "tiny-electra", "tiny-convbert", "tiny-convbert-drbert"]
)
def test_keeping_a_decoder_without_layers_is_refused(
    built: dict[str, tuple[Path, Path]], name: str, tmp_path: Path
) -> None:
    with pytest.raises(BadUsage, match="has no decoder layers that could be kept"):
        export(str(built[name][0]), tmp_path / "kept", variants=["cpu-fp32"], keep_decoder=True)


@pytest.mark.parametrize("name", ["tiny-none", "tiny-electra", "tiny-convbert"])
def test_every_family_answers_through_the_running_service(
    built: dict[str, tuple[Path, Path]], name: str
) -> None:
    with serving(read_artifact(built[name][1])) as (url, _):
        request = urllib.request.Request(
            f"{url}/classify", json.dumps({"input": list(TEXTS)}).encode()
        )
        with urllib.request.urlopen(request, timeout=30) as response:
            together = json.load(response)["data"]
        alone = []
        for text in TEXTS:
            request = urllib.request.Request(
                f"{url}/classify", json.dumps({"input": text}).encode()
            )
            with urllib.request.urlopen(request, timeout=30) as response:
                alone += json.load(response)["data"]
    assert [item["probs"] for item in together] == [
        pytest.approx(item["probs"], abs=1e-4) for item in alone
    ]


def test_the_configs_families_are_transformers_own(built: dict[str, tuple[Path, Path]]) -> None:
    assert {AutoConfig.from_pretrained(built[name][0]).model_type for name in TINY} == {
        "bert",
        "electra",
        "convbert",
    }
