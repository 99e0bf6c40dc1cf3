"""Temperature scaling and calibration error (Guo et al. 2017, arXiv 1706.04599)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dpt_ray.evaluation.accuracy import check_scores


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """Return the T that minimises the cross-entropy of softmax(logits / T) on held-out rows.

    `logits` (n, C), `labels` (n,). The loss is convex in b = 1 / T, so bisection on its slope finds the
    minimum. The mean confidence is limited to (n + 1) / (n + 2), Laplace's estimate after n rows
    without a mistake: a classifier without mistakes has its minimum at T = 0, confidence 1 everywhere,
    which n rows cannot support. T is limited to 1e-4 .. 1e4 times the spread of the logits (the upper
    limit if no better than chance) and is 1 if the logits are constant.
    """
    check_scores(logits, labels)
    n = len(logits)
    z = logits.detach().to("cpu", torch.float64)
    z = z - z.mean(dim=1, keepdim=True)
    spread = float(z.square().mean().sqrt())
    if spread == 0:
        return 1.0
    z = z / spread
    target = z.gather(1, labels.cpu().long()[:, None]).mean()

    low, high = -4.0, 4.0  # log10 b
    for _ in range(30):
        middle = (low + high) / 2
        p = (10**middle * z).softmax(dim=1)
        # d/db E[logsumexp(b z) - b z_y] = E[sum_c p_c z_c] - E[z_y]; it and max p increase with b.
        falling = (p * z).sum(dim=1).mean() < target
        supported = p.amax(dim=1).mean() < (n + 1) / (n + 2)
        low, high = (middle, high) if falling and supported else (low, middle)
    return spread / 10 ** ((low + high) / 2)


@dataclass(frozen=True)
class ReliabilityBins:
    """Edges (bins + 1,), and per bin the number of rows, mean confidence and accuracy (NaN if empty)."""

    edges: Tensor
    counts: Tensor
    confidence: Tensor
    accuracy: Tensor


def reliability_bins(probs: Tensor, labels: Tensor, bins: int = 15) -> ReliabilityBins:
    """Return the reliability diagram of `probs` (n, C): equal bins (low, high] of the top confidence."""
    check_scores(probs, labels)
    if bins < 1:
        raise ValueError(f"bins {bins} is not positive; use 15")
    if probs.min() < 0 or probs.max() > 1 + 1e-3:
        raise ValueError("probs lie outside [0, 1]; apply softmax to the logits")
    confidence, predicted = probs.detach().double().max(dim=1)
    return bins_of(confidence, predicted == labels, bins)


def bins_of(confidence: Tensor, correct: Tensor, bins: int = 15) -> ReliabilityBins:
    """Return the diagram of labels with a `confidence` (n,) in [0, 1] that are `correct` (n,) or not."""
    confidence = confidence.double()
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64, device=confidence.device)
    # The inner edges only, so that a confidence of 1 + rounding falls into the last bin.
    index = torch.bucketize(confidence, edges[1:-1])
    counts = torch.bincount(index, minlength=bins)
    sums = torch.zeros(2, bins, dtype=torch.float64, device=confidence.device)
    means = sums.index_add(1, index, torch.stack([confidence, correct.double()])) / counts
    return ReliabilityBins(edges, counts, means[0], means[1])


def expected_calibration_error(probs: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Return the expected calibration error of `probs` (n, C) for `labels` (n,)."""
    return calibration_error(reliability_bins(probs, labels, bins))


def calibration_error(b: ReliabilityBins) -> float:
    """Return the expected calibration error of a reliability diagram."""
    # ECE = sum_b (n_b / n) |accuracy_b - confidence_b| (Eq. 3)
    gaps = (b.accuracy - b.confidence).abs().nan_to_num(0.0)
    return float((b.counts * gaps).sum() / b.counts.sum())
