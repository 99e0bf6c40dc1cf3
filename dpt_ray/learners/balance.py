"""Class balance of soft labels: Sinkhorn's scaling to a prior, and an estimate of that prior."""

from __future__ import annotations

import numpy as np

from dpt_ray.data.rows import CHUNK_ROWS

SINKHORN_ITERATIONS = 30
MOST_EM_ITERATIONS = 1000


def sinkhorn(scores: np.ndarray, prior: np.ndarray, iterations: int = SINKHORN_ITERATIONS) -> np.ndarray:
    """Scale `scores` (n, C) in place so that rows sum to 1 and columns nearly to n * `prior`; return them.

    Scores are at least 0, float32 or float64; a row of zeros stays one. Needs no memory beside the scores
    but n + C numbers and a chunk of rows. Sinkhorn 1967; for pseudo-labels SwAV (arXiv 2006.09882, Eq. 3).
    """
    # In double precision: where a class has scores in too few rows, such as those of a part of a graph, its
    # v grows at each iteration by up to n, beyond what float32 can hold.
    u, v = np.ones(len(scores)), np.ones(scores.shape[1])
    chunks = [slice(start, start + CHUNK_ROWS) for start in range(0, len(scores), CHUNK_ROWS)]
    reached = int((scores.max(axis=1) > 0).sum())
    columns = scores.sum(axis=0, dtype=np.float64)
    for _ in range(iterations):
        # v <- n prior / (P^T u),  u <- 1 / (P v): the scaled matrix is diag(u) P diag(v)
        v = _inverse(columns) * (reached * prior)
        columns = np.zeros_like(v)
        for rows in chunks:
            part = scores[rows].astype(np.float64)
            u[rows] = _inverse(part @ v)
            columns += part.T @ u[rows]
    for rows in chunks:
        scores[rows] = scores[rows].astype(np.float64) * v * u[rows, None]
    return scores


def _inverse(values: np.ndarray) -> np.ndarray:
    """Return 1 / values, 0 where a value is 0."""
    return np.divide(1, values, out=np.zeros_like(values), where=values > 0)


def estimate_prior(probabilities: np.ndarray, trained_on: np.ndarray) -> np.ndarray:
    """Return the class prior (C,) of unlabelled rows with class `probabilities` (n, C).

    `trained_on` (C,) is the prior of the rows that the classifier was fitted on. Expectation maximisation
    of Saerens, Latinne & Decaestecker (Neural Computation 14, 2002, Eq. 2.9), with one row of each class
    more: probabilities of few labels are so flat that the most likely prior has classes with nothing. The
    likelihood is concave, so it has one maximum. The probabilities must be calibrated for it to be right.
    """
    prior = trained_on.astype(np.float64)
    for _ in range(MOST_EM_ITERATIONS):
        # p_ic <- p_ic (pi_c / pi0_c) / sum_k p_ik (pi_k / pi0_k),  pi_c <- (1 + sum_i p_ic) / (C + n)
        ratio = prior / trained_on
        rows = ratio * (probabilities.T @ (1 / (probabilities @ ratio)))
        new = (1 + rows) / (len(prior) + len(probabilities))
        step = float(np.abs(new - prior).sum())
        prior = new
        if step < 1e-6:
            break
    return prior / prior.sum()
