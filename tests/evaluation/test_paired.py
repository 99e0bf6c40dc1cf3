import math

import numpy as np
import pytest
from scipy import stats

from dpt_ray.evaluation.paired import PairedGain, half_interval, paired_gain


def table(y: np.ndarray) -> list[tuple[int, int, float]]:
    return [(s, d, float(y[s, d])) for s in range(y.shape[0]) for d in range(y.shape[1])]


def interval(gain: PairedGain) -> tuple[float, float]:
    half = gain.stderr * half_interval(gain.degrees_of_freedom)
    return gain.mean - half, gain.mean + half


def coverage(S: int, D: int, spread: tuple[float, float]) -> float:
    """How often the 95% interval holds the true gain 1, for spreads of seeds and of draws in a seed."""
    rng = np.random.default_rng(0)
    runs, hits = 1200, 0
    for _ in range(runs):
        y = 1 + spread[0] * rng.normal(size=(S, 1)) + spread[1] * rng.normal(size=(S, D))
        low, high = interval(paired_gain(table(y)))
        hits += low <= 1 <= high
    return hits / runs


def test_nested_standard_error_by_hand():
    # Seed means 2 and 4: variance 2, over 2 seeds. Between-seed mean square 4, over S D = 4.
    result = paired_gain([("a", 0, 1.0), ("a", 1, 3.0), ("b", 0, 4.0), ("b", 1, 4.0)])
    assert result == PairedGain(3.0, 1.0, 1, 4, 4)


def test_nested_agrees_with_one_way_analysis_of_variance():
    y = np.random.default_rng(3).normal(size=(4, 5)) + np.arange(4)[:, None]
    # F = MS_a / MS_e, and MS_e is the mean of the seeds' own variances.
    mean_square = stats.f_oneway(*y).statistic * y.var(axis=1, ddof=1).mean()
    result = paired_gain(table(y))
    assert result.stderr == pytest.approx(math.sqrt(mean_square / y.size))
    assert interval(result) == pytest.approx(stats.ttest_1samp(y.mean(axis=1), 0).confidence_interval(0.95))


def test_one_seed_falls_back_to_draws():
    gains = np.array([[0.5, -0.1, 0.4, 0.0]])
    result = paired_gain(table(gains))
    assert result.stderr == pytest.approx(stats.sem(gains[0]))
    assert (result.degrees_of_freedom, result.positive, result.total) == (3, 2, 4)


def test_one_draw_for_each_seed_varies_over_seeds():
    gains = np.array([[0.5], [-0.1], [0.4]])
    result = paired_gain(table(gains))
    assert result.stderr == pytest.approx(stats.sem(gains[:, 0]))
    assert result.degrees_of_freedom == 2


def test_one_gain_has_no_standard_error():
    assert paired_gain([(0, 0, 0.25)]) == PairedGain(0.25, None, 0, 1, 1)


@pytest.mark.parametrize(("degrees_of_freedom", "half"), [(1, 12.706), (2, 4.303), (14, 2.145)])
def test_half_intervals_are_those_of_the_printed_t_table(degrees_of_freedom, half):
    assert half_interval(degrees_of_freedom) == pytest.approx(half, abs=5e-4)


@pytest.mark.parametrize("shape", [(2, 3), (5, 4)])
@pytest.mark.parametrize("spread", [(1.0, 1.0), (0.0, 1.0), (2.0, 0.1)])
def test_intervals_cover_the_true_gain(shape, spread):
    assert coverage(*shape, spread) == pytest.approx(0.95, abs=0.025)


def test_pooling_all_gains_would_undercover():
    # What the formula is for: the plain standard error of S D gains misses the true gain often.
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(500):
        y = 1 + rng.normal(size=(5, 1)) + 0.3 * rng.normal(size=(5, 10))
        low, high = stats.ttest_1samp(y.ravel(), 0).confidence_interval(0.95)
        hits += low <= 1 <= high
    assert hits / 500 < 0.7


def test_identical_gains_have_no_spread():
    result = paired_gain(table(np.full((2, 3), 0.5)))
    assert (result.mean, result.stderr) == (0.5, 0.0)


def test_errors_name_the_row_and_the_remedy():
    with pytest.raises(ValueError, match="no gains"):
        paired_gain([])
    with pytest.raises(ValueError, match="'b' has 1 of 2 draws; run the missing"):
        paired_gain([("a", 0, 1.0), ("a", 1, 1.0), ("b", 0, 1.0)])
    with pytest.raises(ValueError, match="occurs 2 times"):
        paired_gain([("a", 0, 1.0), ("a", 0, 2.0)])
    with pytest.raises(ValueError, match="'a', draw 1 is nan"):
        paired_gain([("a", 0, 1.0), ("a", 1, math.nan)])
