"""Mergeable statistics of a set of images for FID, sFID, Inception Score, KID, precision and recall.

Parts of a set are computed anywhere and merged in order. A part is stored as an npz without pickles.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dpt_ray.evaluation.frechet import FeatureStatistics, NpzFile
from dpt_ray.evaluation.inception import Activations
from dpt_ray.evaluation.inception_score import InceptionScore


@dataclass
class ImageStatistics:
    """Statistics of `pool` (2048) and `spatial` (2023), Inception Score sums, and `kept` (m, 2048).

    `kept` are float32 pool features of a subset of the images, for KID, precision and recall, which
    compare single images. `order` (m,) are their positions in the set, independent of the parts.
    """

    pool: FeatureStatistics
    spatial: FeatureStatistics
    score: InceptionScore
    kept: Tensor
    order: Tensor

    @classmethod
    def of(cls, found: Activations, positions: Tensor, kept: Tensor, order: Tensor) -> ImageStatistics:
        """Return the statistics of n images.

        `positions` (n,) decide their splits (see `InceptionScore`), `kept` (n,) is True for images whose
        features are stored, `order` (n,) are their positions in the set.
        """
        score = InceptionScore.empty(found.probabilities.shape[1])
        score.update(found.probabilities, positions)
        features = found.pool[kept].float().cpu()
        return cls(
            FeatureStatistics.of(found.pool),
            FeatureStatistics.of(found.spatial),
            score,
            features,
            order[kept],
        )

    def first(self, count: int) -> Tensor:
        """Return the kept features of the first `count` images of the set."""
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
        assert self.pool.count is not None  # None for reference files only
        return self.pool.count

    def save(self, file: NpzFile) -> None:
        """Write an npz that `load` restores bit for bit."""
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
        """Return the statistics that `save` wrote."""
        with np.load(file, allow_pickle=False) as npz:
            n = int(npz["n"])
            t = {key: torch.from_numpy(npz[key]) for key in npz if key != "n"}
        return cls(
            FeatureStatistics(n, t["pool_mean"], t["pool_comoment"]),
            FeatureStatistics(n, t["spatial_mean"], t["spatial_comoment"]),
            InceptionScore(t["class_sums"], t["entropy_sums"], t["counts"]),
            t["kept"],
            # Files without `order` are of sets whose parts are in order.
            t.get("order", torch.zeros(len(t["kept"]), dtype=torch.long)),
        )


def some_positions(total: int, count: int) -> Tensor:
    """Return at most `count` of the positions 0 .. total - 1, sorted; deterministic.

    The choice is random, since images may be ordered by class.
    """
    generator = torch.Generator().manual_seed(0)
    return torch.randperm(total, generator=generator)[:count].sort().values
