"""Effects are differences within pairs, and their sizes are what the textbooks say."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from tests.training.test_pairs import record
from training.effects import (
    Effect,
    detectable,
    deviation_interval,
    effect,
    holm,
    interval_half_width,
)
from training.pair_records import READ_OUT


def test_only_pairs_that_have_both_arms_count() -> None:
    records = [
        record("none", 1, 5.0),
        record("none", 2, 5.1),
        record("none", 3, 9.0),
        record("drbert", 1, 4.9),
        record("drbert", 2, 4.9),
        record("drbert", 4, 1.0),
    ]
    measured = effect(records, "drbert", "none", READ_OUT)
    assert measured.differences == pytest.approx((-0.1, -0.2))
    assert measured.interval[0] == pytest.approx(-0.15)
    assert effect(records, "mae", "none", READ_OUT).pairs == 0


def test_the_interval_and_the_p_value_are_students() -> None:
    differences = (0.3, 0.1, 0.25, 0.2, -0.05, 0.15)
    measured = Effect("drbert", "none", READ_OUT, differences)
    _, low, high = measured.interval
    assert (low, high) == pytest.approx(
        stats.t.interval(0.95, 5, np.mean(differences), stats.sem(differences))
    )
    assert measured.p_value == pytest.approx(stats.ttest_1samp(differences, 0).pvalue)
    assert measured.half_width == pytest.approx(interval_half_width(measured.deviation, 6))
    needed = measured.pairs_for(0.05)
    assert interval_half_width(measured.deviation, needed) <= 0.05
    assert interval_half_width(measured.deviation, needed - 1) > 0.05
    wide = Effect("drbert", "none", READ_OUT, (-9.0, 9.0, 0.5))
    assert interval_half_width(wide.deviation, wide.pairs_for(0.01)) <= 0.01
    single = Effect("drbert", "none", READ_OUT, (0.3,))
    assert single.p_value == 1.0
    assert math.isinf(single.half_width)
    with pytest.raises(ValueError, match="needs two pairs"):
        single.pairs_for(0.1)


def test_holms_adjustment_keeps_the_order_and_the_textbooks_numbers() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_a_detectable_difference_is_detected_with_that_power() -> None:
    difference = detectable(1.0, 12)
    assert difference == pytest.approx(0.89, abs=0.01)  # tables of the paired t-test: d = 0.89
    assert detectable(2.0, 12) == pytest.approx(2 * difference)
    assert detectable(1.0, 2) == pytest.approx(11.6, abs=0.1)
    assert detectable(1.0, 12, alpha=0.01) > difference
    rng = np.random.default_rng(0)
    samples = rng.normal(difference, 1.0, (4_000, 12))
    p_values = np.asarray(stats.ttest_1samp(samples, 0.0, axis=1).pvalue)
    assert np.mean(p_values < 0.05) == pytest.approx(0.8, abs=0.02)


def test_the_interval_of_a_deviation_is_chi_squares() -> None:
    low, high = deviation_interval(1.0, 6)
    assert (low, high) == pytest.approx((0.624, 2.453), abs=1e-3)
