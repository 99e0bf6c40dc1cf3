"""graph: the nearest neighbours of every training image in the encoder's features."""

from __future__ import annotations

import time
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import pyarrow as pa

from dpt_ray.cluster.units import Result, peak_memory, run_tasks, unit_call
from dpt_ray.config import ConfigError
from dpt_ray.config.hashing import Settings
from dpt_ray.config.sections import Count
from dpt_ray.data.graph import write_neighbours
from dpt_ray.data.rows import features_bytes
from dpt_ray.data.shards import read_features
from dpt_ray.data.units import collect_shards
from dpt_ray.engine.node import RunsOn, Stage, Task, one_of, reads
from dpt_ray.store.artifact import Artifact
from dpt_ray.store.records import Facts

if TYPE_CHECKING:
    from torch import Tensor

ROWS = 4096  # of a shard
COMPARED = 64 << 20  # bytes of the cosines of a part of a block, see `learners.neighbours`


class GraphSettings(Settings):
    """How many neighbours an image has."""

    neighbours: Count


class Block(TypedDict):
    """A work unit: rows start..stop-1 of the training images in the order of their features."""

    shard: str
    start: int
    stop: int


class Graph(Stage[GraphSettings]):
    """Shards of (id, positions of the neighbours, cosines); a position counts rows over all shards."""

    artifact = "graph"
    settings = GraphSettings
    inputs = reads({"index": one_of("index"), "features": one_of("features")})
    runs_on = RunsOn.READERS

    @classmethod
    def make(cls, task: Task[GraphSettings]) -> Facts:
        """Compare each block of rows with all rows. Raises ConfigError for too many neighbours."""
        features, k = task.inputs["features"], task.settings.neighbours
        whole = _training_shards(task.inputs["index"])
        n = sum(shard["rows"] for shard in features.listed_shards() if shard["shard"] in whole)
        if k >= n:
            raise ConfigError(
                f"ladder.neighbours: {k} neighbours, but there are {n} training images with features; set it "
                f"to at most {max(n - 1, 0)}"
            )
        blocks: list[Block] = [
            {"shard": f"rows-{start:09d}", "start": start, "stop": min(start + ROWS, n)}
            for start in range(0, n, ROWS)
        ]
        done = task.out.shards()
        missing = [block for block in blocks if block["shard"] not in done]
        facts: Facts = {}
        if missing:
            inputs, out = (task.inputs["index"], features), task.out

            def work(threads: int) -> CompareBlock:
                return CompareBlock(*inputs, out, k, threads, "cuda" if task.compute.actor_gpus else "cpu")

            images = sum(block["stop"] - block["start"] for block in missing)
            held = features_bytes(features, n) + COMPARED
            facts = run_tasks(missing, work, task.compute, task.progress, images, name=task.name, held=held)
        return {**facts, **collect_shards(task.out, blocks)}


class CompareBlock:
    """Finds the neighbours of one block of rows."""

    def __init__(
        self, index: Artifact, features: Artifact, out: Artifact, k: int, threads: int, device: str
    ) -> None:
        self.index, self.features, self.out = index, features, out
        self.k, self.threads, self.device = k, threads, device

    @unit_call
    def __call__(self, unit: Block) -> Result:
        """Publish the neighbours of the rows."""
        import torch

        from dpt_ray.learners.neighbours import nearest

        started = time.perf_counter()
        torch.set_num_threads(self.threads)
        ids, rows = _normalised(self.index, self.features, self.device)
        start, stop = unit["start"], unit["stop"]
        where, cosines = nearest(rows, start, stop, self.k)

        def write(path: Path) -> None:
            write_neighbours(path, ids[start:stop], where.cpu().numpy(), cosines.cpu().numpy())

        self.out.publish_shard(unit["shard"], ".parquet", stop - start, write)
        return {
            "seconds": time.perf_counter() - started,
            "peak_memory_bytes": peak_memory(),
            "images": stop - start,
        }


# Cached: a process that is given several blocks reads the features once.
@lru_cache(maxsize=1)
def _normalised(index: Artifact, features: Artifact, device: str) -> tuple[pa.Array, Tensor]:
    """Return the ids of the training images and their centred, normalised features, on the device."""
    import torch

    from dpt_ray.learners.neighbours import centre_and_normalise

    ids, raw = read_features(features, _training_shards(index))
    rows = torch.from_numpy(centre_and_normalise(raw))
    return ids, rows.to(device)


def _training_shards(index: Artifact) -> set[str]:
    return {unit["shard"] for unit in index.manifest["units"] if unit["split"] == "train"}
