"""The usual metrics of generated images, with what a comparison needs, and why one is left out."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from dpt_ray.evaluation.frechet import FeatureStatistics, NpzFile, frechet_distance
from dpt_ray.evaluation.image_statistics import ImageStatistics, some_positions
from dpt_ray.evaluation.kid import kernel_distance
from dpt_ray.evaluation.precision_recall import precision_recall
from dpt_ray.evaluation.records import MetricRow

TEST_IMAGES = "real test images"
NAME = "Generated images"
UNIFORM_NAME = f"{NAME}, labels drawn uniformly at random"
SUBSETS, SUBSET_SIZE, NEIGHBOURS = 100, 1000, 3  # as published


@dataclass(frozen=True)
class Reference:
    """The statistics that FID and sFID compare with; `spatial` is None where the file has none."""

    name: str
    pool: FeatureStatistics
    spatial: FeatureStatistics | None

    @classmethod
    def load(cls, file: NpzFile, name: str) -> Reference:
        """Return the reference of an npz with `mu`, `sigma` and, as ADM's, `mu_s` and `sigma_s`."""
        with np.load(file, allow_pickle=False) as npz:
            has_spatial = "mu_s" in npz and "sigma_s" in npz
        return cls(
            name,
            FeatureStatistics.load(file),
            FeatureStatistics.load(file, spatial=True) if has_spatial else None,
        )


@dataclass
class _Measured:
    """The rows of metrics of the images `name`, all measured in one way."""

    name: str
    extractor: str
    resize: str
    rows: list[MetricRow] = field(default_factory=list)

    def add(
        self, metric: str, value: float, spread: float | None, n: int, n_reference: int | None, against: str
    ) -> None:
        """Add a row; `n` generated images are compared with `n_reference` of `against`."""
        self.rows.append(
            {
                "metric": metric,
                "name": self.name,
                "value": value,
                "spread": spread,
                "n_generated": n,
                "n_reference": n_reference,
                "extractor": self.extractor,
                "reference": against,
                "resize": self.resize,
            }
        )


def image_metrics(
    generated: ImageStatistics,
    real: ImageStatistics | None,
    reference: Reference | None,
    *,
    extractor: str,
    resize: str,
    name: str = NAME,
) -> tuple[list[MetricRow], list[str]]:
    """Return rows of FID, sFID, IS, KID, precision and recall, and why any are left out.

    `reference` is a file's; without one FID and sFID compare with the `real` images. KID, precision and
    recall always do, since they compare single images, and use equally many of both sets. `name` says which
    generated images are measured.
    """
    measured = _Measured(name, extractor, resize)
    add, left_out = measured.add, list[str]()
    n = generated.count
    if reference is None and real is not None and real.count > 1:
        reference = Reference(TEST_IMAGES, real.pool, real.spatial)
    if n < 2 or reference is None:
        why = "needs at least 2 generated images" if n < 2 else "needs test images or evaluate.reference"
        left_out.append(f"FID and sFID {why}")
    else:
        value = frechet_distance(generated.pool, reference.pool)
        add("FID", value, None, n, reference.pool.count, reference.name)
        if reference.spatial is None:
            left_out.append(f"sFID needs mu_s and sigma_s, which {reference.name} has not")
        else:
            value = frechet_distance(generated.spatial, reference.spatial)
            add("sFID", value, None, n, reference.spatial.count, reference.name)

    m = min(len(generated.kept), len(real.kept) if real else 0)
    if real is None or m < NEIGHBOURS + 1:
        left_out.append(f"KID, precision and recall need {NEIGHBOURS + 1} test images and as many generated")
    else:
        mine, theirs = generated.first(m), real.kept[some_positions(len(real.kept), m)]
        # At most half of the images: subsets of nearly all of them would have no spread.
        size = min(SUBSET_SIZE, m // 2)
        value, spread = kernel_distance(theirs, mine, seed=0, subsets=SUBSETS, subset_size=size)
        add(f"KID, {SUBSETS} subsets of {size:,}", value, spread, m, m, TEST_IMAGES)
        precision, recall = precision_recall(theirs, mine, neighbours=NEIGHBOURS)
        add(f"Precision, {NEIGHBOURS} neighbours", precision, None, m, m, TEST_IMAGES)
        add(f"Recall, {NEIGHBOURS} neighbours", recall, None, m, m, TEST_IMAGES)

    splits = len(generated.score.counts)
    if (generated.score.counts == 0).any():
        left_out.append(f"Inception Score needs an image in each of {splits} splits, there are {n}")
    else:
        value, spread = generated.score.score()
        add(f"Inception Score, {splits} splits", value, spread, n, None, "none")

    return measured.rows, left_out
