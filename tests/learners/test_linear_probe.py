import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from scipy.special import softmax
from sklearn.datasets import make_classification
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from torch.nn.functional import cross_entropy

from dpt_ray.data.rows import Rows, row_normalise
from dpt_ray.learners import linear_probe
from dpt_ray.learners.linear_classifier import logits
from dpt_ray.learners.linear_probe import fit, fit_stage
from tests.helpers.paths import GOLDEN


def generated(n=300, dim=24, classes=5, seed=0):
    X, y = make_classification(
        n, dim, n_informative=10, n_classes=classes, class_sep=0.7, flip_y=0.1, random_state=seed
    )
    return row_normalise(X.astype(np.float32)), y


def test_preprocessing_and_fit_agree_with_the_golden_vector():
    golden = load_file(GOLDEN / "logistic_regression.safetensors")
    features = row_normalise(golden["raw"])
    np.testing.assert_allclose(features, golden["preprocessed"], atol=1e-6)
    found = fit([Rows(features, golden["y"])], len(golden["W"].T))
    np.testing.assert_allclose(logits(features, found.weights), golden["decision"], atol=1e-2)
    penalty = 0.0025 / len(features) / 2 * np.square(golden["W"]).sum()
    reference = log_loss(golden["y"], softmax(golden["decision"], axis=1)) + penalty
    assert found.objective == pytest.approx(reference, rel=1e-5)


@pytest.mark.parametrize(("given", "weight"), [(3.0, 3.0), (1.0, 1.0), ("balanced", 260 / 40)])
def test_stage_3_weighs_the_labelled_rows_as_scikit_learns_samples(given, weight):
    X, y = generated()
    found = fit_stage(Rows(X[:40], y[:40]), Rows(X[40:], y[40:]), given, 5, l2=0.05)
    weights = np.r_[[weight] * 40, np.ones(260)]
    reference = LogisticRegression(
        C=1 / (0.05 / len(y) * weights.sum()), fit_intercept=False, tol=1e-10, max_iter=10_000
    ).fit(X.astype(np.float64), y, sample_weight=weights)
    wanted = reference.coef_ - reference.coef_.mean(axis=0)
    np.testing.assert_allclose(found.weights - found.weights.mean(axis=0), wanted, atol=1e-2)


@pytest.mark.parametrize("weight", [1.0, 5.0])
def test_weighted_fit_has_scikit_learns_optimum(weight):
    X, y = generated()
    weights = np.where(np.arange(len(y)) < 50, weight, 1.0)
    found = fit([Rows(X[:50], y[:50], weight=weight), Rows(X[50:], y[50:])], 5, l2=0.05)
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
    found = fit([Rows(X, y)], 5)
    np.testing.assert_allclose(logits(X, found.weights), reference.decision_function(X), atol=1e-2)


def test_selected_rows_of_shared_features_fit_as_their_concatenation_does():
    X, y = generated()
    rng = np.random.default_rng(0)
    few, many = rng.permutation(300)[:40].astype(np.int32), rng.permutation(300)[:200]
    blocks = [Rows(X, y[few], few, weight=3.0), Rows(X, y[many], many)]
    # A row of weight 3 is three rows of weight 1; the penalty is lambda = l2 / n.
    rows = np.concatenate([few, few, few, many])
    found = fit(blocks, 5, l2=0.05)
    expected = fit([Rows(X[rows], y[rows])], 5, l2=0.05 * len(rows) / 240)
    assert found.objective == pytest.approx(expected.objective, rel=1e-9)
    np.testing.assert_allclose(found.weights, expected.weights, rtol=1e-3, atol=1e-3)


def test_objective_and_gradient_do_not_depend_on_the_chunks(monkeypatch):
    X, y = generated()
    W = torch.randn(5, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = cross_entropy(torch.from_numpy(X).double() @ W.T, torch.from_numpy(y))
    loss = loss + 0.1 / 300 / 2 * W.square().sum()
    loss.backward()
    monkeypatch.setattr(linear_probe, "CHUNK_BYTES", 8 * (24 + 2 * 5) * 7)  # 7 rows
    problem = linear_probe.problem_of([Rows(X, y)], 5, 0.1, torch.device("cpu"))
    on_device = [part.moved(problem.chunk, torch.device("cpu")) for part in problem.parts]
    for parts in (problem.parts, on_device):
        cut = linear_probe.Problem(parts, problem.chunk, problem.penalty)
        value, gradient = cut.objective_and_gradient(W.detach())
        torch.testing.assert_close(value, loss.detach())
        torch.testing.assert_close(gradient, W.grad)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("free", [0, 2**40], ids=["streamed", "resident"])
def test_gpu_finds_the_optimum_of_the_cpu(free, monkeypatch):
    X, y = generated()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, free))
    rows = np.arange(0, 300, 2)
    blocks = [Rows(X, y), Rows(X, y[rows], rows, weight=2.0)]
    found, expected = fit(blocks, 5, device="cuda"), fit(blocks, 5, device="cpu")
    np.testing.assert_allclose(logits(X, found.weights), logits(X, expected.weights), atol=1e-2)


MEMORY = r"""
import json, re
import numpy as np
import torch
from dpt_ray.data.rows import Rows, row_normalise
from dpt_ray.learners.linear_probe import CHUNK_BYTES, fit

def peak():
    # Not ru_maxrss, which begins with that of the process that started this one.
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1])

torch.set_num_threads(1)
rng = np.random.default_rng(0)
n, dim = 100_000, 512
fit([Rows(np.ones((8, dim), np.float32), np.arange(8))], 8, max_iterations=1, device="cpu")
matrix = np.empty((n, dim), np.float32)
for part in np.split(matrix, 20):
    rng.standard_normal(out=part, dtype=np.float32)
rows, labels = rng.permutation(n), rng.integers(8, size=n)
before = peak()
row_normalise(matrix, out=matrix)
blocks = [Rows(matrix[:n // 2], labels[:n // 2], weight=2.0), Rows(matrix, labels, rows)]
fit(blocks, 8, max_iterations=1, device="cpu")
print(json.dumps({"grown": peak() - before, "chunk": CHUNK_BYTES, "features": matrix.nbytes}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_fit_takes_no_memory_beyond_the_features_and_a_few_chunks():
    # What is freed goes back at once: else the peak has what the allocator happens to keep, too.
    returned = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", MEMORY]
    run = subprocess.run(command, env=returned, capture_output=True, text=True, check=True)
    found = json.loads(run.stdout)
    assert found["features"] > 200e6
    assert found["grown"] < 4 * found["chunk"] < found["features"]


def test_iteration_cap_stops_early():
    X, y = generated()
    few = fit([Rows(X, y)], 5, max_iterations=3)
    assert few.iterations == 3
    assert few.objective > fit([Rows(X, y)], 5).objective


def test_labels_out_of_range_are_refused():
    X, y = generated()
    with pytest.raises(ValueError, match=r"0\.\.3"):
        fit([Rows(X, y)], 4)


def test_labels_that_are_not_one_a_row_are_refused():
    X, y = generated()
    with pytest.raises(ValueError, match="one per row"):
        fit([Rows(X, y, np.arange(5))], 5)


def test_weight_that_is_not_positive_is_refused():
    X, y = generated()
    with pytest.raises(ValueError, match="positive, not 0"):
        fit([Rows(X, y), Rows(X, y, weight=0)], 5)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_row_that_is_not_finite_is_named_and_no_classifier_comes_of_it(value, monkeypatch):
    X, y = generated()
    X[130, 3] = value
    index = np.arange(100, 150)
    monkeypatch.setattr(linear_probe, "CHUNK_BYTES", 8 * (24 + 2 * 5) * 7)  # 7 rows
    with pytest.raises(ValueError, match=r"row 130 of block 1 is not finite.*precision=float32"):
        fit([Rows(X[:100], y[:100]), Rows(X, y[index], index)], 5, device="cpu")
    fit([Rows(X[:100], y[:100]), Rows(X, y[200:], np.arange(200, 300))], 5, device="cpu")


def test_features_too_large_for_a_finite_objective_are_refused():
    X, y = generated()
    with pytest.raises(ValueError, match="objective is not finite"):
        fit([Rows(X.astype(np.float64) * 1e305, y)], 5, device="cpu")


def test_rows_are_normalised_in_place_as_in_a_copy():
    raw = np.random.default_rng(0).normal(3, 2, (9000, 6)).astype(np.float32)
    centred = raw.astype(np.float64) - raw.mean(1, keepdims=True, dtype=np.float64)
    expected = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    np.testing.assert_allclose(row_normalise(raw), expected, atol=1e-6)
    assert row_normalise(raw, out=raw) is raw
    np.testing.assert_allclose(raw, expected, atol=1e-6)
