"""A text's answer does not depend on the rest of its batch, in every variant."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from export.checks.verify import select_engine
from export.graph.variants import RECIPES
from export.pipeline import export
from service.answers import softmax
from service.artifact import Artifact, read_artifact
from service.classifier import Classifier
from service.host import cpus
from service.runtimes import RuntimeUnavailable
from service.runtimes.auto import load

pytestmark = pytest.mark.filterwarnings(
    "ignore"
)  # torch's tracer warns of what verification checks

# Largest change of a probability by the rest of the batch; docs/performance.md states them.
TOLERANCES = {
    "cpu-fp32": 1e-6,
    "cpu-bf16": 1e-3,
    "cpu-int8": 1e-3,
    "cpu-int8-ort": 0.0,
    "cuda-fp16": 1e-3,
    "tensorrt-fp16": 1e-3,
}
SENTENCES = Path("examples/texts/sentences.txt").read_text().splitlines()[:40]


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("artifacts") / "bert"
    export("examples/checkpoints/bert-mini-sst2", folder, variants=tuple(RECIPES))
    return read_artifact(folder)


# OpenVINO computes in bf16 only on processors that have instructions for it.
RUN_HERE = [
    variant for variant in TOLERANCES if variant != "cpu-bf16" or "bf16" in cpus.native_precisions()
]


def test_a_precision_that_this_processor_lacks_is_refused_and_not_replaced(twin: Artifact) -> None:
    for variant in TOLERANCES.keys() - set(RUN_HERE):
        with pytest.raises(
            RuntimeUnavailable,
            match=r"was asked for bf16 and took f32|cannot run model-bf16\.xml in bf16 on this CPU",
        ):
            load(twin, select_engine(twin, variant), 2)
        gate = twin.manifest.variants[variant].gate
        assert gate.status == "emulated"
        assert "emulated in bf16 by torch" in gate.reason
        assert twin.manifest.variants[variant].self_check is not None


@pytest.mark.parametrize("variant", RUN_HERE)
def test_an_answer_does_not_depend_on_its_batch(twin: Artifact, variant: str) -> None:
    classifier = Classifier(twin, load(twin, select_engine(twin, variant), 2))
    texts = [classifier.encode(text) for text in SENTENCES]
    alone = np.array([softmax(classifier.predict([text])[0].tolist()) for text in texts])
    order = list(range(len(texts)))
    worst = 0.0
    for seed in range(3):
        random.Random(seed).shuffle(order)
        for start in range(0, len(order), 8):
            batch = order[start : start + 8]
            logits = classifier.predict([texts[index] for index in batch])
            batched = np.array([softmax(row.tolist()) for row in logits])
            worst = max(worst, float(np.abs(batched - alone[batch]).max()))
    assert worst <= TOLERANCES[variant], f"{variant}: {worst:.1e}"


@pytest.mark.parametrize(
    "variant", [variant for variant in RUN_HERE if RECIPES[variant].runtime == "openvino"]
)
def test_packed_texts_are_answered_as_unpacked_ones(twin: Artifact, variant: str) -> None:
    choice = select_engine(twin, variant)
    packing = Classifier(twin, load(twin, choice, 2))
    assert packing.packing is not None
    texts = [packing.encode(text) for text in SENTENCES[:24]]
    layout = packing.packing.lay_out([text.tokens for text in texts])
    assert 1 < len(layout.rows) < len(texts)
    length = max(text.tokens for text in texts)
    padded = {
        name: np.zeros((len(texts), length), np.int64)
        for name in ("input_ids", "attention_mask", "token_type_ids")
    }
    for row, text in enumerate(texts):
        padded["input_ids"][row, : text.tokens] = text.ids
        padded["attention_mask"][row, : text.tokens] = 1
    unpacked = [softmax(row) for row in packing.runtime.start(padded)().tolist()]
    packed = [softmax(row) for row in packing.predict(texts).tolist()]
    assert np.abs(np.array(packed) - np.array(unpacked)).max() <= TOLERANCES[variant]


def test_every_variant_has_a_tolerance() -> None:
    assert TOLERANCES.keys() == RECIPES.keys()
