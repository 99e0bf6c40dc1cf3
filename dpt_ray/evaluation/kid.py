"""Kernel distance (KID) of two feature sets (Binkowski et al. 2018, arXiv 1801.01401)."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics.image.kid import poly_mmd


def kernel_distance(
    real: Tensor, generated: Tensor, *, seed: int, subsets: int = 100, subset_size: int = 1000
) -> tuple[float, float]:
    """Return mean and standard deviation over random subsets of the unbiased squared MMD.

    `real` (n, d), `generated` (m, d) on one device; kernel (x.y / d + 1)^3, in float64. The estimate
    is unbiased at any size, so it can be below 0. The standard deviation is that of one subset's
    estimate; since subsets overlap, it is not a standard error of the mean.
    """
    if real.ndim != 2 or generated.ndim != 2 or real.shape[1] != generated.shape[1]:
        raise ValueError(
            f"features {tuple(real.shape)} and {tuple(generated.shape)} do not match; "
            "pass (n, d) and (m, d) of one extractor"
        )
    smallest = min(len(real), len(generated))
    if not 2 <= subset_size <= smallest:
        raise ValueError(
            f"subset_size {subset_size} is not between 2 and {smallest}, the smaller set's rows; "
            "lower subset_size or add images"
        )
    generator = torch.Generator().manual_seed(seed)

    def subset(features: Tensor) -> Tensor:
        rows = torch.randperm(len(features), generator=generator)[:subset_size]
        return features[rows.to(features.device)].double()

    values = torch.stack([poly_mmd(subset(real), subset(generated)) for _ in range(subsets)])
    return float(values.mean()), float(values.std(correction=0))
