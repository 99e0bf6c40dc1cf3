from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from scipy.special import softmax
from sklearn.datasets import make_classification
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss

from dpt_ray.learners.linear_classifier import logits, row_normalise
from dpt_ray.learners.linear_probe import fit

GOLDEN = Path(__file__).parents[1] / "data" / "logistic_regression.safetensors"


def generated(n=300, dim=24, classes=5, seed=0):
    X, y = make_classification(
        n, dim, n_informative=10, n_classes=classes, class_sep=0.7, flip_y=0.1, random_state=seed
    )
    return row_normalise(X.astype(np.float32)), y


def test_preprocessing_and_fit_agree_with_the_golden_vector():
    golden = load_file(GOLDEN)
    features = row_normalise(golden["raw"])
    np.testing.assert_allclose(features, golden["preprocessed"], atol=1e-6)
    found = fit(features, golden["y"], len(golden["W"].T))
    np.testing.assert_allclose(logits(features, found.weights), golden["decision"], atol=1e-2)
    penalty = 0.0025 / len(features) / 2 * np.square(golden["W"]).sum()
    reference = log_loss(golden["y"], softmax(golden["decision"], axis=1)) + penalty
    assert found.objective == pytest.approx(reference, rel=1e-5)


@pytest.mark.parametrize("balanced", [False, True])
def test_weighted_fit_has_scikit_learns_optimum(balanced):
    X, y = generated()
    weights = np.where(np.arange(len(y)) < 50, 5.0 if balanced else 1.0, 1.0).astype(np.float32)
    found = fit(X, y, 5, weights=weights, l2=0.05)
    # scikit-learn minimises C sum w CE + ||W||^2 / 2.
    penalty = 0.05 / len(y)
    reference = LogisticRegression(
        C=1 / (penalty * weights.sum()), fit_intercept=False, tol=1e-10, max_iter=10_000
    ).fit(X.astype(np.float64), y, sample_weight=weights)
    np.testing.assert_allclose(found.weights, reference.coef_, atol=2e-3, rtol=1e-3)


def test_paper_setting_is_scikit_learns_c_400():
    X, y = generated(seed=1)
    reference = LogisticRegression(C=400, fit_intercept=False, tol=1e-10, max_iter=10_000)
    reference.fit(X.astype(np.float64), y)
    found = fit(X, y, 5)
    np.testing.assert_allclose(logits(X, found.weights), reference.decision_function(X), atol=1e-2)


def test_iteration_cap_stops_early():
    X, y = generated()
    assert fit(X, y, 5, max_iterations=3).iterations == 3
    assert fit(X, y, 5, max_iterations=3).objective > fit(X, y, 5).objective


def test_labels_out_of_range_are_refused():
    X, y = generated()
    with pytest.raises(ValueError, match=r"0\.\.3"):
        fit(X, y, 4)
