"""Label propagation against a dense solution."""

import numpy as np
import pytest
import scipy.sparse as sp
from scipy.sparse.linalg import splu

from dpt_ray.learners import propagation
from dpt_ray.learners.propagation import ALPHA, affinity, propagate

N, K, C = 60, 5, 3


def graph(seed=0):
    rng = np.random.default_rng(seed)
    neighbours = np.stack([rng.choice(np.delete(np.arange(N), i), K, replace=False) for i in range(N)])
    return neighbours, rng.uniform(-0.2, 1, (N, K)).astype(np.float32)


def dense(neighbours, cosines):
    A = np.zeros((N, N))
    for i in range(N):
        for j, cosine in zip(neighbours[i], cosines[i], strict=True):
            A[i, j] = max(0.0, cosine) ** 3
    W = A + A.T
    d = 1 / np.sqrt(W.sum(axis=1))
    return d[:, None] * W * d


def test_the_affinity_is_the_papers():
    neighbours, cosines = graph()
    S = affinity(neighbours, cosines)
    np.testing.assert_allclose(S.toarray(), dense(neighbours, cosines), atol=1e-6)
    assert S.dtype == np.float32


@pytest.mark.parametrize("columns", [1, 2, 16])
def test_the_scores_are_those_of_a_dense_solution(columns, monkeypatch):
    monkeypatch.setattr(propagation, "COLUMNS", columns)
    neighbours, cosines = graph()
    positions, labels = np.array([3, 10, 20, 31, 40]), np.array([0, 1, 2, 0, 1])
    Y = np.zeros((N, C))
    Y[positions, labels] = 1
    wanted = np.linalg.solve(np.eye(N) - ALPHA * dense(neighbours, cosines), (1 - ALPHA) * Y)
    found = propagate(affinity(neighbours, cosines), positions, labels, C, tolerance=1e-6)
    np.testing.assert_allclose(found, wanted, atol=2e-6)


def test_an_image_without_a_similar_one_has_no_scores():
    neighbours, cosines = graph()
    cosines[7] = cosines[neighbours == 7] = -1
    found = propagate(affinity(neighbours, cosines), np.arange(3), np.arange(3), C)
    assert (found[7] == 0).all() and (np.delete(found, 7, axis=0) > 0).all()


def test_a_class_without_a_label_is_named():
    with pytest.raises(ValueError, match=r"every class: \[1\] have none"):
        propagate(affinity(*graph()), np.array([0, 1]), np.array([0, 2]), C)


def test_a_long_thin_graph_is_reached_to_its_end():
    """Frames of a film: each is like the few before and after, and a label is hundreds of steps away."""
    n, each = 1200, 4
    steps = np.array([-2, -1, 1, 2])
    neighbours = np.clip(np.arange(n)[:, None] + steps, 0, n - 1)
    neighbours[neighbours == np.arange(n)[:, None]] = 1  # at the ends
    S = affinity(neighbours, np.ones((n, each), np.float32))
    positions = np.array([150, 450, 750, 1050])
    labels = np.arange(4)
    found = propagate(S, positions, labels, 4)
    assert found.any(axis=1).all()
    Y = np.zeros((n, 4))
    Y[positions, labels] = 1 - ALPHA
    wanted = splu(sp.csc_array(sp.eye_array(n) - ALPHA * S.astype(np.float64))).solve(Y)
    assert (found.argmax(axis=1) == wanted.argmax(axis=1)).mean() > 0.99
