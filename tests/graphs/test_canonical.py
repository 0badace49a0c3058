"""The digest ignores names, order and weights, and nothing else; tested on a small real graph."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from graphs.canonical import GraphError, first_differences, layers_only_in, split
from graphs.files import read_graph


def small_bert(
    fill: Callable[[tuple[int, ...]], np.ndarray] = lambda shape: np.random.default_rng(0).random(
        shape
    ),
    layers: int = 2,
) -> ModelProto:
    """Return a model of an embedding, layers with a LayerNorm each, a pooler and a classifier.

    `fill` gives the values of a weight by its shape.
    """
    weights: dict[str, np.ndarray] = {"table": fill((10, 4))}
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["h0"], "/bert/embeddings/Gather"),
    ]
    for i in range(layers):
        scope = f"/bert/encoder/layer.{i}"
        weights |= {f"w{i}": fill((4, 4)), f"g{i}": fill((4,)), f"b{i}": fill((4,))}
        weights |= {f"{part}{i}": fill((4, 4)) for part in ("query", "key", "value")}
        nodes += [
            *(
                helper.make_node(
                    "MatMul", [f"h{i}", f"{part}{i}"], [f"{part[0]}{i}"], f"{scope}/{part}/MatMul"
                )
                for part in ("query", "key", "value")
            ),
            helper.make_node("Sub", [f"q{i}", f"k{i}"], [f"d{i}"], f"{scope}/Sub"),
            helper.make_node("Mul", [f"d{i}", f"v{i}"], [f"a{i}"], f"{scope}/Mul"),
            helper.make_node("MatMul", [f"a{i}", f"w{i}"], [f"m{i}"], f"{scope}/dense/MatMul"),
            helper.make_node("Add", [f"m{i}", f"h{i}"], [f"s{i}"], f"{scope}/Add"),
            helper.make_node(
                "LayerNormalization",
                [f"s{i}", f"g{i}", f"b{i}"],
                [f"h{i + 1}"],
                f"{scope}/LayerNorm",
                axis=-1,
                epsilon=1e-12,
            ),
        ]
    weights |= {"p": fill((4, 4)), "c": fill((4, 2))}
    nodes += [
        helper.make_node(
            "Constant", [], ["zero"], "/bert/Constant", value=numpy_helper.from_array(np.array(0))
        ),
        helper.make_node(
            "Gather", [f"h{layers}", "zero"], ["first"], "/bert/pooler/Gather", axis=1
        ),
        helper.make_node("MatMul", ["first", "p"], ["pooled"], "/bert/pooler/dense/MatMul"),
        helper.make_node("Tanh", ["pooled"], ["bounded"], "/bert/pooler/activation/Tanh"),
        helper.make_node("MatMul", ["bounded", "c"], ["logits"], "/classifier/MatMul"),
    ]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "length"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 2])],
        [
            numpy_helper.from_array(value.astype(np.float32), name)
            for name, value in weights.items()
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


@pytest.fixture
def digest(tmp_path: Path) -> Callable[[ModelProto], str]:
    def digest_of(model: ModelProto) -> str:
        onnx.save(model, tmp_path / "model.onnx")
        return read_graph(tmp_path / "model.onnx").digest

    return digest_of


Digest = Callable[[ModelProto], str]


def merge_equal_weights(model: ModelProto) -> ModelProto:
    """Merge equal weights as exporters do: Identity nodes keep the names of the others."""
    first_names: dict[bytes, str] = {}
    for tensor in list(model.graph.initializer):
        if tensor.raw_data in first_names:
            model.graph.initializer.remove(tensor)
            model.graph.node.insert(
                0,
                helper.make_node(
                    "Identity",
                    [first_names[tensor.raw_data]],
                    [tensor.name],
                    f"Identity_{tensor.name}",
                ),
            )
        else:
            first_names[tensor.raw_data] = tensor.name
    return model


def test_zeros_ones_and_trained_weights_give_one_digest(digest: Digest) -> None:
    trained = digest(small_bert())
    assert digest(merge_equal_weights(small_bert(np.zeros))) == trained
    assert digest(merge_equal_weights(small_bert(np.ones))) == trained


def rename(model: ModelProto) -> None:
    for node in model.graph.node:
        node.name = f"renamed_{node.name}"
        node.doc_string = "here"
        for names in (node.input, node.output):
            names[:] = [name if name in ("input_ids", "logits") else f"v_{name}" for name in names]
    for tensor in model.graph.initializer:
        tensor.name = f"v_{tensor.name}"


def reorder(model: ModelProto) -> None:
    nodes = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend(reversed(nodes))


def rename_dimensions(model: ModelProto) -> None:
    for i, dim in enumerate(model.graph.input[0].type.tensor_type.shape.dim):
        dim.dim_param = f"d{i}"


def add_identity(model: ModelProto) -> None:
    node_of(model, "s0").input[1] = "same"
    model.graph.node.insert(1, helper.make_node("Identity", ["h0"], ["same"], "/bert/Identity"))


def node_of(model: ModelProto, output: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.output[0] == output)


@pytest.mark.parametrize("change", [rename, reorder, rename_dimensions, add_identity])
def test_graphs_that_compute_the_same_have_the_same_digest(
    digest: Digest, change: Callable[[ModelProto], None]
) -> None:
    model = small_bert()
    change(model)
    assert digest(model) == digest(small_bert())


def swap_inputs(m: ModelProto) -> None:
    node_of(m, "a0").input[:] = ["v0", "d0"]


def swap_inputs_of_an_addition(m: ModelProto) -> None:
    node_of(m, "s0").input[:] = reversed(node_of(m, "s0").input)


def read_a_sibling(m: ModelProto) -> None:
    node_of(m, "d0").input[1] = "q0"


def read_one_sibling_twice(m: ModelProto) -> None:
    node_of(m, "d0").input[1] = "q0"
    node_of(m, "a0").input[1] = "q0"


def read_a_sibling_of_another_layer(m: ModelProto) -> None:
    node_of(m, "a1").input[1] = "v0"


def other_operator(m: ModelProto) -> None:
    node_of(m, "s0").op_type = "Sub"


def other_attribute(m: ModelProto) -> None:
    node_of(m, "h1").attribute[1].f = 1e-5


def one_attribute_less(m: ModelProto) -> None:
    del node_of(m, "h1").attribute[1]


def one_output_more(m: ModelProto) -> None:
    node_of(m, "h1").output.append("mean")


def other_constant(m: ModelProto) -> None:
    node_of(m, "zero").attribute[0].t.CopyFrom(numpy_helper.from_array(np.array(1)))


def other_shape(m: ModelProto) -> None:
    m.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.zeros((11, 4), np.float32), "table"))


def other_type(m: ModelProto) -> None:
    m.graph.initializer[1].CopyFrom(numpy_helper.from_array(np.zeros((4, 4), np.float16), "w0"))


def other_input_type(m: ModelProto) -> None:
    m.graph.input[0].type.tensor_type.elem_type = TensorProto.INT32


def fixed_dimension(m: ModelProto) -> None:
    m.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1


def other_opset(m: ModelProto) -> None:
    m.opset_import[0].version = 19


def bypass(m: ModelProto) -> None:
    node_of(m, "s0").input[1] = "m0"


def twice(m: ModelProto) -> None:
    again = copy.deepcopy(node_of(m, "m0"))
    again.output[0] = "m0_again"
    m.graph.node.insert(list(m.graph.node).index(node_of(m, "s0")), again)
    node_of(m, "s0").input[1] = "m0_again"


def unused(m: ModelProto) -> None:
    m.graph.node.append(helper.make_node("Tanh", ["h1"], ["nobody"], "/bert/Tanh"))


MUTATIONS = [
    swap_inputs,
    swap_inputs_of_an_addition,
    read_a_sibling,
    read_one_sibling_twice,
    read_a_sibling_of_another_layer,
    other_operator,
    other_attribute,
    one_attribute_less,
    one_output_more,
    other_constant,
    other_shape,
    other_type,
    other_input_type,
    fixed_dimension,
    other_opset,
    bypass,
    twice,
    unused,
]


@pytest.mark.parametrize("mutate", MUTATIONS)
def test_every_single_mutation_changes_the_digest(
    digest: Digest, mutate: Callable[[ModelProto], None]
) -> None:
    model = small_bert()
    mutate(model)
    assert digest(model) != digest(small_bert())


def test_a_file_that_defines_functions_is_refused(tmp_path: Path) -> None:
    model = small_bert()
    model.functions.append(
        helper.make_function("own", "F", ["x"], ["y"], [helper.make_node("Relu", ["x"], ["y"])], [])
    )
    onnx.save(model, tmp_path / "a.onnx")
    with pytest.raises(GraphError, match="defines functions"):
        read_graph(tmp_path / "a.onnx")


IR_CHANGES = {
    "an attribute": ('eps_mode="INSIDE_SQRT"', 'eps_mode="OUTSIDE_SQRT"'),
    "an operator": ('type="Tanh"', 'type="Sigmoid"'),
    "an input's type": ('element_type="i64" ', 'element_type="i32" '),
}


def test_in_an_openvino_ir_weights_do_not_count_and_everything_else_does(tmp_path: Path) -> None:
    import openvino as ov

    for name, fill in (("trained", None), ("zeros", np.zeros), ("ones", np.ones)):
        onnx.save(
            merge_equal_weights(small_bert(fill)) if fill else small_bert(),
            tmp_path / f"{name}.onnx",
        )
        ov.save_model(
            ov.Core().read_model(tmp_path / f"{name}.onnx"),
            tmp_path / f"{name}.xml",
            compress_to_fp16=True,
        )
    trained = read_graph(tmp_path / "trained.xml").digest
    assert read_graph(tmp_path / "zeros.xml").digest == trained
    assert read_graph(tmp_path / "ones.xml").digest == trained
    encoder, head = split(read_graph(tmp_path / "trained.xml"))
    assert encoder.digest != head.digest
    text = (tmp_path / "trained.xml").read_text()
    for change, (old, new) in IR_CHANGES.items():
        assert old in text, change
        (tmp_path / "changed.xml").write_text(text.replace(old, new, 1))
        (tmp_path / "changed.bin").write_bytes((tmp_path / "trained.bin").read_bytes())
        assert read_graph(tmp_path / "changed.xml").digest != trained, change


def test_encoder_and_head_are_cut_at_the_last_hidden_state(tmp_path: Path) -> None:
    onnx.save(small_bert(), tmp_path / "a.onnx")
    encoder, head = split(read_graph(tmp_path / "a.onnx"))
    assert [node.operator for node in head.nodes] == ["Gather", "MatMul", "Tanh", "MatMul"]
    assert len(encoder.nodes) == 1 + 2 * 8
    assert encoder.flops_per_token() == 2 * 2 * 4 * 16


def test_another_head_does_not_change_the_digest_of_the_encoder(tmp_path: Path) -> None:
    changed = small_bert()
    next(n for n in changed.graph.node if n.op_type == "Tanh").op_type = "Relu"
    onnx.save(small_bert(), tmp_path / "a.onnx")
    onnx.save(changed, tmp_path / "b.onnx")
    (encoder, head), (same, other) = (split(read_graph(tmp_path / f"{n}.onnx")) for n in "ab")
    assert encoder.digest == same.digest
    assert head.digest != other.digest


def test_a_further_layer_is_named(tmp_path: Path) -> None:
    onnx.save(small_bert(), tmp_path / "a.onnx")
    onnx.save(small_bert(layers=3), tmp_path / "b.onnx")
    a, b = (split(read_graph(tmp_path / f"{n}.onnx"))[0] for n in "ab")
    assert layers_only_in(b, a) == ["/bert/encoder/layer.2"]
    (node_of_a, node_of_b), *_ = first_differences(a, b)
    assert node_of_a is None
    assert node_of_b is not None
    assert node_of_b.name == "/bert/encoder/layer.2/query/MatMul"


def test_the_models_name_does_not_make_a_layer_a_further_one(
    tmp_path: Path,
) -> None:
    other = small_bert()
    for node in other.graph.node:
        node.name = node.name.replace("/bert/", "/electra/")
    onnx.save(small_bert(layers=1), tmp_path / "a.onnx")
    onnx.save(other, tmp_path / "b.onnx")
    a, b = (split(read_graph(tmp_path / f"{n}.onnx"))[0] for n in "ab")
    assert layers_only_in(b, a) == ["/electra/encoder/layer.1"]
    assert layers_only_in(a, b) == []


def test_a_graph_without_names_cannot_be_split(tmp_path: Path) -> None:
    model = small_bert()
    for node in model.graph.node:
        node.name = ""
    onnx.save(model, tmp_path / "a.onnx")
    with pytest.raises(GraphError, match="no module names"):
        split(read_graph(tmp_path / "a.onnx"))


def test_a_file_that_is_not_a_graph_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(b"not a graph")
    with pytest.raises(GraphError, match="cannot be read as a graph"):
        read_graph(tmp_path / "a.onnx")
