"""
The graphs for GPUs have every layer fused, are in 16 bits, and give the checkpoint's answers.

ONNX Runtime runs them on the CPU here.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto
from transformers import DistilBertConfig, DistilBertForSequenceClassification

from command import Unavailable
from export.graph.attention import with_export_attention
from export.graph.gpu import FUSED
from export.pipeline import export
from service.artifact import Artifact, read_artifact
from tests.export.corpus import FAMILIES
from tests.export.factories import write_checkpoint
from tests.export.test_families import write_checkpoint as write_family

pytestmark = pytest.mark.filterwarnings(
    "ignore"
)  # torch's tracer warns of what verification checks

GPU_VARIANTS = ("cpu-fp32", "cuda-fp16", "tensorrt-fp16")
NAMES = {
    "bert": "BERT",
    "electra": "ELECTRA",
    "roberta": "RoBERTa",
    "xlm-roberta": "XLM-RoBERTa",
    "camembert": "CamemBERT",
    "distilbert": "DistilBERT",
}
# Three texts, the second and third padded on the right.
LENGTHS = (20, 12, 3)


def exported(checkpoint: Path, folder: Path, keep_decoder: bool = False) -> Artifact:
    export(str(checkpoint), folder, variants=GPU_VARIANTS, keep_decoder=keep_decoder)
    return read_artifact(folder)


def operators(artifact: Artifact, file: str) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(artifact.path(file)).graph.node)


def answers(model: Path) -> np.ndarray:
    """Return the logits of three padded texts."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(model, options)
    ids = np.random.default_rng(0).integers(5, 12, (len(LENGTHS), max(LENGTHS)))
    mask = (np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None]).astype(np.int64)
    inputs = {
        "input_ids": np.where(mask, ids, 0),
        "attention_mask": mask,
        "token_type_ids": np.zeros_like(ids),
    }
    types = {"tensor(int32)": np.int32, "tensor(int64)": np.int64}
    feed = {
        value.name: inputs[value.name].astype(types[value.type]) for value in session.get_inputs()
    }
    return np.asarray(session.run(None, feed)[0])


@pytest.mark.parametrize("family", FUSED)
def test_every_layer_of_a_common_family_is_fused(family: str, tmp_path: Path) -> None:
    checkpoint = write_family(
        next(row for row in FAMILIES if row.name == NAMES[family]), tmp_path / "checkpoint"
    )
    artifact = exported(checkpoint, tmp_path / "artifact")
    counts = operators(artifact, "model-cuda-fp16.onnx")
    assert counts["Attention"] == 2
    assert counts["SkipLayerNormalization"] == 4
    assert counts["BiasGelu"] == 2
    assert counts["EmbedLayerNormalization"] == (
        1 if family in ("bert", "electra", "distilbert") else 0
    )
    assert not counts["Softmax"]
    graph = onnx.load(artifact.path("model-cuda-fp16.onnx")).graph
    assert {value.type.tensor_type.elem_type for value in graph.input} == {TensorProto.INT32}
    exact = answers(artifact.path("model.onnx"))
    for name in ("cuda-fp16", "tensorrt-fp16"):
        variant = artifact.manifest.variants[name]
        assert (variant.precision, variant.gate.status) == ("f16", "passed")
        assert "not yet on a GPU" in variant.gate.reason
        logits = answers(artifact.path(variant.files[0]))
        assert logits.dtype == np.float32
        assert logits == pytest.approx(exact, abs=5e-3)


def test_weights_are_in_16_bits_and_the_graph_for_tensorrt_has_no_operator_of_onnx_runtime(
    tmp_path: Path,
) -> None:
    artifact = exported(write_checkpoint(tmp_path / "checkpoint"), tmp_path / "artifact")
    graph = onnx.load(artifact.path("model-tensorrt-fp16.onnx"))
    assert {opset.domain for opset in graph.opset_import} <= {"", "ai.onnx"}
    assert {node.domain for node in graph.graph.node} <= {"", "ai.onnx"}
    # A weight, not a constant of the mask or of a shape.
    assert {tensor.data_type for tensor in graph.graph.initializer if len(tensor.dims) == 2} == {
        TensorProto.FLOAT16
    }
    assert (
        artifact.manifest.variants["tensorrt-fp16"].weight_bytes
        < 0.6 * artifact.manifest.variants["cpu-fp32"].weight_bytes
    )
    assert "onnxruntime" in artifact.manifest.provenance


def test_twins_have_one_fused_graph_and_a_kept_decoder_another(tmp_path: Path) -> None:
    bert = exported(write_checkpoint(tmp_path / "bert", decoder=False, seed=1), tmp_path / "a")
    drbert = exported(write_checkpoint(tmp_path / "drbert", seed=2), tmp_path / "b")
    control = exported(tmp_path / "drbert", tmp_path / "c", keep_decoder=True)
    for name in ("cuda-fp16", "tensorrt-fp16"):
        digests = [
            artifact.manifest.variants[name].encoder_digest for artifact in (bert, drbert, control)
        ]
        assert digests[0] == digests[1] != digests[2]
    assert operators(control, "model-cuda-fp16.onnx")["Attention"] == 4


@pytest.mark.parametrize("seed", [0, 1])
def test_weights_of_zero_fuse_to_the_graph_of_any_other(seed: int, tmp_path: Path) -> None:
    zeros = exported(write_checkpoint(tmp_path / "zeros", fill=0.0), tmp_path / "a")
    random = exported(write_checkpoint(tmp_path / "random", seed=seed), tmp_path / "b")
    assert (
        zeros.manifest.variants["cuda-fp16"].encoder_digest
        == random.manifest.variants["cuda-fp16"].encoder_digest
    )


def test_a_family_that_matches_no_fused_operator_runs_unfused_and_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = write_family(
        next(row for row in FAMILIES if row.name == "ConvBERT"), tmp_path / "checkpoint"
    )
    artifact = exported(checkpoint, tmp_path / "artifact")
    assert (
        "cuda-fp16: not fused (convbert has layers that match no fused operator)"
        in capsys.readouterr().out
    )
    assert artifact.manifest.variants["cuda-fp16"].gate.status == "passed"
    assert not operators(artifact, "model-cuda-fp16.onnx")["Attention"]


def test_a_layer_that_is_not_recognised_is_detected_by_counting(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = write_checkpoint(
        tmp_path / "checkpoint", decoder=False, position_embedding_type="relative_key"
    )
    artifact = exported(checkpoint, tmp_path / "artifact")
    assert (
        "cuda-fp16: not fused (0 Attention operators instead of 2 in a graph of 2 layers)"
        in capsys.readouterr().out
    )
    assert answers(artifact.path("model-cuda-fp16.onnx")) == pytest.approx(
        answers(artifact.path("model.onnx")), abs=5e-3
    )


@torch.no_grad()
def test_distilberts_attention_in_berts_form_gives_the_same_answers() -> None:
    torch.manual_seed(0)
    original = DistilBertForSequenceClassification(
        DistilBertConfig(
            vocab_size=12, dim=32, n_layers=2, n_heads=4, hidden_dim=64, attn_implementation="eager"
        )
    ).eval()
    exported = with_export_attention(original)
    assert exported is not original
    ids = torch.randint(1, 12, (3, 9))
    mask = torch.tensor([[1] * 9, [1] * 5 + [0] * 4, [1] + [0] * 8])
    assert torch.allclose(exported(ids, mask).logits, original(ids, mask).logits, atol=1e-6)


def test_without_onnxruntime_the_message_names_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime.transformers", None)
    with pytest.raises(Unavailable, match=r"`pip install '\.\[portable\]'` .*, or with \[gpu\]"):
        export(
            str(write_checkpoint(tmp_path / "checkpoint")),
            tmp_path / "artifact",
            variants=GPU_VARIANTS,
        )
    assert not (tmp_path / "artifact").exists()
