"""
Graphs that can be packed read several texts per row; any other graph reads one text per row.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as ops

from export.pipeline import export
from service.artifact import Artifact, read_artifact
from service.batching.packing import ROW_TOKENS
from service.batching.shapes import Shapes
from service.classifier import Classifier
from service.http.info import service_info
from service.runtimes.openvino import OpenVinoRuntime
from service.runtimes.packed import NotPackable, pack
from service.settings import Settings
from service.state import ServiceState
from tests.export.corpus import FAMILIES, MAX_TOKENS
from tests.export.test_families import write_checkpoint

pytestmark = pytest.mark.filterwarnings(
    "ignore"
)  # torch's tracer warns of what verification checks
TEXTS = ["a charming and often affecting journey", "x", "no apparent joy at all here"]


def exported(name: str, folder: Path, special_tokens: bool = True, **config: int) -> Artifact:
    """Return a small classifier of a family, whose tokenizer adds special tokens or does not."""
    family = next(row for row in FAMILIES if row.name == name)
    checkpoint = write_checkpoint(
        replace(family, config={**family.config, **config}), folder / "checkpoint"
    )
    tokenizer = checkpoint / "tokenizer.json"
    if not special_tokens:
        tokenizer.write_text(
            json.dumps(json.loads(tokenizer.read_text()) | {"post_processor": None})
        )
    export(str(checkpoint), folder / "artifact", variants=["cpu-fp32"])
    return read_artifact(folder / "artifact")


def classifiers(artifact: Artifact, graph: Path) -> tuple[Classifier, Classifier]:
    """Return a classifier that does not pack, and one that packs if it can."""
    plain, packing = (
        Classifier(artifact, OpenVinoRuntime(graph, "f32", 1, packs=packs))
        for packs in (False, True)
    )
    return plain, packing


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return exported("BERT", tmp_path_factory.mktemp("bert"))


def parameter(model: ov.Model, name: str) -> ov.Node:
    return next(port.get_node() for port in model.inputs if name in port.get_names())


def first_token(model: ov.Model) -> ov.Node:
    """Return the Gather that picks the first token."""
    return next(
        node
        for node in model.get_ordered_ops()
        if node.get_type_name() == "Gather"
        and node.input_value(0).get_partial_shape().rank.get_length() == 3
        and node.output(0).get_partial_shape().rank.get_length() == 2
    )


def replace_node(old: ov.Node, new: ov.Node, excluding: ov.Node | None = None) -> None:
    """Connect the readers of `old` to `new`, except for the node `excluding`."""
    excluded = None if excluding is None else excluding.get_friendly_name()
    for reader in old.output(0).get_target_inputs():
        if reader.get_node().get_friendly_name() != excluded:
            reader.replace_source_output(new.output(0))


def invert_mask(model: ov.Model) -> None:
    """Make the mask 1 for padding until it has four dimensions, and invert it again after."""
    mask = parameter(model, "attention_mask")
    [unsqueezed] = [
        reader.get_node()
        for reader in mask.output(0).get_target_inputs()
        if reader.get_node().get_type_name() == "Unsqueeze"
    ]
    [wide] = [reader.get_node() for reader in unsqueezed.output(0).get_target_inputs()]
    padding = ops.unsqueeze(ops.equal(mask, ops.constant(0, ov.Type.i64)), np.array([1, 2]))
    replace_node(
        wide, ops.convert(ops.logical_not(padding), wide.output(0).get_element_type().to_string())
    )


def add_mean(model: ov.Model) -> None:
    """Make the head read the mean of the row in addition to the first token."""
    first = first_token(model)
    both = ops.add(first, ops.reduce_mean(first.input_value(0), np.array([1]), False))
    replace_node(first, both, excluding=both)


def squeeze_first_token(model: ov.Model) -> None:
    """Pick the first token as a list of length one, and squeeze that dimension away."""
    first = first_token(model)
    replace_node(
        first,
        ops.squeeze(ops.gather(first.input_value(0), np.array([0]), np.array(1)), np.array([1])),
    )


def add_output(model: ov.Model) -> None:
    """Make the first token's state a second output."""
    model.add_results([ops.result(first_token(model).output(0))])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (invert_mask, "its mask goes into Equal"),
        (add_mean, "reads more of a row than a first token"),
        (squeeze_first_token, "0 of what looks like the choice of the first token"),
        (add_output, "2 outputs"),
    ],
)
def test_a_graph_of_another_form_is_not_packed(
    change: Callable[[ov.Model], None],
    reason: str,
    bert: Artifact,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = ov.Core().read_model(bert.path("model.onnx"))
    change(model)
    model.validate_nodes_and_infer_types()
    ov.save_model(model, tmp_path / "changed.xml", compress_to_fp16=False)
    plain, packing = classifiers(bert, tmp_path / "changed.xml")
    assert packing.packing is None
    assert reason in vars(caplog.records[-1])["why"]
    texts = [plain.encode(text) for text in TEXTS]
    assert packing.predict(texts) == pytest.approx(plain.predict(texts), abs=1e-6)


def test_any_error_in_packing_leaves_the_model_unpacked(
    bert: Artifact, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(model: ov.Model, narrows: bool) -> None:
        parameter(model, "attention_mask").set_friendly_name("half done")
        raise RuntimeError("an unknown kind of graph")

    monkeypatch.setattr("service.runtimes.forms.pack", fails)
    plain, packing = classifiers(bert, bert.path("model.onnx"))
    assert packing.packing is None
    assert vars(caplog.records[-1])["why"] == "RuntimeError: an unknown kind of graph"
    texts = [plain.encode(text) for text in TEXTS]
    assert packing.predict(texts) == pytest.approx(plain.predict(texts), abs=1e-6)


def test_a_graph_that_cannot_be_packed_is_left_unchanged(bert: Artifact) -> None:
    model = ov.Core().read_model(bert.path("model.onnx"))
    add_mean(model)
    before = [node.get_friendly_name() for node in model.get_ordered_ops()]
    with pytest.raises(NotPackable):
        pack(model)
    assert [node.get_friendly_name() for node in model.get_ordered_ops()] == before


def test_the_neighbours_in_a_row_do_not_change_an_answer(bert: Artifact) -> None:
    _, packing = classifiers(bert, bert.path("model.onnx"))
    assert packing.packing is not None
    text = packing.encode("a charming journey")
    alone = packing.predict([text])[0]
    long = packing.encode(" ".join(TEXTS * 9), "a charming and often affecting journey")
    assert long.tokens > 40
    for neighbours in ([long], [long] * 5, [packing.encode("x")] * 20, [text] * 31):
        layout = packing.packing.lay_out([item.tokens for item in [*neighbours, text]])
        assert any(len(row) > 1 for row in layout.rows)
        assert layout.length <= 2 * ROW_TOKENS
        for index in {0, len(neighbours) // 2, len(neighbours)}:
            batch = [*neighbours[:index], text, *neighbours[index:]]
            assert packing.predict(batch)[index] == pytest.approx(alone, abs=1e-6)


def test_a_text_that_has_no_tokens_is_not_answered_as_its_neighbour(tmp_path: Path) -> None:
    artifact = exported("BERT", tmp_path, special_tokens=False)
    plain, packing = classifiers(artifact, artifact.path("model.onnx"))
    assert packing.packing is not None
    empty, text = packing.encode("   "), packing.encode(TEXTS[0])
    assert empty.tokens == packing.window([], 0).tokens == 1
    alone = [plain.predict([item])[0] for item in (empty, text, empty)]
    assert packing.predict([empty, text, empty]) == pytest.approx(np.array(alone), abs=1e-6)


def test_a_roberta_whose_text_begins_with_padding_counts_the_other_tokens_only(
    tmp_path: Path,
) -> None:
    artifact = exported("RoBERTa", tmp_path, special_tokens=False)
    plain, packing = classifiers(artifact, artifact.path("model.onnx"))
    assert packing.packing is not None
    texts = [packing.encode(text) for text in ("a charming journey", "<pad> no apparent joy", "x")]
    assert texts[1].ids[0] == 1
    assert packing.predict(texts) == pytest.approx(
        np.array([plain.predict([text])[0] for text in texts]), abs=1e-5
    )


@pytest.mark.parametrize("order", [("packs", "plain"), ("plain", "packs")])
def test_with_a_packed_model_another_model_still_has_batches_that_fit_its_engine(
    order: tuple[str, str], bert: Artifact, artifact: Artifact
) -> None:
    service = ServiceState(
        {name: {"packs": bert, "plain": artifact}[name] for name in order},
        Settings(max_batch_size=8, warm_up_s=0),
    )
    service.lifecycle.load()
    assert [service_info(service)["models"][name]["packs"] for name in order] == [
        name == "packs" for name in order
    ]
    limits = service.batcher.limits
    assert [limits.round_down(waiting) for waiting in (3, 6, 7, 100)] == [
        3,
        6,
        6,
        8,
    ]
    assert [limits.rows(items) for items in (1, 5, 8)] == [1, 5, 8]


def test_a_limit_on_texts_is_exact(bert: Artifact) -> None:
    for limit in (1, 3, 6, 12, 24):
        packing = Classifier(
            bert, OpenVinoRuntime(bert.path("model.onnx"), "f32", 1, packs=True), limit
        )
        assert packing.shapes.max_batch_size == limit
        assert max(map(len, packing.batches([3] * 100))) == limit
    assert Shapes(64, 100, packing.runtime.grid).max_batch_size == 32


def test_a_roberta_with_too_few_positions_is_not_packed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    artifact = exported("RoBERTa", tmp_path, max_position_embeddings=MAX_TOKENS + 2)
    _, packing = classifiers(artifact, artifact.path("model.onnx"))
    assert packing.packing is None
    assert f"prepared for rows of {MAX_TOKENS + 2} tokens" in vars(caplog.records[-1])["why"]
