"""Metrics are GLUE's, and their intervals have the right width."""

from __future__ import annotations

import numpy as np
import pytest

from training.metrics import bootstrap_gain, compute_metrics, majority_label, paired_interval

LABELS = np.array([1, 1, 1, 0, 0, 1], float)
PREDICTIONS = np.array([1, 1, 0, 0, 1, 1], float)


def test_metrics_are_glues() -> None:
    metrics = compute_metrics(("accuracy", "f1", "matthews"), PREDICTIONS, LABELS)
    assert metrics == pytest.approx({"accuracy": 4 / 6, "f1": 0.75, "matthews": 0.25})
    scores = np.array([0.0, 1.0, 2.0, 3.0])
    assert compute_metrics(("pearson", "spearman"), scores**3, scores)["spearman"] == pytest.approx(
        1
    )
    assert compute_metrics(("pearson",), scores**3, scores)["pearson"] < 1


def test_constant_predictions_correlate_with_nothing() -> None:
    same = np.ones(4)
    assert compute_metrics(("pearson", "spearman", "matthews"), same, np.array([0, 1, 1, 0.0])) == {
        "pearson": 0.0,
        "spearman": 0.0,
        "matthews": 0.0,
    }


def test_the_majority_is_that_of_the_training_rows() -> None:
    assert majority_label(np.array([0, 0, 1.0])) == 0


def test_the_gain_over_the_majority_label_has_the_binomials_interval() -> None:
    rng = np.random.default_rng(1)
    labels = (rng.random(900) < 0.6).astype(float)
    right = rng.random(900) < 0.8
    low, high = bootstrap_gain("accuracy", np.where(right, labels, 1 - labels)[None], 1.0, labels)
    gains = right.astype(float) - labels
    half = 1.96 * gains.std() / 30
    assert (low, high) == pytest.approx((gains.mean() - half, gains.mean() + half), abs=0.008)


def test_predictions_by_chance_gain_nothing_over_the_majority_label() -> None:
    rng = np.random.default_rng(2)
    labels = (rng.random(400) < 0.5).astype(float)
    for name in ("matthews", "f1"):
        assert (
            bootstrap_gain(
                name, (rng.random((3, 400)) < 0.5).astype(float), 1.0, labels, draws=200
            )[0]
            < 0
        )


def test_paired_differences_have_students_interval() -> None:
    mean, low, high = paired_interval(np.array([0.01, 0.02, 0.03]))
    assert mean == pytest.approx(0.02)
    assert (high - low) / 2 == pytest.approx(4.3027 * 0.01 / np.sqrt(3), rel=1e-4)
    assert paired_interval(np.array([0.5])) == (0.5, -np.inf, np.inf)
