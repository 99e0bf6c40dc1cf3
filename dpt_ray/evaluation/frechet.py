"""Streaming Gaussian moments and the Frechet distance between them (FID, sFID).

Heusel et al. 2017, arXiv 1706.08500. The distance is the squared one that papers report as FID.

The estimate is biased upwards by roughly a constant over n (Chong & Forsyth 2020, arXiv
1911.07023): compare numbers only at equal sample counts. With n <= d the covariance has rank
n - 1; the distance stays defined, and the bias is then large.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from os import PathLike
from typing import IO, Any

import numpy as np
import torch
from scipy.linalg.lapack import dpstrf
from torch import Tensor

NpzFile = str | PathLike[str] | IO[bytes]


@dataclass
class Moments:
    """Count n, mean (d,) and co-moment sum_i (x_i - mean)(x_i - mean)^T (d, d), in float64 on CPU.

    Start from `Moments.empty(d)` or `Moments.of(features)`. `count` is None for a reference file
    that does not say how many images it summarises; such moments compare but do not accumulate,
    and their co-moment is the covariance itself.
    """

    count: int | None
    mean: Tensor
    comoment: Tensor

    @classmethod
    def empty(cls, dim: int) -> Moments:
        """Moments of no rows of `dim` features."""
        zeros = torch.zeros(dim, dim, dtype=torch.float64)
        return cls(0, torch.zeros(dim, dtype=torch.float64), zeros)

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """Moments of the rows of `features` (n, d), any float type, computed on their device."""
        if features.ndim != 2:
            raise ValueError(f"features have shape {tuple(features.shape)}; pass (rows, features)")
        x = features.detach().double()
        if len(x) == 0:
            return cls.empty(x.shape[1])
        if not x.isfinite().all():
            row = int((~x.isfinite().all(dim=1)).nonzero()[0])
            raise ValueError(f"features row {row} is not finite; leave that image out")
        mean = x.mean(dim=0)
        centred = x - mean
        return cls(len(x), mean.cpu(), (centred.T @ centred).cpu())

    def update(self, features: Tensor) -> None:
        """Add the rows of `features` (n, d)."""
        self.merge(Moments.of(features))

    def merge(self, other: Moments) -> None:
        """Add another part's rows; the order of merging changes rounding only.

        Chan, Golub & LeVeque 1983, pairwise update: with delta = mean_b - mean_a,
        C = C_a + C_b + delta delta^T n_a n_b / n.
        """
        if self.count is None or other.count is None:
            raise ValueError("count is unknown (no key n in the file); recompute it to merge")
        _check_same_width(self, other)
        n = self.count + other.count
        if n == 0:
            return
        delta = other.mean - self.mean
        weight = self.count * other.count / n
        self.mean = self.mean + delta * (other.count / n)
        self.comoment = self.comoment + other.comoment + weight * torch.outer(delta, delta)
        self.count = n

    @property
    def covariance(self) -> Tensor:
        """Unbiased covariance (d, d), that of `numpy.cov(features, rowvar=False)`."""
        if self.count is None:
            return self.comoment
        if self.count < 2:
            raise ValueError(f"covariance of {self.count} rows is undefined; add at least 2")
        return self.comoment / (self.count - 1)

    def save(self, file: NpzFile) -> None:
        """Write an npz with `mu` (d,), `sigma` (d, d) and, where known, `n`."""
        arrays: dict[str, Any] = {"mu": self.mean.numpy(), "sigma": self.covariance.numpy()}
        if self.count is not None:
            arrays["n"] = self.count
        np.savez(file, **arrays)

    @classmethod
    def load(cls, file: NpzFile, *, spatial: bool = False) -> Moments:
        """Moments from an npz written by `save`, or from an ADM reference file.

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
                raise ValueError(f"{file}: {key} is not finite everywhere; fetch or compute the file anew")
        if (covariance.diagonal() < 0).any():
            raise ValueError(
                f"{file}: {keys[1]} has a negative variance on its diagonal; it is no covariance"
            )
        return cls(count, mean, covariance if count is None else covariance * (count - 1))


def frechet_distance(a: Moments, b: Moments) -> float:
    """Squared Frechet distance of two Gaussians, |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^1/2).

    Symmetric in a and b, never negative, exact for singular covariances. Biased upwards for few
    rows; see the module docstring. Raises ValueError where it is not finite.
    """
    _check_same_width(a, b)
    # With S = L L^T, tr (S_a S_b)^1/2 is the sum of the singular values of L_a^T L_b. Taking them
    # from this product and not as roots of eigenvalues of S_a S_b, and L without the columns that are
    # rounding alone, keeps the error at machine precision where a covariance is singular: roots of
    # rounding are 1e-8 each, d times over. With r_a and r_b columns the product is r_a x r_b, so few
    # rows make it fast as well.
    cross = torch.linalg.svdvals(_factor(a.covariance).T @ _factor(b.covariance)).sum()
    traces = a.covariance.trace() + b.covariance.trace()
    distance = float((a.mean - b.mean).square().sum() + traces - 2 * cross)
    if not math.isfinite(distance):  # max(0, nan) is 0, the best there is
        raise ValueError(f"Frechet distance is {distance}: a mean or covariance is not finite or too large")
    return max(0.0, distance)


def _factor(covariance: Tensor) -> Tensor:
    """L (d, r) with S = L L^T and r the numerical rank of S (d, d), by Cholesky with pivoting.

    Hammarling, Higham & Lucas 2007 (LAPACK's pstrf): it stops where the largest pivot left is below
    d * eps * max_i S_ii.
    """
    factor, pivots, rank, _ = dpstrf(covariance.numpy(), lower=1)
    rows = np.empty((len(factor), rank))
    rows[pivots - 1] = np.tril(factor)[:, :rank]
    return torch.from_numpy(rows)


def _check_same_width(a: Moments, b: Moments) -> None:
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"moments of {len(a.mean)} and {len(b.mean)} features; use one feature extractor")
