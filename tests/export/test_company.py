"""A text's answer is its own: alone, beside others of its length, beside longer ones; in every
variant.
"""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from export.checks.verify import engine_here
from export.commands import export
from export.graph.variants import RECIPES
from service.answers import softmax
from service.artifact import Artifact, read_artifact
from service.classifier import Classifier
from service.host import cpus
from service.runtimes import RuntimeUnavailable
from service.runtimes.auto import load

pytestmark = pytest.mark.filterwarnings(
    "ignore"
)  # torch's tracer warns of what verification checks

# How far a probability may move by what else is in the batch; docs/performance.md tells them.
TOLERANCES = {
    "cpu-fp32": 1e-6,
    "cpu-bf16": 1e-3,
    "cpu-int8": 1e-3,
    "cuda-fp16": 1e-3,
    "tensorrt-fp16": 1e-3,
}
SENTENCES = Path("examples/texts/sentences.txt").read_text().splitlines()[:40]


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("artifacts") / "bert"
    export("examples/checkpoints/bert-mini-sst2", folder, variants=tuple(RECIPES))
    return read_artifact(folder)


# OpenVINO computes in bf16 on processors that have instructions for it, and on others not at all.
RUN_HERE = [
    variant for variant in TOLERANCES if variant != "cpu-bf16" or "bf16" in cpus.native_precisions()
]


def test_a_precision_that_this_processor_lacks_is_refused_and_not_replaced(twin: Artifact) -> None:
    for variant in TOLERANCES.keys() - set(RUN_HERE):
        with pytest.raises(
            RuntimeUnavailable,
            match=r"was asked for bf16 and took f32|cannot run model-bf16\.xml in bf16 on this CPU",
        ):
            load(twin, engine_here(twin, variant), 2)
        gate = twin.manifest.variants[variant].gate
        assert gate.status == "emulated"
        assert "by torch's arithmetic in bf16" in gate.reason
        assert twin.manifest.variants[variant].self_check is not None


@pytest.mark.parametrize("variant", RUN_HERE)
def test_an_answer_does_not_depend_on_its_company(twin: Artifact, variant: str) -> None:
    classifier = Classifier(twin, load(twin, engine_here(twin, variant), 2))
    texts = [classifier.encode(text) for text in SENTENCES]
    alone = np.array([softmax(classifier.predict([text])[0].tolist()) for text in texts])
    places, worst = list(range(len(texts))), 0.0
    for seed in range(3):
        random.Random(seed).shuffle(places)
        for start in range(0, len(places), 8):
            some = places[start : start + 8]
            together = [
                softmax(row.tolist())
                for row in classifier.predict([texts[place] for place in some])
            ]
            worst = max(worst, float(np.abs(np.array(together) - alone[some]).max()))
    assert worst <= TOLERANCES[variant], f"{variant}: {worst:.1e}"


@pytest.mark.parametrize("variant", [variant for variant in RUN_HERE if variant.startswith("cpu")])
def test_texts_that_share_rows_are_answered_as_those_with_a_row_each(
    twin: Artifact, variant: str
) -> None:
    choice = engine_here(twin, variant)
    sharing = Classifier(twin, load(twin, choice, 2))
    assert sharing.packing is not None
    texts = [sharing.encode(text) for text in SENTENCES[:24]]
    layout = sharing.packing.lay_out([text.tokens for text in texts])
    assert 1 < len(layout.rows) < len(texts)
    length = max(text.tokens for text in texts)
    padded = {
        name: np.zeros((len(texts), length), np.int64)
        for name in ("input_ids", "attention_mask", "token_type_ids")
    }
    for row, text in enumerate(texts):
        padded["input_ids"][row, : text.tokens] = text.ids
        padded["attention_mask"][row, : text.tokens] = 1
    a_row_each = sharing.runtime.start(padded)()
    difference = np.abs(
        [softmax(row) for row in sharing.predict(texts).tolist()]
        - np.array([softmax(row) for row in a_row_each.tolist()])
    ).max()
    assert difference <= TOLERANCES[variant]


def test_every_variant_has_a_tolerance() -> None:
    assert TOLERANCES.keys() == RECIPES.keys()
