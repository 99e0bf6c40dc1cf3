"""Sinkhorn's balance against its fixed point, and the estimate of a prior against a known one."""

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import softmax

from dpt_ray.learners.balance import estimate_prior, sinkhorn


@pytest.mark.parametrize("prior", [np.full(4, 1 / 4), np.array([0.1, 0.2, 0.3, 0.4])])
def test_sinkhorn_is_at_its_fixed_point(prior):
    scores = np.random.default_rng(0).random((60, 4)) + 0.01
    found = sinkhorn(scores.copy(), prior, iterations=500)
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-12)
    np.testing.assert_allclose(found.sum(axis=0), 60 * prior, atol=1e-9)
    # diag(u) P diag(v): the ratios of any 2 x 2 minor are those of P.
    log = np.log(found) - np.log(scores)
    np.testing.assert_allclose(log - log[:1], (log - log[:1])[:, :1].repeat(4, axis=1), atol=1e-9)


def test_sinkhorn_is_the_closest_balanced_matrix():
    """It minimises sum q log(q / p) under the sums: here against a general solver on the dual."""
    scores = np.random.default_rng(1).random((5, 3)) + 0.1
    prior = np.array([0.5, 0.3, 0.2])

    def dual(x):
        return (np.exp(x[:5, None] + x[None, 5:]) * scores).sum() - x[:5].sum() - 5 * prior @ x[5:]

    x = minimize(dual, np.zeros(8), method="BFGS", options={"gtol": 1e-10}).x
    wanted = np.exp(x[:5, None] + x[None, 5:]) * scores
    np.testing.assert_allclose(sinkhorn(scores.copy(), prior, iterations=500), wanted, atol=1e-6)


def test_a_row_without_any_score_stays_and_the_others_are_balanced():
    scores = np.random.default_rng(2).random((9, 3)).astype(np.float32)
    scores[4] = 0
    found = sinkhorn(scores, np.full(3, 1 / 3), iterations=300)
    assert found is scores and found.dtype == np.float32
    assert (found[4] == 0).all()
    np.testing.assert_allclose(found.sum(axis=0), 8 / 3, rtol=1e-4)


def test_rows_of_any_scale_are_balanced_alike():
    """Propagated scores fall by orders of magnitude from image to image, down to float32's smallest."""
    scores = np.random.default_rng(2).random((9, 3)).astype(np.float32)
    wanted = sinkhorn(scores.astype(np.float64), np.full(3, 1 / 3))
    scaled = scores.copy()
    scaled[4] *= np.float32(1e-40)
    scaled[5] *= np.float32(1e30)
    found = sinkhorn(scaled, np.full(3, 1 / 3))
    np.testing.assert_allclose(np.delete(found, 4, axis=0), np.delete(wanted, 4, axis=0), rtol=1e-4)
    np.testing.assert_allclose(found[4], wanted[4], rtol=1e-3)  # 17 bits are left of these


def test_rows_apart_with_too_few_images_for_their_class_leave_the_others_as_they_are():
    """A labelled image in a small part of the graph: no scaling gives its class its share."""
    rng = np.random.default_rng(0)
    scores = np.zeros((20_000, 4), np.float32)
    scores[:5, 3] = rng.random(5) + 0.1
    scores[5:, :3] = rng.random((19_995, 3))
    alone = sinkhorn(scores[5:, :3].copy(), np.full(3, 1 / 3))
    found = sinkhorn(scores.copy(), np.full(4, 1 / 4))
    assert (found[:5].argmax(axis=1) == 3).all()
    np.testing.assert_allclose(found[5:, :3], alone, atol=1e-6)


def test_a_class_that_flat_probabilities_leave_nothing_keeps_a_share():
    # A probe of one label of each class: nearly flat, and a little more of some classes everywhere.
    scores = np.random.default_rng(0).normal(np.linspace(0, 0.2, 10), 0.01, (500, 10))
    probabilities = softmax(scores, axis=1)
    found = estimate_prior(probabilities, np.full(10, 0.1))
    assert found.min() >= 1 / 510 and found.sum() == pytest.approx(1)
    assert found.max() > 0.3  # the most likely prior is far from uniform


def test_the_prior_is_found_from_calibrated_probabilities():
    rng = np.random.default_rng(0)
    true, trained_on, means = np.array([0.6, 0.3, 0.1]), np.full(3, 1 / 3), np.array([-1.5, 0.0, 1.5])
    x = rng.normal(means[rng.choice(3, 100_000, p=true)], 1)
    density = np.exp(-0.5 * (x[:, None] - means) ** 2) * trained_on
    found = estimate_prior(density / density.sum(axis=1, keepdims=True), trained_on)
    np.testing.assert_allclose(found, true, atol=0.01)
