"""Self-training: the linear classifier fitted on pseudo-labels of real images, classes weighted equally."""

from __future__ import annotations

import numpy as np
from scipy.special import softmax

from dpt_ray.data.rows import CHUNK_ROWS, Rows
from dpt_ray.learners.balance import sinkhorn
from dpt_ray.learners.linear_classifier import logits
from dpt_ray.learners.linear_probe import fit

# As in the published stage 3: lambda = l2 / n is so small here that the end of the way changes nothing.
MOST_ITERATIONS = 100
ROUNDS = 4


def class_blocks(
    matrix: np.ndarray, rows: np.ndarray, labels: np.ndarray, prior: np.ndarray | None
) -> list[Rows]:
    """Return `rows` (n,) of `matrix` (m, dim) as a block for each class that `labels` (n,) has.

    The rows of class c have the weight w_c = n prior_c / n_c, so that the class weighs as much as the prior
    says; 1 without one.
    """
    blocks = []
    for label, count in enumerate(np.bincount(labels)):
        if count:
            mine = labels == label
            weight = 1.0 if prior is None else len(rows) * float(prior[label]) / int(count)
            blocks.append(Rows(matrix, labels[mine], rows[mine], weight))
    return blocks


def self_train(
    matrix: np.ndarray,
    rows: np.ndarray,
    targets: np.ndarray,
    known: tuple[np.ndarray, np.ndarray],
    num_classes: int,
    *,
    l2: float,
    prior: np.ndarray | None,
    rounds: int = 1,
) -> np.ndarray:
    """Return the classifier (C, dim) of `rows` (n,) of `matrix` (m, dim) with pseudo-labels `targets` (n,).

    `known` are positions in `rows` and their true labels, which stay what they are. Each further round
    takes the labels that its classifier gives after Sinkhorn's balance to the `prior` (C,).
    """
    positions, truth = known
    for number in range(rounds):
        targets = targets.copy()
        targets[positions] = truth
        blocks = class_blocks(matrix, rows, targets, prior)
        weights = fit(blocks, num_classes, l2=l2, max_iterations=MOST_ITERATIONS).weights
        if number + 1 < rounds:
            targets = balanced_labels(probabilities(matrix, rows, weights), prior)
    return weights


def balanced_labels(scores: np.ndarray, prior: np.ndarray | None) -> np.ndarray:
    """Return the best class (n,) of scores (n, C), after Sinkhorn's balance if there is a prior."""
    return (scores if prior is None else sinkhorn(scores, prior)).argmax(axis=1)


def probabilities(matrix: np.ndarray, rows: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return softmax(W f) (n, C) float32 of `rows` of `matrix`, a chunk at a time."""
    found = np.empty((len(rows), len(weights)), np.float32)
    for start in range(0, len(rows), CHUNK_ROWS):
        part = slice(start, start + CHUNK_ROWS)
        found[part] = softmax(logits(matrix[rows[part]], weights), axis=1)
    return found
