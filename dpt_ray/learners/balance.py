"""Class balance of soft labels: Sinkhorn's scaling to a prior, and an estimate of that prior."""

from __future__ import annotations

import numpy as np

SINKHORN_ITERATIONS = 30
MOST_EM_ITERATIONS = 1000


def sinkhorn(scores: np.ndarray, prior: np.ndarray, iterations: int = SINKHORN_ITERATIONS) -> np.ndarray:
    """Scale `scores` (n, C) in place so that rows sum to 1 and columns nearly to n * `prior`; return them.

    Scores are at least 0, float32 or float64; a row of zeros stays one. Needs no memory beside the scores
    but 2 (n + C) numbers. Sinkhorn 1967; for pseudo-labels SwAV (arXiv 2006.09882, Eq. 3).
    """
    kind = scores.dtype
    # Rows have any scale, and 1 / x of the smallest numbers is infinite. Powers of two round nothing.
    np.ldexp(scores, -np.frexp(scores.max(axis=1, keepdims=True))[1], out=scores)
    u = np.ones(len(scores), kind)
    v = np.ones(scores.shape[1], kind)
    reached = int((scores.max(axis=1) > 0).sum())
    for _ in range(iterations):
        # v <- n prior / (P^T u),  u <- 1 / (P v): the scaled matrix is diag(u) P diag(v)
        v = _inverse(scores.T @ u) * (reached * prior).astype(kind)
        u = _inverse(scores @ v)
    scores *= v
    scores *= u[:, None]
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
