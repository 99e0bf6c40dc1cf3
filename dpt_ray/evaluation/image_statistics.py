"""What is kept of a set of images for FID, sFID, Inception Score, KID, precision and recall.

Parts of a set are computed anywhere and merged in order. A part is an npz, without pickles.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dpt_ray.evaluation.frechet import Moments, NpzFile
from dpt_ray.evaluation.inception import Activations
from dpt_ray.evaluation.inception_score import InceptionScore


@dataclass
class ImageStatistics:
    """Moments of `pool` (2048) and `spatial` (2023), sums of the Inception Score, and `kept` (m, 2048).

    `kept` are the pool features, float32, of some of the images: KID, precision and recall compare images
    one by one. `order` (m,) integers are their places in the set, whichever part they came in.
    """

    pool: Moments
    spatial: Moments
    score: InceptionScore
    kept: Tensor
    order: Tensor

    @classmethod
    def of(cls, found: Activations, positions: Tensor, kept: Tensor, order: Tensor) -> ImageStatistics:
        """Statistics of n images: `positions` (n,) integers decide their splits (see `InceptionScore`),
        `kept` (n,) is True for images whose features stay, `order` (n,) are their places in the set."""
        score = InceptionScore.empty(found.probabilities.shape[1])
        score.update(found.probabilities, positions)
        features = found.pool[kept].float().cpu()
        return cls(Moments.of(found.pool), Moments.of(found.spatial), score, features, order[kept])

    def first(self, count: int) -> Tensor:
        """The kept features of the `count` images that come first in the set."""
        return self.kept[self.order.argsort(stable=True)[:count]]

    def merge(self, other: ImageStatistics) -> None:
        """Add another part's images; the order of merging changes rounding and the order of `kept` only."""
        self.pool.merge(other.pool)
        self.spatial.merge(other.spatial)
        self.score.merge(other.score)
        self.kept = torch.cat([self.kept, other.kept])
        self.order = torch.cat([self.order, other.order])

    @property
    def count(self) -> int:
        """The number of images."""
        assert self.pool.count is not None  # only a reference file's is unknown
        return self.pool.count

    def save(self, file: NpzFile) -> None:
        """Writes an npz; `load` gives the same numbers again, bit by bit."""
        np.savez(
            file,
            n=self.count,
            pool_mean=self.pool.mean.numpy(),
            pool_comoment=self.pool.comoment.numpy(),
            spatial_mean=self.spatial.mean.numpy(),
            spatial_comoment=self.spatial.comoment.numpy(),
            class_sums=self.score.class_sums.numpy(),
            entropy_sums=self.score.entropy_sums.numpy(),
            counts=self.score.counts.numpy(),
            kept=self.kept.numpy(),
            order=self.order.numpy(),
        )

    @classmethod
    def load(cls, file: NpzFile) -> ImageStatistics:
        """What `save` wrote."""
        with np.load(file, allow_pickle=False) as npz:
            n = int(npz["n"])
            t = {key: torch.from_numpy(npz[key]) for key in npz if key != "n"}
        return cls(
            Moments(n, t["pool_mean"], t["pool_comoment"]),
            Moments(n, t["spatial_mean"], t["spatial_comoment"]),
            InceptionScore(t["class_sums"], t["entropy_sums"], t["counts"]),
            t["kept"],
            # Files without it are of sets whose parts follow one another in order.
            t.get("order", torch.zeros(len(t["kept"]), dtype=torch.long)),
        )


def some_positions(total: int, count: int) -> Tensor:
    """At most `count` of the positions 0 .. total - 1, in order; the same for the same numbers.

    A random choice, since images may lie class by class or in any other pattern.
    """
    generator = torch.Generator().manual_seed(0)
    return torch.randperm(total, generator=generator)[:count].sort().values
