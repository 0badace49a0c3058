"""Which graphs are made to read several texts in a row, and that any other is left to give each
text a row of its own.
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

from export.commands import export
from service.artifact import Artifact, read_artifact
from service.batching.packing import ROW
from service.batching.shapes import Shapes
from service.classifier import Classifier
from service.registry import Models
from service.runtimes.openvino import OpenVinoRuntime
from service.runtimes.packed import NotPackable, pack
from service.settings import Settings
from tests.export.corpus import FAMILIES, MAX_TOKENS
from tests.export.test_families import write_checkpoint

pytestmark = pytest.mark.filterwarnings(
    "ignore"
)  # torch's tracer warns of what verification checks
TEXTS = ["a charming and often affecting journey", "x", "no apparent joy at all here"]


def exported(family: str, folder: Path, framed: bool = True, **config: int) -> Artifact:
    """A small classifier of the family; its tokenizer adds no special tokens unless it is
    `framed`.
    """
    of_that_name = next(one for one in FAMILIES if one.name == family)
    checkpoint = write_checkpoint(
        replace(of_that_name, config={**of_that_name.config, **config}), folder / "checkpoint"
    )
    tokenizer = checkpoint / "tokenizer.json"
    if not framed:
        tokenizer.write_text(
            json.dumps(json.loads(tokenizer.read_text()) | {"post_processor": None})
        )
    export(str(checkpoint), folder / "artifact", variants=["cpu-fp32"])
    return read_artifact(folder / "artifact")


def classifiers(artifact: Artifact, graph: Path) -> tuple[Classifier, Classifier]:
    """One that gives each text a row of its own, and one that packs if it can."""
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
    """The Gather that picks it."""
    return next(
        node
        for node in model.get_ordered_ops()
        if node.get_type_name() == "Gather"
        and node.input_value(0).get_partial_shape().rank.get_length() == 3
        and node.output(0).get_partial_shape().rank.get_length() == 2
    )


def put_in_place_of(old: ov.Node, new: ov.Node, but: ov.Node | None = None) -> None:
    for reader in old.output(0).get_target_inputs():
        if but is None or reader.get_node().get_friendly_name() != but.get_friendly_name():
            reader.replace_source_output(new.output(0))


def turned_around(model: ov.Model) -> None:
    """The mask says where padding is, before it has four dimensions, and is turned back after."""
    mask = parameter(model, "attention_mask")
    [unsqueezed] = [
        one.get_node()
        for one in mask.output(0).get_target_inputs()
        if one.get_node().get_type_name() == "Unsqueeze"
    ]
    [wide] = [one.get_node() for one in unsqueezed.output(0).get_target_inputs()]
    padding = ops.unsqueeze(ops.equal(mask, ops.constant(0, ov.Type.i64)), np.array([1, 2]))
    put_in_place_of(
        wide, ops.convert(ops.logical_not(padding), wide.output(0).get_element_type().to_string())
    )


def also_means(model: ov.Model) -> None:
    """Beside the first token it reads the mean of the row."""
    first = first_token(model)
    both = ops.add(first, ops.reduce_mean(first.input_value(0), np.array([1]), False))
    put_in_place_of(first, both, but=both)


def keeps_the_dimension(model: ov.Model) -> None:
    """The first token is picked as a list of one, which is then squeezed away."""
    first = first_token(model)
    put_in_place_of(
        first,
        ops.squeeze(ops.gather(first.input_value(0), np.array([0]), np.array(1)), np.array([1])),
    )


def answers_twice(model: ov.Model) -> None:
    model.add_results([ops.result(first_token(model).output(0))])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (turned_around, "its mask goes into Equal"),
        (also_means, "reads more of a row than a first token"),
        (keeps_the_dimension, "0 of what looks like the choice of the first token"),
        (answers_twice, "2 outputs"),
    ],
)
def test_a_graph_that_is_made_otherwise_gives_each_text_a_row(
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


def test_whatever_goes_wrong_with_sharing_rows_a_text_gets_one_of_its_own(
    bert: Artifact, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(model: ov.Model) -> None:
        parameter(model, "attention_mask").set_friendly_name("half done")
        raise RuntimeError("an unknown kind of graph")

    monkeypatch.setattr("service.runtimes.openvino.pack", fails)
    plain, packing = classifiers(bert, bert.path("model.onnx"))
    assert packing.packing is None
    assert vars(caplog.records[-1])["why"] == "RuntimeError: an unknown kind of graph"
    texts = [plain.encode(text) for text in TEXTS]
    assert packing.predict(texts) == pytest.approx(plain.predict(texts), abs=1e-6)


def test_a_graph_that_cannot_be_packed_is_left_as_it_was(bert: Artifact) -> None:
    model = ov.Core().read_model(bert.path("model.onnx"))
    also_means(model)
    before = [node.get_friendly_name() for node in model.get_ordered_ops()]
    with pytest.raises(NotPackable):
        pack(model)
    assert [node.get_friendly_name() for node in model.get_ordered_ops()] == before


def test_what_the_neighbours_in_a_row_say_moves_no_answer(bert: Artifact) -> None:
    _, packing = classifiers(bert, bert.path("model.onnx"))
    assert packing.packing is not None
    asked = packing.encode("a charming journey")
    alone = packing.predict([asked])[0]
    loud = packing.encode(" ".join(TEXTS * 9), "a charming and often affecting journey")
    assert loud.tokens > 40
    for neighbours in ([loud], [loud] * 5, [packing.encode("x")] * 20, [asked] * 31):
        layout = packing.packing.lay_out([text.tokens for text in [*neighbours, asked]])
        assert any(len(row) > 1 for row in layout.rows)
        assert layout.length <= 2 * ROW
        for place in {0, len(neighbours) // 2, len(neighbours)}:
            batch = [*neighbours[:place], asked, *neighbours[place:]]
            assert packing.predict(batch)[place] == pytest.approx(alone, abs=1e-6)


def test_a_text_that_has_no_tokens_is_not_answered_as_its_neighbour(tmp_path: Path) -> None:
    artifact = exported("BERT", tmp_path, framed=False)
    plain, packing = classifiers(artifact, artifact.path("model.onnx"))
    assert packing.packing is not None
    nothing, text = packing.encode("   "), packing.encode(TEXTS[0])
    assert nothing.tokens == packing.window([], 0).tokens == 1
    alone = [plain.predict([one])[0] for one in (nothing, text, nothing)]
    assert packing.predict([nothing, text, nothing]) == pytest.approx(np.array(alone), abs=1e-6)


def test_a_roberta_whose_text_begins_with_padding_counts_the_other_tokens_only(
    tmp_path: Path,
) -> None:
    artifact = exported("RoBERTa", tmp_path, framed=False)
    plain, packing = classifiers(artifact, artifact.path("model.onnx"))
    assert packing.packing is not None
    texts = [packing.encode(text) for text in ("a charming journey", "<pad> no apparent joy", "x")]
    assert texts[1].ids[0] == 1
    assert packing.predict(texts) == pytest.approx(
        np.array([plain.predict([text])[0] for text in texts]), abs=1e-5
    )


@pytest.mark.parametrize("order", [("packs", "plain"), ("plain", "packs")])
def test_beside_a_model_that_packs_another_has_batches_as_its_engine_likes_them(
    order: tuple[str, str], bert: Artifact, artifact: Artifact
) -> None:
    models = Models(
        {name: {"packs": bert, "plain": artifact}[name] for name in order},
        Settings(max_batch_size=8, warm_up_s=0),
    )
    models.load()
    assert [models.info()["models"][name]["packs"] for name in order] == [
        name == "packs" for name in order
    ]
    assert [models.batcher.batch_size(waiting) for waiting in (3, 6, 7, 100)] == [3, 6, 6, 8]
    assert [models.batcher.rows(items) for items in (1, 5, 8)] == [1, 5, 8]


def test_a_limit_on_texts_is_kept_to_the_text(bert: Artifact) -> None:
    for most in (1, 3, 6, 12, 24):
        packing = Classifier(
            bert, OpenVinoRuntime(bert.path("model.onnx"), "f32", 1, packs=True), most
        )
        assert packing.shapes.max_batch_size == most
        assert max(map(len, packing.batches([3] * 100))) == most
    assert Shapes(64, 100, packing.runtime.grid).max_batch_size == 32


def test_a_roberta_that_is_prepared_for_short_rows_only_gives_each_text_a_row(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    artifact = exported("RoBERTa", tmp_path, max_position_embeddings=MAX_TOKENS + 2)
    _, packing = classifiers(artifact, artifact.path("model.onnx"))
    assert packing.packing is None
    assert f"prepared for rows of {MAX_TOKENS + 2} tokens" in vars(caplog.records[-1])["why"]
