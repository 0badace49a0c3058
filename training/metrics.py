"""
How good answers are: GLUE's measures, and how sure one may be of them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from scipy import stats
from sklearn import metrics

Answers = npt.NDArray[np.float64]
"""(N) classes' numbers, or scores."""


def _accuracy(answers: Answers, labels: Answers) -> float:
    return float(np.mean(answers == labels))


def _f1(answers: Answers, labels: Answers) -> float:
    return float(metrics.f1_score(labels, answers, zero_division=0.0))


def _matthews(answers: Answers, labels: Answers) -> float:
    return float(metrics.matthews_corrcoef(labels, answers))


def _pearson(answers: Answers, labels: Answers) -> float:
    return 0.0 if answers.std() == 0 else float(stats.pearsonr(answers, labels).statistic)


def _spearman(answers: Answers, labels: Answers) -> float:
    return 0.0 if answers.std() == 0 else float(stats.spearmanr(answers, labels).statistic)


MEASURES: dict[str, Callable[[Answers, Answers], float]] = {
    "accuracy": _accuracy,
    "f1": _f1,
    "matthews": _matthews,
    "pearson": _pearson,
    "spearman": _spearman,
}
"""By name; each from answers (N) and labels (N). A correlation with answers that are all the same
is 0.
"""


def measure(names: tuple[str, ...], answers: Answers, labels: Answers) -> dict[str, float]:
    return {name: MEASURES[name](answers, labels) for name in names}


def majority(trained_on: Answers) -> float:
    """What was most frequent in training."""
    values, counts = np.unique(trained_on, return_counts=True)
    return float(values[counts.argmax()])


def above(
    name: str, answers: Answers, constant: float, labels: Answers, draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """How far a measure, as a mean over the runs in `answers` (R, N), is above that of always
    answering `constant`.

    95 % percentile bootstrap over examples, both sides on the same draw.
    """
    rng, found = np.random.default_rng(seed), []
    for _ in range(draws):
        chosen = rng.integers(0, len(labels), len(labels))
        drawn = labels[chosen]
        mean = np.mean([MEASURES[name](of_run[chosen], drawn) for of_run in answers])
        found.append(mean - MEASURES[name](np.full(len(drawn), constant), drawn))
    low, high = np.quantile(found, (0.025, 0.975))
    return float(low), float(high)


def paired(differences: Answers, level: float = 0.95) -> tuple[float, float, float]:
    """Mean and Student t interval of differences (R) between runs that share their seeds; the
    interval is infinite for R = 1.
    """
    mean = float(differences.mean())
    if len(differences) < 2:
        return mean, -np.inf, np.inf
    half = float(
        stats.t.ppf(0.5 + level / 2, len(differences) - 1)
        * differences.std(ddof=1)
        / np.sqrt(len(differences))
    )
    return mean, mean - half, mean + half
