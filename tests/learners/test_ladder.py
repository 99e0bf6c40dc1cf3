"""The rungs of the ladder: weights against scikit-learn, what is chosen on, and what balance does."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from dpt_ray.data.rows import Rows, row_normalise
from dpt_ray.learners import ladder
from dpt_ray.learners.balance import estimate_prior
from dpt_ray.learners.ladder import (
    GENERATED_SHARES,
    SHARES,
    Images,
    Rung,
    _best,
    class_prior,
    climb,
    folds,
    from_generated,
)
from dpt_ray.learners.linear_probe import fit, fit_stage
from dpt_ray.learners.neighbours import centre_and_normalise, nearest
from dpt_ray.learners.propagation import affinity
from dpt_ray.learners.self_training import MOST_ITERATIONS, class_blocks, self_train

C, N, DIM = 3, 120, 6


@pytest.fixture(autouse=True)
def one_thread():
    """Problems this small only wait for further threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def images(per_class=2, graph=False, seed=0):
    """Clusters of unequal sizes, of which each class has the same number of labels."""
    rng = np.random.default_rng(seed)
    truth = np.repeat(np.arange(C), (70, 30, 20))
    raw = (rng.normal(0, 1, (C, DIM))[truth] * 1.5 + rng.normal(0, 0.7, (N, DIM))).astype(np.float32)
    positions = np.concatenate([np.flatnonzero(truth == c)[:per_class] for c in range(C)])
    S = None
    if graph:
        found = nearest(torch.from_numpy(centre_and_normalise(raw.copy())), 0, N, 8)
        S = affinity(*(values.numpy() for values in found))
    return Images(row_normalise(raw), np.arange(N), positions, truth[positions], C, S), truth


def test_the_weighted_fit_is_scikit_learns_with_weighted_samples():
    found, truth = images()
    prior = np.array([0.2, 0.3, 0.5])
    none = (np.array([], np.int64), np.array([], np.int64))
    W = self_train(found.matrix, found.train, truth, none, C, l2=5.0, prior=prior)
    weight = N * prior[truth] / np.bincount(truth)[truth]
    # sum_i w_i CE_i / sum w + (l2 / n) / 2 ||W||^2 times n / l2 is scikit-learn's with C = 1 / l2.
    sklearn = LogisticRegression(C=1 / 5.0, fit_intercept=False, tol=1e-10, max_iter=10_000)
    sklearn.fit(found.matrix.astype(np.float64), truth, weight)
    np.testing.assert_allclose(W - W.mean(axis=0), sklearn.coef_ - sklearn.coef_.mean(axis=0), atol=1e-3)


def test_the_classes_weigh_what_the_prior_says_and_none_is_plain():
    found, truth = images()
    prior = np.array([0.5, 0.25, 0.25])
    weights = [len(rows) * rows.weight for rows in class_blocks(found.matrix, found.train, truth, prior)]
    np.testing.assert_allclose(weights, N * prior)
    assert {rows.weight for rows in class_blocks(found.matrix, found.train, truth, None)} == {1.0}


def test_known_labels_stay_what_they_are(monkeypatch):
    found, truth = images()
    seen = []
    monkeypatch.setattr(
        "dpt_ray.learners.self_training.class_blocks",
        lambda matrix, rows, labels, prior: seen.append(labels) or class_blocks(matrix, rows, labels, prior),
    )
    wrong = (truth + 1) % C
    self_train(
        found.matrix, found.train, wrong, (found.positions, found.labels), C, l2=1.0, prior=None, rounds=2
    )
    assert len(seen) == 2
    for labels in seen:
        np.testing.assert_array_equal(labels[found.positions], truth[found.positions])


@pytest.mark.parametrize(
    "method", ["tuned_probe", "self_training", "balanced_self_training", "balanced_rounds", "propagation"]
)
def test_every_rung_is_far_above_chance(method):
    found, truth = images(graph=method == "propagation")
    W = Rung(method, 0.0025).classifier(found, Rung(method, 0.0025).settings[0])
    assert ((found.matrix @ W.T).argmax(axis=1) == truth).mean() > 0.7


def nothing(done, total):
    pass


def validation(found, truth, n):
    rows = np.arange(0, N, N // n)[:n] if n else np.arange(0)
    return Rows(found.matrix, truth[rows], rows)


@pytest.mark.parametrize(
    ("per_class", "n", "on", "judged"),
    [(2, 40, "validation", 40), (1, 40, "validation", 40), (2, 0, "cross-validation", 6), (1, 0, "none", 0)],
)
def test_what_a_choice_rests_on_is_said(per_class, n, on, judged):
    found, truth = images(per_class)
    chosen = climb(Rung("balanced_self_training", 0.0025), found, validation(found, truth, n), nothing)
    assert (chosen.on, len(chosen.labels)) == (on, judged)
    assert (chosen.top1 is None) == (chosen.stderr is None) == (on == "none")
    if on == "none":
        assert chosen.setting == SHARES[0]


def test_validation_decides_and_its_accuracy_is_the_score():
    found, truth = images()
    rung, rows = Rung("self_training", 0.0025), validation(found, truth, 60)
    chosen = climb(rung, found, rows, nothing)
    right = [
        ((rows.features @ W.T).argmax(axis=1) == rows.labels).mean()
        for W in rung.classifiers(found, rung.settings)
    ]
    assert chosen.top1 == pytest.approx(max(right))
    assert chosen.stderr == pytest.approx(np.sqrt(max(right) * (1 - max(right)) / 60))


def test_a_label_that_is_held_out_is_not_fitted_on(monkeypatch):
    found, truth = images(3)
    given = []
    real = ladder.fit
    monkeypatch.setattr(
        ladder, "fit", lambda blocks, *a, **k: given.append(blocks[0].index) or real(blocks, *a, **k)
    )
    chosen = climb(Rung("tuned_probe", 0.0025), found, validation(found, truth, 0), nothing)
    parts = folds(found.labels, C)
    assert chosen.on == "cross-validation" and len(parts) == 3
    for part, fits in zip(parts, np.split(np.array(given[:12], dtype=object), 3), strict=True):
        for rows in fits:
            assert not set(rows) & set(found.positions[part])


def test_what_no_label_reaches_keeps_the_probes_class(monkeypatch):
    found, _ = images(graph=True)
    alone = np.setdiff1d(np.arange(60, N), found.positions)[:40]
    S = found.graph.tolil()
    S[alone], S[:, alone] = 0, 0
    cut = replace(found, graph=S.tocsr())
    given = []
    monkeypatch.setattr(ladder, "self_train", lambda matrix, rows, targets, *_, **__: given.append(targets))
    Rung("propagation", 0.0025, "none").classifiers(cut, [0.1])
    probe = fit([cut.labelled], C).weights
    np.testing.assert_array_equal(given[0][alone], (found.matrix[alone] @ probe.T).argmax(axis=1))
    assert len(set(given[0][alone])) > 1


def test_folds_leave_every_class_a_label_and_hold_out_each_label_once():
    labels = np.array([0, 0, 0, 1, 1, 2, 2, 2, 2, 2, 2, 2])
    parts = folds(labels, 3)
    assert len(parts) == 2
    assert sorted(np.concatenate(parts)) == list(range(len(labels)))
    for part in parts:
        assert set(np.delete(labels, part)) == {0, 1, 2}
    assert folds(np.array([0, 1, 1]), 2) == [] and len(folds(np.repeat([0, 1], 9), 2)) == 5


def test_the_lower_cross_entropy_decides_between_equally_many_right_ones():
    labels = np.array([0, 1, 2, 0])
    right = np.eye(C, dtype=np.float32)[labels]
    wrong = right.copy()
    wrong[0] = [0, 1, 0]
    assert _best([right, 3 * right, wrong], labels) == 1
    assert _best([3 * right, right, wrong], labels) == 0
    assert _best([wrong, 3 * wrong, right], labels) == 2  # whatever its cross-entropy is


def test_stage_3_on_generated_rows_weighs_the_labelled_ones_as_it_is_told():
    found, truth = images()
    labelled, more = found.labelled, Rows(found.matrix, truth)
    none = Rows(found.matrix[:0], truth[:0])
    for weight in (1.0, 10.0, "balanced"):
        chosen = from_generated(labelled, more, none, C, weight)
        l2 = GENERATED_SHARES[0] / C * (len(labelled) + len(more))
        wanted = fit_stage(labelled, more, weight, C, l2, MOST_ITERATIONS).weights
        np.testing.assert_array_equal(chosen.weights, wanted)


def test_an_estimated_prior_starts_from_the_shares_of_the_labels():
    found, truth = images()
    positions = np.concatenate([np.flatnonzero(truth == c)[:count] for c, count in enumerate((9, 4, 2))])
    unequal = replace(found, positions=positions, labels=truth[positions])
    trained_on = np.array([10, 5, 3]) / 18  # one image more of each class
    scores = np.random.default_rng(0).dirichlet([1, 1, 1], N)
    expected = estimate_prior(scores, trained_on)
    assert np.abs(expected - estimate_prior(scores, np.full(C, 1 / C))).max() > 0.02
    np.testing.assert_allclose(class_prior("estimated", unequal, scores), expected)


def test_priors():
    found, _ = images()
    scores = np.full((N, C), 1 / 3)
    assert class_prior("none", found, scores) is None
    np.testing.assert_allclose(class_prior("uniform", found, scores), 1 / 3)
    np.testing.assert_allclose(class_prior((1.0, 1.0, 2.0), found, scores), (0.25, 0.25, 0.5))
    sure = np.eye(C)[np.repeat(np.arange(C), (70, 30, 20))] * 0.98 + 0.02 / 3
    estimated = class_prior("estimated", found, sure)
    np.testing.assert_allclose(estimated, (70 / 120, 30 / 120, 20 / 120), atol=0.02)
    with pytest.raises(ValueError, match="a prior of 2 shares for 3 classes"):
        class_prior((1.0, 1.0), found, scores)
