"""Frechet distances in an encoder's features, read a shard at a time; they need no Inception weights."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from dpt_ray.data.crops import Crop
from dpt_ray.data.shards import read_feature_shard
from dpt_ray.engine.node import Task
from dpt_ray.stages.samples import first_images
from dpt_ray.store.artifact import Artifact

if TYPE_CHECKING:
    from torch import Tensor

    from dpt_ray.evaluation.frechet import FeatureStatistics

# For each encoder: inputs with its features of real and of generated images, its name, and a remark.
EXTRACTORS = {
    "referee": (
        "referee_features",
        "referee_sample_features",
        "the referee",
        "a conv net trained on the training images' true labels",
    ),
    "encoder": (
        "features",
        "sample_features",
        "the run's own encoder",
        "DPT's classifier is trained in these features",
    ),
}
METRIC = "Fréchet distance"
TRAIN_IMAGES = "Real training images (floor)"


def frechet_rows(task: Task) -> list[dict[str, Any]]:
    """Return two rows (see `Metric`) per extractor: generated images, and real ones as the floor."""
    rows = []
    for key, (real, generated, name, what) in EXTRACTORS.items():
        if generated in task.inputs:
            encoder = task.inputs[key].manifest
            extractor = f"{name} ({encoder['identity'][:8]}), {what}"
            resize = str(Crop(**encoder["crop"]))
            rows += _rows(task.inputs["index"], task.inputs[real], task.inputs[generated], extractor, resize)
    return rows


def _rows(
    index: Artifact, real: Artifact, generated: Artifact, extractor: str, resize: str
) -> list[dict[str, Any]]:
    """Return the distances to the test images of the generated and of as many training images.

    The distance decreases with the number of images, so both sets have the same size.
    """
    import torch

    from dpt_ray.evaluation.frechet import frechet_distance
    from dpt_ray.evaluation.image_metrics import NAME, TEST_IMAGES
    from dpt_ray.evaluation.image_statistics import some_positions
    from dpt_ray.evaluation.metric import Metric

    splits = {unit["shard"]: unit["split"] for unit in index.manifest["units"]}
    test, train = (
        [shard for shard in real.listed_shards() if splits[shard["shard"]] == split]
        for split in ("test", "train")
    )
    made = generated.listed_shards()
    most, classes = min(_count(made), _count(train)), index.manifest["classes"]
    # In the order of generation every class comes once before any comes twice.
    first = [torch.arange(s["rows"]) < first_images(s["shard"], classes, most) for s in made]
    n, n_reference = sum(int(rows.sum()) for rows in first), _count(test)
    if min(n, n_reference) < 2:
        return []
    target = _statistics(real, test, torch.arange(n_reference))
    found = {
        NAME: _statistics(generated, made, torch.cat(first)),
        TRAIN_IMAGES: _statistics(real, train, some_positions(_count(train), n)),
    }
    rows = []
    for name, statistics in found.items():
        value = frechet_distance(statistics, target)
        rows.append(Metric(METRIC, name, value, None, n, n_reference, extractor, TEST_IMAGES, resize))
    return [asdict(row) for row in rows]


def _statistics(artifact: Artifact, shards: list[dict[str, Any]], chosen: Tensor) -> FeatureStatistics:
    """Return the statistics of the chosen rows (positions, or a mask, over all shards)."""
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
    assert statistics is not None  # at least one row is chosen
    return statistics


def _count(shards: list[dict[str, Any]]) -> int:
    return sum(shard["rows"] for shard in shards)
