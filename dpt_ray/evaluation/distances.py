"""Frechet distances in an encoder's features, a shard at a time: the honest choice without Inception."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyarrow.compute as pc

from dpt_ray.data.class_ranges import first_of_all, read_class_and_index
from dpt_ray.data.crops import Crop
from dpt_ray.data.shards import read_feature_shard, read_shard_columns
from dpt_ray.evaluation.records import MetricRow
from dpt_ray.store.artifact import Artifact
from dpt_ray.store.records import Shard

if TYPE_CHECKING:
    from torch import Tensor

    from dpt_ray.evaluation.frechet import FeatureStatistics

METRIC = "Fréchet distance"
TRAIN_IMAGES = "Real training images (floor)"


@dataclass(frozen=True)
class Extractor:
    """An encoder, its features of real and of generated images, and what to know of it in words."""

    encoder: Artifact
    real: Artifact
    generated: Artifact
    what: str

    @property
    def name(self) -> str:
        """What it is, with the beginning of its identity."""
        identity = self.encoder.manifest["identity"][:8]
        name, _, detail = self.what.partition(", ")
        return f"{name} ({identity}), {detail}"


def frechet_rows(index: Artifact, samples: Artifact, extractor: Extractor) -> list[MetricRow]:
    """Return the distance of the generated images to the test images, and that of as many training images.

    The distance falls with their number, so both are of the same one.
    """
    import torch

    from dpt_ray.evaluation.frechet import frechet_distance
    from dpt_ray.evaluation.image_metrics import NAME, TEST_IMAGES
    from dpt_ray.evaluation.image_statistics import some_positions

    real, generated = extractor.real, extractor.generated
    splits = {unit["shard"]: unit["split"] for unit in index.manifest["units"]}
    test, train = (
        [shard for shard in real.listed_shards() if splits[shard["shard"]] == split]
        for split in ("test", "train")
    )
    made = generated.listed_shards()
    most, classes = min(_count(made), _count(train)), index.manifest["classes"]
    first = torch.cat(list(_first(generated, made, samples, classes, most)))
    n, n_reference = int(first.sum()), _count(test)
    if min(n, n_reference) < 2:
        return []
    target = _statistics(real, test, torch.arange(n_reference))
    found = {
        NAME: _statistics(generated, made, first),
        TRAIN_IMAGES: _statistics(real, train, some_positions(_count(train), n)),
    }
    resize = str(Crop(**extractor.encoder.manifest["crop"]))
    return [
        {
            "metric": METRIC,
            "name": name,
            "value": frechet_distance(statistics, target),
            "spread": None,
            "n_generated": n,
            "n_reference": n_reference,
            "extractor": extractor.name,
            "reference": TEST_IMAGES,
            "resize": resize,
        }
        for name, statistics in found.items()
    ]


def _first(
    features: Artifact, shards: Sequence[Shard], samples: Artifact, classes: int, count: int
) -> Iterator[Tensor]:
    """Yield for each shard which of its rows are among the first `count` images by (index, class)."""
    import torch

    images = read_class_and_index(samples)
    ids = images["id"].combine_chunks()
    chosen = first_of_all(images, classes, count)
    for shard in shards:
        rows = pc.index_in(read_shard_columns(features, shard, ["id"])["id"], ids)
        yield torch.from_numpy(chosen[rows.to_numpy()])


def _statistics(artifact: Artifact, shards: Sequence[Shard], chosen: Tensor) -> FeatureStatistics:
    """Return the statistics of the chosen rows (positions or a mask, over all shards), a shard at a time."""
    import torch

    from dpt_ray.evaluation.frechet import FeatureStatistics

    is_chosen = torch.zeros(_count(shards), dtype=torch.bool)
    is_chosen[chosen] = True
    parts = is_chosen.split([shard["rows"] for shard in shards])
    statistics = None
    for shard, wanted in zip(shards, parts, strict=True):
        if wanted.any():
            _, features = read_feature_shard(artifact, shard)
            rows = torch.from_numpy(features[wanted.numpy()])
            if statistics is None:
                statistics = FeatureStatistics.empty(rows.shape[1])
            statistics.update(rows)
    assert statistics is not None  # nobody asks for no rows
    return statistics


def _count(shards: Sequence[Shard]) -> int:
    return sum(shard["rows"] for shard in shards)
