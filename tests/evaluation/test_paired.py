import math

import numpy as np
import pytest
from scipy import stats

from dpt_ray.evaluation.paired import PairedGain, paired_gain


def table(y: np.ndarray) -> list[tuple[int, int, float]]:
    return [(s, d, float(y[s, d])) for s in range(y.shape[0]) for d in range(y.shape[1])]


def coverage(S: int, D: int, spread: tuple[float, float, float], *, crossed: bool) -> float:
    """How often the 95% interval holds the true gain 1, for (seed, draw, residual) spreads."""
    rng = np.random.default_rng(0)
    runs, hits = 1200, 0
    for _ in range(runs):
        draws = rng.normal(size=(1 if crossed else S, D))
        noise = spread[1] * draws + spread[2] * rng.normal(size=(S, D))
        y = 1 + spread[0] * rng.normal(size=(S, 1)) + noise
        low, high = paired_gain(table(y), crossed=crossed).interval()
        hits += low <= 1 <= high
    return hits / runs


def test_nested_standard_error_by_hand():
    # Seed means 2 and 4: variance 2, over 2 seeds. Between-seed mean square 4, over S D = 4.
    result = paired_gain([("a", 0, 1.0), ("a", 1, 3.0), ("b", 0, 4.0), ("b", 1, 4.0)], crossed=False)
    assert result == PairedGain(3.0, 1.0, 1.0, "encoder seeds", 2, 2, 4, 4)


def test_nested_agrees_with_one_way_analysis_of_variance():
    y = np.random.default_rng(3).normal(size=(4, 5)) + np.arange(4)[:, None]
    # F = MS_a / MS_e, and MS_e is the mean of the seeds' own variances.
    mean_square = stats.f_oneway(*y).statistic * y.var(axis=1, ddof=1).mean()
    result = paired_gain(table(y), crossed=False)
    assert result.stderr == pytest.approx(math.sqrt(mean_square / y.size))
    assert result.interval() == pytest.approx(stats.ttest_1samp(y.mean(axis=1), 0).confidence_interval(0.95))


def test_one_seed_falls_back_to_draws_and_says_so():
    gains = np.array([[0.5, -0.1, 0.4, 0.0]])
    for crossed in (False, True):
        result = paired_gain(table(gains), crossed=crossed)
        assert result.unit == "draws"
        assert result.stderr == pytest.approx(stats.sem(gains[0]))
        assert (result.degrees_of_freedom, result.encoder_seeds, result.draws) == (3.0, 1, 4)
        assert (result.positive, result.total) == (2, 4)


def test_one_draw_for_each_seed_varies_over_seeds():
    gains = np.array([[0.5], [-0.1], [0.4]])
    for crossed in (False, True):
        result = paired_gain(table(gains), crossed=crossed)
        assert result.unit == "encoder seeds"
        assert result.stderr == pytest.approx(stats.sem(gains[:, 0]))


def test_crossed_standard_error_by_hand():
    # Effects: seeds -3, 3; draws -1, 1; residual +-0.5. MS_a = 36, MS_b = 4, MS_e = 1, S D = 4.
    y = 10 + np.array([[-3], [3]]) + np.array([[-1, 1]]) + np.array([[0.5, -0.5], [-0.5, 0.5]])
    result = paired_gain(table(y), crossed=True)
    assert result.unit == "encoder seeds and draws"
    assert result.stderr == pytest.approx(math.sqrt((36 + 4 - 1) / 4))
    assert result.degrees_of_freedom == pytest.approx(39**2 / (36**2 + 4**2 + 1))


def test_crossed_component_below_zero_counts_as_zero():
    # As above with a residual of +-2, MS_e = 16 > MS_b = 4: the draws' component drops out.
    y = 10 + np.array([[-3], [3]]) + np.array([[-1, 1]]) + np.array([[2, -2], [-2, 2]])
    assert paired_gain(table(y), crossed=True).stderr == pytest.approx(math.sqrt(36 / 4))


def test_crossed_degrees_of_freedom_do_not_fall_below_the_rarer_factor():
    # MS_a = MS_b = 4.0804, MS_e = 4: Satterthwaite's formula alone gives 0.35.
    y = 1.01 * np.array([[-2, 0], [0, 2]]) + np.array([[1, -1], [-1, 1]])
    assert paired_gain(table(y), crossed=True).degrees_of_freedom == 1.0


def test_crossed_rows_in_any_order_mean_the_same():
    y = np.random.default_rng(0).normal(size=(3, 4))
    rows = table(y)
    expected = paired_gain(rows, crossed=True)
    shuffled = [rows[i] for i in np.random.default_rng(1).permutation(len(rows))]
    result = paired_gain(shuffled, crossed=True)
    assert result.stderr == pytest.approx(expected.stderr)
    assert result.mean == pytest.approx(y.mean())


@pytest.mark.parametrize("shape", [(2, 3), (5, 4)])
@pytest.mark.parametrize("spread", [(1.0, 0.0, 1.0), (0.0, 1.0, 1.0), (2.0, 0.1, 0.1)])
def test_nested_intervals_cover_the_true_gain(shape, spread):
    assert coverage(*shape, spread, crossed=False) == pytest.approx(0.95, abs=0.025)


@pytest.mark.parametrize("spread", [(1.0, 1.0, 1.0), (2.0, 0.2, 1.0), (0.2, 2.0, 1.0)])
def test_crossed_intervals_cover_the_true_gain_where_a_nested_model_would_not(spread):
    # Dropped components make the interval a little long, never much too short.
    assert 0.925 < coverage(5, 4, spread, crossed=True) < 0.99


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
    for crossed in (False, True):
        result = paired_gain(table(np.full((2, 3), 0.5)), crossed=crossed)
        assert (result.mean, result.stderr) == (0.5, 0.0)
        assert result.interval() == (0.5, 0.5)


def test_errors_name_the_row_and_the_remedy():
    with pytest.raises(ValueError, match="no gains"):
        paired_gain([], crossed=False)
    with pytest.raises(ValueError, match="add label draws or encoder seeds"):
        paired_gain([(0, 0, 1.0)], crossed=False)
    with pytest.raises(ValueError, match="'b' has 1 of 2 draws; run the missing"):
        paired_gain([("a", 0, 1.0), ("a", 1, 1.0), ("b", 0, 1.0)], crossed=False)
    with pytest.raises(ValueError, match="has 1 of 2 draws"):
        paired_gain([("a", 0, 1.0), ("b", 1, 1.0)], crossed=True)
    with pytest.raises(ValueError, match="occurs 2 times"):
        paired_gain([("a", 0, 1.0), ("a", 0, 2.0)], crossed=False)
    with pytest.raises(ValueError, match="'a', draw 1 is nan"):
        paired_gain([("a", 0, 1.0), ("a", 1, math.nan)], crossed=False)
