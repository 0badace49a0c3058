"""
GLUE's metrics, and confidence intervals for them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from scipy import stats
from sklearn import metrics

Predictions = npt.NDArray[np.float64]
"""Class numbers or scores, (N)."""


def _accuracy(predictions: Predictions, labels: Predictions) -> float:
    return float(np.mean(predictions == labels))


def _f1(predictions: Predictions, labels: Predictions) -> float:
    return float(metrics.f1_score(labels, predictions, zero_division=0.0))


def _matthews(predictions: Predictions, labels: Predictions) -> float:
    return float(metrics.matthews_corrcoef(labels, predictions))


def _pearson(predictions: Predictions, labels: Predictions) -> float:
    if predictions.std() == 0:
        return 0.0
    return float(stats.pearsonr(predictions, labels).statistic)


def _spearman(predictions: Predictions, labels: Predictions) -> float:
    if predictions.std() == 0:
        return 0.0
    return float(stats.spearmanr(predictions, labels).statistic)


METRICS: dict[str, Callable[[Predictions, Predictions], float]] = {
    "accuracy": _accuracy,
    "f1": _f1,
    "matthews": _matthews,
    "pearson": _pearson,
    "spearman": _spearman,
}
"""Metrics by name, each of predictions (N) and labels (N). A correlation with constant predictions
is 0.
"""


def compute_metrics(
    names: tuple[str, ...], predictions: Predictions, labels: Predictions
) -> dict[str, float]:
    """Return the named metrics of predictions (N) against labels (N)."""
    return {name: METRICS[name](predictions, labels) for name in names}


def majority_label(training_labels: Predictions) -> float:
    """Return the most frequent label of the training set."""
    values, counts = np.unique(training_labels, return_counts=True)
    return float(values[counts.argmax()])


def bootstrap_gain(
    name: str,
    predictions: Predictions,
    constant: float,
    labels: Predictions,
    draws: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Return the 95 % interval of a metric's gain over always predicting `constant`.

    The metric is the mean over the runs in `predictions` (R, N). The interval is a percentile
    bootstrap over examples; each draw is used for both sides.
    """
    rng = np.random.default_rng(seed)
    metric = METRICS[name]
    gains = []
    for _ in range(draws):
        sample = rng.integers(0, len(labels), len(labels))
        sampled_labels = labels[sample]
        mean = np.mean([metric(of_run[sample], sampled_labels) for of_run in predictions])
        baseline = metric(np.full(len(sampled_labels), constant), sampled_labels)
        gains.append(mean - baseline)
    low, high = np.quantile(gains, (0.025, 0.975))
    return float(low), float(high)


def paired_interval(differences: Predictions, level: float = 0.95) -> tuple[float, float, float]:
    """Return mean and Student's t interval of differences (R) between runs that share their seeds.

    The interval is infinite for R = 1.
    """
    mean = float(differences.mean())
    if len(differences) < 2:
        return mean, -np.inf, np.inf
    quantile = stats.t.ppf(0.5 + level / 2, len(differences) - 1)
    half = float(quantile * differences.std(ddof=1) / np.sqrt(len(differences)))
    return mean, mean - half, mean + half
