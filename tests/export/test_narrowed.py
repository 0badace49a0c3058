"""The last layer is computed for the first tokens only, and answers stay the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as ops

from export.pipeline import export
from service.artifact import Artifact, read_artifact
from service.classifier import Classifier, Encoded
from service.host import cpus
from service.runtimes.forms import graph_digest
from service.runtimes.narrowed import narrow_rows
from service.runtimes.openvino import OpenVinoRuntime, compiled
from tests.export.corpus import FAMILIES
from tests.export.factories import write_checkpoint
from tests.export.test_packed import add_mean, exported

SERVED = ["cpu-fp32", "cpu-int8"]
if "bf16" in cpus.native_precisions():  # Without such instructions the service refuses it.
    SERVED.append("cpu-bf16")

pytestmark = pytest.mark.filterwarnings(
    "ignore"
)  # torch's tracer warns of what verification checks


def whole_logits(artifact: Artifact, texts: list[Encoded]) -> np.ndarray:
    """Return the logits of texts that are run alone, by the graph as it was exported."""
    graph = compiled(artifact.path("model.onnx"), "f32", 1)
    request = graph.create_infer_request()
    rows = []
    for text in texts:
        ids = np.array([text.ids], np.int64)
        arrays = {
            "input_ids": ids,
            "attention_mask": np.ones_like(ids),
            "token_type_ids": np.array([text.type_ids], np.int64),
        }
        inputs = {name: arrays[name] for name in artifact.manifest.inputs}
        rows.append(np.array(request.infer(inputs)[0][0]))
    return np.array(rows)


def texts_of(classifier: Classifier, counts: list[int]) -> list[Encoded]:
    """Return texts of so many tokens each."""
    rng = np.random.default_rng(30)
    words = ["a", "charming", "and", "often", "affecting", "journey", "x", "no", "joy"]
    return [classifier.encode(" ".join(rng.choice(words, count))) for count in counts]


@pytest.mark.parametrize("name", [family.name for family in FAMILIES])
def test_every_family_answers_as_its_whole_graph(name: str, tmp_path: Path) -> None:
    artifact = exported(name, tmp_path)
    for packs in {False, artifact.manifest.can_pack}:
        classifier, whole = (
            Classifier(
                artifact,
                OpenVinoRuntime(
                    artifact.path("model.onnx"), "f32", 1, packs=packs, narrows=narrows
                ),
            )
            for narrows in (True, False)
        )
        texts = texts_of(classifier, [1, 3, 9, 14, 2, 6])
        expected = whole_logits(artifact, texts)
        # Rounding: one token's products take other kernels than a row's.
        near = 1e-5 * max(1.0, float(np.abs(expected).max()))
        alone = np.concatenate([classifier.predict([text]) for text in texts])
        np.testing.assert_allclose(alone, expected, rtol=0, atol=near)
        if classifier.padding_invariant:  # The service batches texts of equal length otherwise.
            # Of MobileBERT, which has no LayerNorm, a batch rounds by 6e-5, whole or narrowed.
            together, expected = classifier.predict(texts), whole.predict(texts)
            np.testing.assert_allclose(together, expected, rtol=0, atol=near)


@pytest.fixture(scope="module")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("mini") / "artifact"
    checkpoint = "examples/checkpoints/drbert-mini-sst2"
    export(checkpoint, folder, variants=["cpu-fp32", "cpu-bf16", "cpu-int8"])
    return read_artifact(folder)


@pytest.mark.parametrize("name", SERVED)
@pytest.mark.parametrize("packs", [False, True], ids=["a row each", "packed"])
def test_every_variant_answers_with_the_same_bits_alone_and_in_company(
    name: str, packs: bool, mini: Artifact
) -> None:
    variant = mini.manifest.variants[name]

    def classifier(narrows: bool) -> Classifier:
        path, lowest = mini.path(variant.files[0]), variant.lowest_unquantized_precision
        return Classifier(mini, OpenVinoRuntime(path, variant.precision, 1, lowest, packs, narrows))

    narrowed, whole = classifier(True), classifier(False)
    texts = texts_of(narrowed, [1, 3, 9, 14, 2, 6, 30, 60, 5, 5, 5, 40])
    for batch in (*([text] for text in texts), texts[:4], texts[4:8], texts):
        np.testing.assert_array_equal(narrowed.predict(batch), whole.predict(batch))


def test_a_digest_of_the_graph_that_is_run_tells_its_forms_apart_and_ignores_weights(
    tmp_path: Path,
) -> None:
    models = []
    for seed in (0, 1):
        checkpoint = write_checkpoint(tmp_path / f"checkpoint-{seed}", seed=seed)
        export(str(checkpoint), tmp_path / f"artifact-{seed}", variants=["cpu-fp32"])
        models.append(tmp_path / f"artifact-{seed}" / "model.onnx")
    assert models[0].read_bytes() != models[1].read_bytes()

    def digest(model: Path, packs: bool = True, narrows: bool = True) -> str | None:
        return OpenVinoRuntime(model, "f32", 1, packs=packs, narrows=narrows).graph_digest

    assert digest(models[0]) == digest(models[1])
    whole = digest(models[0], packs=False, narrows=False)
    seen = {digest(models[0], packs=False), digest(models[0], narrows=False), digest(models[0])}
    assert len(seen | {whole}) == 4
    graph = ov.Core().read_model(models[0])
    assert graph_digest(graph) == whole
    reordered = next(node for node in graph.get_ordered_ops() if node.get_type_name() == "Softmax")
    reordered.set_axis(2)
    assert graph_digest(graph) != whole


def gated(output: int) -> ov.Model:
    """Return a graph whose first token's state is one half of a split times the other's tanh."""
    ids = ops.parameter([-1, -1], np.int64, name="input_ids")
    table = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
    hidden = ops.gather(ops.constant(table), ids, np.array(0))
    halves = ops.split(hidden, np.array(2), 2)
    state = ops.multiply(halves.output(output), ops.tanh(halves.output(1 - output)))
    first = ops.gather(state, np.array(0), np.array(1))
    return ov.Model([ops.matmul(first, ops.constant(table[:4, :2]), False, False)], [ids])


def evaluated(model: ov.Model, ids: list[list[int]]) -> np.ndarray:
    """Return what a graph computes by the operators' own definitions, without an engine."""
    result = ov.Tensor(np.zeros((len(ids), 2), np.float32))
    assert model.evaluate([result], [ov.Tensor(np.array(ids, np.int64))])
    return np.array(result.data)


@pytest.mark.parametrize("output", [0, 1])
def test_a_node_with_several_outputs_is_read_by_the_right_one(output: int) -> None:
    ids = [[3, 5, 7], [1, 2, 4]]
    whole, model = evaluated(gated(output), ids), gated(output)
    assert narrow_rows(model)
    np.testing.assert_allclose(evaluated(model, ids), whole, atol=1e-6)


def test_a_reshape_that_mixes_tokens_stays_whole() -> None:
    ids = ops.parameter([-1, 4], np.int64, name="input_ids")
    table = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
    hidden = ops.gather(ops.constant(table), ids, np.array(0))
    # (R, 4, 8) to (R · 2, 2, 8), the first token of pairs taken, and back.
    pairs = ops.tanh(ops.reshape(hidden, np.array([-1, 2, 8]), False))
    states = ops.tanh(ops.reshape(pairs, np.array([-1, 4, 8]), False))
    first = ops.gather(states, np.array(0), np.array(1))
    model = ov.Model([ops.matmul(first, ops.constant(table[:8, :2]), False, False)], [ids])
    rows = [[3, 5, 7, 9], [1, 2, 4, 8]]
    whole = evaluated(model.clone(), rows)
    assert narrow_rows(model)
    np.testing.assert_allclose(evaluated(model, rows), whole, atol=1e-6)


def test_the_last_layer_is_computed_for_one_token_of_a_row(tmp_path: Path) -> None:
    artifact = exported("BERT", tmp_path)
    model = ov.Core().read_model(artifact.path("model.onnx"))
    assert narrow_rows(model)
    feed_forward = [
        node.output(0).get_partial_shape()
        for node in model.get_ordered_ops()
        if node.get_type_name() == "MatMul" and len(node.output(0).get_partial_shape()) == 3
    ]
    tokens = [shape[1].get_length() if shape[1].is_static else None for shape in feed_forward]
    # Of the last layer's products only keys and values are of all tokens.
    assert tokens[-3:] == [1, 1, 1]
    assert tokens.count(None) >= 2


def test_a_graph_whose_answer_reads_more_than_first_tokens_stays_whole(tmp_path: Path) -> None:
    artifact = exported("BERT", tmp_path)
    model = ov.Core().read_model(artifact.path("model.onnx"))
    add_mean(model)
    before = [node.get_friendly_name() for node in model.get_ordered_ops()]
    assert not narrow_rows(model)
    assert [node.get_friendly_name() for node in model.get_ordered_ops()] == before
