"""The Inception statistics of a whole set of images, merged from those of its parts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dpt_ray.store.artifact import Artifact

if TYPE_CHECKING:
    from dpt_ray.evaluation.image_statistics import ImageStatistics


def read_statistics(artifact: Artifact) -> ImageStatistics | None:
    """Return the statistics of a published set, merged in the order of its images; None of no images."""
    from dpt_ray.evaluation.image_statistics import ImageStatistics

    total: ImageStatistics | None = None
    for shard in artifact.listed_shards():
        part = ImageStatistics.load(artifact.local_file(shard["file"]))
        if total is None:
            total = part
        else:
            total.merge(part)
    return total
