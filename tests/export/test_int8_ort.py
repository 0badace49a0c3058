"""cpu-int8-ort: weights quantised to 7 bits, and run by ONNX Runtime."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from export.graph.variants import RECIPES
from export.pipeline import Quantization, export
from service.artifact import Artifact, read_artifact
from service.classifier import Classifier
from service.runtimes.auto import Choice, load
from tests.export.factories import write_checkpoint

pytestmark = pytest.mark.filterwarnings(
    "ignore"
)  # torch's tracer warns of what verification checks

NAME = "cpu-int8-ort"
WORDS = ("good", "bad", "film", "a", "b", "c")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("int8-ort")
    texts = folder / "gate.txt"
    rng = np.random.default_rng(0)
    lines = {" ".join(rng.choice(WORDS, rng.integers(3, 20))) for _ in range(6_000)}
    texts.write_text("\n".join(sorted(lines)) + "\n")
    checkpoint = write_checkpoint(folder / "checkpoint")
    export(
        str(checkpoint),
        folder / "artifact",
        variants=[NAME],
        quantization=Quantization(gate=texts, agreement=0.9),
    )
    return read_artifact(folder / "artifact")


def test_it_is_gated_against_fp32_and_checked_at_every_start(exported: Artifact) -> None:
    variant = exported.manifest.variants[NAME]
    assert (variant.runtime, variant.precision) == ("onnxruntime", "i8")
    assert variant.gate.status == "passed", variant.gate.reason
    assert variant.gate.agreement is not None
    assert variant.gate.agreement.unquantized_precision is None
    assert variant.self_check is not None
    assert set(variant.self_check.logits) == {"f32"}
    assert "cpu-fp32" in exported.manifest.variants


def test_weights_have_7_bits_so_products_do_not_saturate(exported: Artifact) -> None:
    graph = onnx.load(exported.path(RECIPES[NAME].files[0])).graph
    quantised = [
        numpy_helper.to_array(each)
        for each in graph.initializer
        if each.data_type == onnx.TensorProto.INT8 and each.name.endswith("_quantized")
    ]
    assert len(quantised) == 2 * 6 + 2  # six products of a layer, the pooler and the classifier
    assert max(int(np.abs(weights.astype(int)).max()) for weights in quantised) <= 64


def test_answers_are_near_those_of_fp32_and_the_same_alone_and_in_a_batch(
    exported: Artifact,
) -> None:
    classifiers = [
        Classifier(exported, load(exported, Choice(name, runtime, ""), 1))
        for name, runtime in (("cpu-fp32", "openvino"), (NAME, "onnxruntime"))
    ]
    texts = [classifiers[0].encode(text) for text in ("good film", "bad", "a b c good bad film")]
    exact, reduced = (classifier.predict(texts) for classifier in classifiers)
    size = float(np.abs(exact).max())
    np.testing.assert_allclose(reduced, exact, rtol=0, atol=0.05 * size)
    assert not np.array_equal(reduced, exact)
    alone = np.concatenate([classifiers[1].predict([text]) for text in texts])
    np.testing.assert_array_equal(alone, reduced)
    assert classifiers[1].shapes.max_batch_size == 1  # A batch would only let texts wait.
