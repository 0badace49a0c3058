"""A folder with an ONNX graph, as optimum writes it, is exported and compared with itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from command import BadInput, BadUsage, Unavailable
from export.pipeline import export
from service.artifact import read_artifact
from service.classifier import Classifier
from service.runtimes.auto import Choice, load
from tests.export.corpus import FAMILIES
from tests.export.test_families import write_checkpoint

pytestmark = pytest.mark.filterwarnings(
    "ignore"
)  # torch's tracer warns of what verification checks


def write_folder(folder: Path, family: str = "BERT", attention: str = "sdpa") -> Path:
    """Write what `optimum-cli export onnx` writes: graph, configuration and tokenizer.

    The checkpoint that it was made from is in the folder next to it.
    """
    row = next(each for each in FAMILIES if each.name == family)
    checkpoint = write_checkpoint(row, folder.with_name("checkpoint"))
    model = AutoModelForSequenceClassification.from_pretrained(
        checkpoint, attn_implementation=attention, dtype=torch.float32
    ).eval()
    folder.mkdir()
    for path in checkpoint.glob("*.json"):
        shutil.copy(path, folder)
    names = ["input_ids", "attention_mask"]
    if family == "BERT":
        names.append("token_type_ids")
    ids = torch.arange(32).reshape(2, 16)
    torch.onnx.export(
        model,
        tuple([ids, torch.ones_like(ids), torch.zeros_like(ids)][: len(names)]),
        str(folder / "model.onnx"),
        input_names=names,
        output_names=["logits"],
        dynamic_axes={name: {0: "batch", 1: "length"} for name in names} | {"logits": {0: "batch"}},
        opset_version=17,
        dynamo=False,
    )
    return folder


@pytest.mark.parametrize("family", ["BERT", "RoBERTa", "DistilBERT"])
def test_its_answers_are_those_of_the_torch_model(family: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "graph", family)
    manifest = export(str(folder), tmp_path / "artifact", variants=["cpu-fp32"])
    artifact = read_artifact(tmp_path / "artifact")
    assert artifact.path("model.onnx").read_bytes() == (folder / "model.onnx").read_bytes()
    assert "not compared with torch" in manifest.provenance["reference"]
    assert manifest.variants["cpu-fp32"].gate.status == "passed"
    export(str(tmp_path / "checkpoint"), tmp_path / "other", variants=["cpu-fp32"])
    other = read_artifact(tmp_path / "other")
    assert manifest.labels == other.manifest.labels
    assert manifest.max_tokens == other.manifest.max_tokens
    classifiers = [
        Classifier(each, load(each, Choice("cpu-fp32", "openvino", "test"), 1))
        for each in (artifact, other)
    ]
    for text in ("a charming and often affecting journey", "x"):
        ours, theirs = (each.predict([each.encode(text)]) for each in classifiers)
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_its_parameters_are_counted(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "graph")
    manifest = export(str(folder), tmp_path / "artifact", variants=["cpu-fp32"])
    stored = load_file(tmp_path / "checkpoint" / "model.safetensors")
    # The exporter folds some tables into smaller ones.
    assert manifest.parameters == pytest.approx(sum(t.numel() for t in stored.values()), rel=0.05)


def rename_output(model: onnx.ModelProto) -> None:
    model.graph.output[0].name = model.graph.node[-1].output[0] = "last_hidden_state"


def add_foreign(model: onnx.ModelProto) -> None:
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    model.graph.node[-1].domain = "com.microsoft"


def rename_input(model: onnx.ModelProto) -> None:
    model.graph.input[0].name = "pixel_values"


def widen(model: onnx.ModelProto) -> None:
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 7


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (rename_output, "returns last_hidden_state; a classifier returns logits"),
        (add_foreign, "has operators of com.microsoft: it was optimised or quantised"),
        (rename_input, "reads pixel_values, attention_mask, token_type_ids; a classifier reads"),
        (widen, "returns 7 labels, and its config.json names"),
    ],
)
def test_a_graph_that_is_no_classifier_is_refused(
    change: Callable[[onnx.ModelProto], None], words: str, tmp_path: Path
) -> None:
    folder = write_folder(tmp_path / "graph")
    model = onnx.load(folder / "model.onnx")
    change(model)
    onnx.save(model, folder / "model.onnx")
    with pytest.raises(BadInput, match=words):
        export(str(folder), tmp_path / "artifact", variants=["cpu-fp32"])
    assert not (tmp_path / "artifact").exists()


def test_a_graph_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "graph")
    (folder / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(BadInput, match=r"model\.onnx cannot be read"):
        export(str(folder), tmp_path / "artifact", variants=["cpu-fp32"])


def test_what_needs_a_torch_model_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "graph")
    with pytest.raises(BadUsage, match="--keep-decoder needs a torch model"):
        export(str(folder), tmp_path / "artifact", keep_decoder=True)


def test_a_quantised_graph_alone_is_no_checkpoint(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "graph")
    (folder / "model.onnx").rename(folder / "model_quantized.onnx")
    with pytest.raises(Unavailable, match=r"model_quantized\.onnx would be taken as it is if"):
        export(str(folder), tmp_path / "artifact", variants=["cpu-fp32"])


def test_weights_for_torch_come_first(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "graph")
    shutil.copy(tmp_path / "checkpoint" / "model.safetensors", folder)
    manifest = export(str(folder), tmp_path / "artifact", variants=["cpu-fp32"])
    assert "reference" not in manifest.provenance
    fields = json.loads((folder / "config.json").read_text())
    assert manifest.family == fields["model_type"]
