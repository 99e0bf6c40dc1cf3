"""Streaming feature statistics and the Frechet distance between them (FID, sFID).

Heusel et al. 2017, arXiv 1706.08500. The distance is the squared one that papers report as FID.

The estimate has an upward bias of roughly a constant over n (Chong & Forsyth 2020, arXiv
1911.07023): compare values only at equal sample counts. With n <= d the covariance has rank n - 1;
the distance is still defined, but its bias is large.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from os import PathLike
from typing import IO

import numpy as np
import torch
from scipy.linalg.lapack import dpstrf
from torch import Tensor

NpzFile = str | PathLike[str] | IO[bytes]


@dataclass
class FeatureStatistics:
    """Count n, mean (d,) and co-moment sum_i (x_i - mean)(x_i - mean)^T (d, d), in float64 on CPU.

    Start from `empty(d)` or `of(features)`. `count` is None for a reference file without the number of
    its images; such statistics can be compared but not merged, and their co-moment is the covariance.
    """

    count: int | None
    mean: Tensor
    comoment: Tensor

    @classmethod
    def empty(cls, dim: int) -> FeatureStatistics:
        """Return the statistics of no rows of `dim` features."""
        zeros = torch.zeros(dim, dim, dtype=torch.float64)
        return cls(0, torch.zeros(dim, dtype=torch.float64), zeros)

    @classmethod
    def of(cls, features: Tensor) -> FeatureStatistics:
        """Return the statistics of `features` (n, d), any float type, computed on their device."""
        if features.ndim != 2:
            raise ValueError(f"features have shape {tuple(features.shape)}; pass (rows, features)")
        x = features.detach().double()
        if len(x) == 0:
            return cls.empty(x.shape[1])
        if not x.isfinite().all():
            row = int((~x.isfinite().all(dim=1)).nonzero()[0])
            raise ValueError(f"features row {row} is not finite; leave that image out")
        # C = sum_i (x_i - mean)(x_i - mean)^T
        mean = x.mean(dim=0)
        centred = x - mean
        return cls(len(x), mean.cpu(), (centred.T @ centred).cpu())

    def update(self, features: Tensor) -> None:
        """Add the rows of `features` (n, d)."""
        self.merge(FeatureStatistics.of(features))

    def merge(self, other: FeatureStatistics) -> None:
        """Add another part's rows; the order of merging changes rounding only.

        The pairwise update of Chan, Golub & LeVeque 1983.
        """
        if self.count is None or other.count is None:
            raise ValueError(
                "count is unknown (no key n in the file); recompute the statistics to merge them"
            )
        _check_same_width(self, other)
        n = self.count + other.count
        if n == 0:
            return
        # C = C_a + C_b + delta delta^T n_a n_b / n, with delta = mean_b - mean_a
        delta = other.mean - self.mean
        weight = self.count * other.count / n
        self.mean = self.mean + delta * (other.count / n)
        self.comoment = self.comoment + other.comoment + weight * torch.outer(delta, delta)
        self.count = n

    @property
    def covariance(self) -> Tensor:
        """The unbiased covariance (d, d), as `numpy.cov(features, rowvar=False)`."""
        if self.count is None:
            return self.comoment
        if self.count < 2:
            raise ValueError(f"covariance of {self.count} rows is undefined; add at least 2")
        return self.comoment / (self.count - 1)

    def save(self, file: NpzFile) -> None:
        """Write an npz with `mu` (d,), `sigma` (d, d) and, where known, `n`."""
        mean, covariance = self.mean.numpy(), self.covariance.numpy()
        if self.count is None:
            np.savez(file, mu=mean, sigma=covariance)
        else:
            np.savez(file, mu=mean, sigma=covariance, n=self.count)

    @classmethod
    def load(cls, file: NpzFile, *, spatial: bool = False) -> FeatureStatistics:
        """Return the statistics of an npz written by `save`, or of an ADM reference file.

        `spatial` selects ADM's second pair, `mu_s` and `sigma_s`, for sFID (Nash et al. 2021). Raises
        ValueError, naming the key, unless both are finite and no variance is negative.
        """
        suffix = "_s" if spatial else ""
        keys = [f"mu{suffix}", f"sigma{suffix}"]
        with np.load(file, allow_pickle=False) as npz:
            if missing := [key for key in keys if key not in npz]:
                raise ValueError(
                    f"{file} lacks {missing}, it has {sorted(npz)}; spatial={spatial} needs {keys}"
                )
            mean, covariance = (torch.from_numpy(npz[key]).double() for key in keys)
            count = int(npz["n"]) if "n" in npz else None
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            shapes = f"{tuple(mean.shape)} and {tuple(covariance.shape)}"
            raise ValueError(f"{file}: {keys} have shapes {shapes}; expected (d,) and (d, d)")
        for key, values in zip(keys, (mean, covariance), strict=True):
            if not values.isfinite().all():
                raise ValueError(f"{file}: {key} has values that are not finite; fetch or recompute the file")
        if (covariance.diagonal() < 0).any():
            raise ValueError(
                f"{file}: {keys[1]} has a negative variance on its diagonal; fetch or recompute the file"
            )
        return cls(count, mean, covariance if count is None else covariance * (count - 1))


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """Return the squared Frechet distance of two Gaussians.

    It is symmetric, never negative, exact for singular covariances, and biased upwards for few rows
    (see the module docstring). Raises ValueError where it is not finite.
    """
    _check_same_width(a, b)
    # |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^1/2). With S = L L^T, tr (S_a S_b)^1/2 is the sum of
    # the singular values of L_a^T L_b. Unlike square roots of the eigenvalues of S_a S_b, which turn
    # rounding into d errors of 1e-8, they keep machine precision for singular covariances. L has as
    # many columns as S has rank, which makes few rows fast as well.
    cross = torch.linalg.svdvals(_factor(a.covariance).T @ _factor(b.covariance)).sum()
    traces = a.covariance.trace() + b.covariance.trace()
    distance = float((a.mean - b.mean).square().sum() + traces - 2 * cross)
    if not math.isfinite(distance):  # max(0, nan) would be 0, a perfect score
        raise ValueError(
            f"Frechet distance is {distance}: a mean or covariance is not finite or too large; "
            "recompute the features with precision=float32"
        )
    return max(0.0, distance)


def _factor(covariance: Tensor) -> Tensor:
    """Return L (d, r) with S = L L^T and r the numerical rank of S (d, d), by pivoted Cholesky.

    Hammarling, Higham & Lucas 2007 (LAPACK's pstrf): it stops where the largest remaining pivot is
    below d * eps * max_i S_ii.
    """
    factor, pivots, rank, _ = dpstrf(covariance.numpy(), lower=1)
    rows = np.empty((len(factor), rank))
    rows[pivots - 1] = np.tril(factor)[:, :rank]
    return torch.from_numpy(rows)


def _check_same_width(a: FeatureStatistics, b: FeatureStatistics) -> None:
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"statistics of {len(a.mean)} and {len(b.mean)} features; use one feature extractor")
