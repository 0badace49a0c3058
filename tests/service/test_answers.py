"""Classifications from logits."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from service.answers import classification, sigmoid, softmax
from service.artifact import Artifact, Manifest
from service.classifier import Encoded
from service.schemas import Activation
from tests.factories import write_artifact

TEXT = Encoded([2, 4, 3], [0, 0, 0], truncated=False)


def test_softmax_and_sigmoid_do_not_overflow() -> None:
    assert softmax([-3e38, 0.0, 3e38]) == [0.0, 0.0, 1.0]
    assert [sigmoid(value) for value in (-3e38, 0.0, 3e38)] == [0.0, 0.5, 1.0]
    assert softmax([-1e4, -2e4]) == [1.0, 0.0]


def test_the_larger_logit_is_first_where_both_probabilities_round_to_one(tmp_path: Path) -> None:
    several = write_artifact(tmp_path / "several", task="multi_label").manifest
    single = write_artifact(tmp_path / "single").manifest
    cases: list[tuple[Manifest, Activation]] = [
        (several, "auto"),
        (single, "sigmoid"),
        (single, "none"),
    ]
    for manifest, activation in cases:
        answer = classification(0, np.array([40.0, 60.0], np.float32), TEXT, manifest, activation)
        assert answer["label"] == "POSITIVE"
        assert [score["label"] for score in answer["scores"]] == ["POSITIVE", "NEGATIVE"]
    assert classification(0, np.array([40.0, 60.0], np.float32), TEXT, several)["labels"] == [
        "POSITIVE",
        "NEGATIVE",
    ]


def test_labels_of_one_score_keep_the_models_order(artifact: Artifact) -> None:
    answer = classification(0, np.array([1.0, 1.0], np.float32), TEXT, artifact.manifest)
    assert answer["label"] == "NEGATIVE"
    assert [score["label"] for score in answer["scores"]] == ["NEGATIVE", "POSITIVE"]
    assert answer["probs"] == [0.5, 0.5]
