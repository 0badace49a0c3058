"""ONNX graphs whose last layer is computed for first tokens only: for ONNX Runtime and GPUs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from export.graph.narrowed import narrow
from export.pipeline import export
from service.artifact import Artifact, read_artifact
from tests.export.corpus import FAMILIES
from tests.export.test_packed import exported

pytestmark = pytest.mark.filterwarnings(
    "ignore"
)  # torch's tracer warns of what verification checks

ROWS = [[3, 5, 7, 2], [1, 2, 4, 6]]


def answers(model: onnx.ModelProto, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """Return the first output of a graph, as ONNX Runtime computes it."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options)
    names = {each.name for each in session.get_inputs()}
    return np.array(session.run(None, {name: inputs[name] for name in names})[0])


def batch(rows: int, length: int, words: int) -> dict[str, np.ndarray]:
    ids = np.random.default_rng(rows).integers(1, words, (rows, length))
    return {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "token_type_ids": np.zeros_like(ids),
    }


def taken(model: onnx.ModelProto) -> list[str]:
    """Return the operators of which only first tokens are taken."""
    producers = {name: node.op_type for node in model.graph.node for name in node.output}
    return [
        producers[node.input[0]] for node in model.graph.node if node.name.endswith("/first_token")
    ]


@pytest.mark.parametrize("name", [family.name for family in FAMILIES])
def test_every_family_answers_as_its_whole_graph(name: str, tmp_path: Path) -> None:
    artifact = exported(name, tmp_path)
    whole = onnx.load(artifact.path("model.onnx"))
    narrowed = onnx.load(artifact.path("model.onnx"))
    narrow(narrowed)
    for rows, length in ((1, 7), (3, 12)):
        inputs = batch(rows, length, 20)
        expected = answers(whole, inputs)
        near = 1e-5 * max(1.0, float(np.abs(expected).max()))
        np.testing.assert_allclose(answers(narrowed, inputs), expected, rtol=0, atol=near)


@pytest.fixture(scope="module")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("mini") / "artifact"
    export(
        "examples/checkpoints/drbert-mini-sst2",
        folder,
        variants=["cpu-fp32", "cuda-fp16", "tensorrt-fp16"],
    )
    return read_artifact(folder)


def test_a_bert_answers_with_the_same_bits(mini: Artifact) -> None:
    whole, narrowed = (onnx.load(mini.path("model.onnx")) for _ in range(2))
    assert narrow(narrowed)
    assert taken(narrowed) == ["Reshape", "LayerNormalization"]
    for rows, length in ((1, 8), (3, 16), (8, 40)):
        inputs = batch(rows, length, 1000)
        np.testing.assert_array_equal(answers(narrowed, inputs), answers(whole, inputs))


@pytest.mark.parametrize(
    ("variant", "whole"),
    [
        ("cuda-fp16", ["Attention", "SkipLayerNormalization"]),
        ("tensorrt-fp16", ["Reshape", "LayerNormalization"]),
    ],
)
def test_the_graphs_for_gpus_are_narrowed(variant: str, whole: list[str], mini: Artifact) -> None:
    graph = onnx.load(mini.path(mini.manifest.variants[variant].files[0]))
    assert taken(graph) == whole
    assert mini.manifest.variants[variant].gate.status == "passed"


def graph(*nodes: onnx.NodeProto, outputs: tuple[str, ...] = ("logits",)) -> onnx.ModelProto:
    """Return hidden states, and nodes that read them and end in `logits`."""
    rng = np.random.default_rng(0)
    arrays = {
        "table": rng.normal(size=(16, 8)).astype(np.float32),
        "weights": rng.normal(size=(8, 8)).astype(np.float32),
        "scale": rng.normal(size=8).astype(np.float32),
        "places": rng.normal(size=(1, 4, 8)).astype(np.float32),
        "first": np.array(0),
        "last": np.array(3),
        "firsts": np.array([0]),
    }
    return helper.make_model(
        helper.make_graph(
            [helper.make_node("Gather", ["table", "input_ids"], ["hidden"]), *nodes],
            "graph",
            [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["B", 4])],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
            [numpy_helper.from_array(array, name) for name, array in arrays.items()],
        ),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=10,
    )


PRODUCT = helper.make_node("MatMul", ["hidden", "weights"], ["product"])
FIRST = helper.make_node("Gather", ["state", "first"], ["logits"], axis=1)
NARROWED = {
    "a gate": [
        PRODUCT,
        helper.make_node("Sigmoid", ["product"], ["gate"]),
        helper.make_node("Mul", ["gate", "hidden"], ["state"]),
    ],
    "a constant for each token": [
        helper.make_node("Add", ["hidden", "places"], ["placed"]),
        helper.make_node("MatMul", ["placed", "weights"], ["state"]),
    ],
    "a softmax over tokens": [
        helper.make_node("Softmax", ["hidden"], ["shares"], axis=1),
        helper.make_node("MatMul", ["shares", "weights"], ["state"]),
    ],
    "states that are read whole too": [
        PRODUCT,
        helper.make_node("ReduceMean", ["product"], ["mean"], axes=None, keepdims=1),
        helper.make_node("Mul", ["product", "scale"], ["scaled"]),
        helper.make_node("MatMul", ["scaled", "weights"], ["again"]),
        helper.make_node("Add", ["again", "mean"], ["state"]),
    ],
}


@pytest.mark.parametrize("name", NARROWED)
def test_what_is_narrowed_answers_the_same(name: str) -> None:
    whole, narrowed = graph(*NARROWED[name], FIRST), graph(*NARROWED[name], FIRST)
    assert narrow(narrowed)
    inputs = {"input_ids": np.array(ROWS)}
    np.testing.assert_allclose(answers(narrowed, inputs), answers(whole, inputs), atol=1e-6)


WHOLE = {
    "the last token": (
        [PRODUCT, helper.make_node("Gather", ["product", "last"], ["logits"], axis=1)],
        ("logits",),
    ),
    "a list of first tokens": (
        [PRODUCT, helper.make_node("Gather", ["product", "firsts"], ["logits"], axis=1)],
        ("logits",),
    ),
    "the mean of all tokens too": (
        [
            helper.make_node("MatMul", ["hidden", "weights"], ["state"]),
            helper.make_node("Gather", ["state", "first"], ["token"], axis=1),
            helper.make_node("ReduceMax", ["state"], ["most"], keepdims=0),
            helper.make_node("Add", ["token", "most"], ["logits"]),
        ],
        ("logits",),
    ),
    "the states as a second output": (
        [helper.make_node("MatMul", ["hidden", "weights"], ["state"]), FIRST],
        ("logits", "state"),
    ),
    "no product": ([helper.make_node("Tanh", ["hidden"], ["state"]), FIRST], ("logits",)),
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_graph_stays_whole_that_reads(name: str) -> None:
    nodes, outputs = WHOLE[name]
    model = graph(*nodes, outputs=outputs)
    before = model.SerializeToString()
    assert not narrow(model)
    assert model.SerializeToString() == before
