"""Improved precision and recall (Kynkaanniemi et al. 2019, arXiv 1904.06991)."""

from __future__ import annotations

import torch
from torch import Tensor


def precision_recall(
    real: Tensor, generated: Tensor, *, neighbours: int = 3, chunk: int = 2048
) -> tuple[float, float]:
    """Return (precision, recall) of `generated` (m, d) against `real` (n, d), both on one device.

    Precision is the fraction of generated rows inside the estimated real manifold, recall the
    fraction of real rows inside the generated one. Both depend on n and m: compare at equal counts.
    At most `chunk` x max(n, m) distances are in memory.
    """
    if real.ndim != 2 or generated.ndim != 2 or real.shape[1] != generated.shape[1]:
        raise ValueError(
            f"features {tuple(real.shape)} and {tuple(generated.shape)} do not match; "
            "pass (n, d) and (m, d) of one extractor"
        )
    smallest = min(len(real), len(generated))
    if not 1 <= neighbours < smallest:
        raise ValueError(
            f"neighbours {neighbours} is not between 1 and {smallest - 1}, one less than the "
            "smaller set's rows; lower neighbours or add images"
        )
    # Distances from matrix products lose digits far from the origin, so centre the features.
    centre = real.mean(dim=0)
    real, generated = real - centre, generated - centre
    precision = _covered(generated, real, _radii(real, neighbours, chunk), chunk)
    recall = _covered(real, generated, _radii(generated, neighbours, chunk), chunk)
    return precision, recall


def _radii(points: Tensor, neighbours: int, chunk: int) -> Tensor:
    """Return the distance from each point to its k-th nearest neighbour, NN_k of Eq. 1."""
    k = neighbours + 1  # each point is its own nearest
    nearest = [torch.cdist(part, points).topk(k, largest=False) for part in points.split(chunk)]
    return torch.cat([part.values[:, -1] for part in nearest])


def _covered(queries: Tensor, points: Tensor, radii: Tensor, chunk: int) -> float:
    """Return the fraction of queries within some point's radius, the mean of f (Eq. 2)."""
    # f(q, points) = 1 if |q - p| <= NN_k(p) for some point p, else 0 (Eq. 1)
    inside = [(torch.cdist(part, points) <= radii).any(dim=1) for part in queries.split(chunk)]
    return float(torch.cat(inside).double().mean())
