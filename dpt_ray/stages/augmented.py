"""augment: random views of the labelled images, as many as there are generated images (a control).

If a classifier gains as much from these as from generated images, the denoiser added nothing. Each shard is
made by a task that reads and decodes only the labelled images of that shard.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dpt_ray.cluster.units import Result, peak_memory, run_tasks, unit_call
from dpt_ray.config import ConfigError
from dpt_ray.config.hashing import HashedIfSet, Settings
from dpt_ray.config.values import Augmentation, Count, Positive, Seed
from dpt_ray.data.class_ranges import ClassRange, class_ranges, image_columns, items
from dpt_ray.data.crops import Crop
from dpt_ray.data.rows import LABELS_FILE
from dpt_ray.data.shards import write_images
from dpt_ray.data.units import collect_shards, decode_rows, find_rows
from dpt_ray.engine.node import RunsOn, Stage, Task, one_of, reads
from dpt_ray.store.records import Facts

VIEWS = 64  # per batch; a multiple of the positions that share a random generator


class AugmentSettings(Settings):
    """How views are drawn; the extent says how many."""

    augmentation: Annotated[Augmentation, HashedIfSet] = "digits"
    strength: Positive
    image_size: Count
    indices_per_shard: Count
    seed: Seed


class Augmented(Stage[AugmentSettings]):
    """Views; view `index` of a class shows its (index mod n)-th labelled image."""

    artifact = "augmented"
    settings = AugmentSettings
    inputs = reads({"index": one_of("index"), "labels": one_of("labels")})
    runs_on = RunsOn.READERS

    @classmethod
    def make(cls, task: Task[AugmentSettings]) -> Facts:
        """Publish the missing shards of the extent."""
        by_class, rows = _labelled_images(task)
        images_per_class = task.node.extent.images_per_class
        assert images_per_class is not None  # set by the flow
        units = class_ranges(images_per_class, task.settings.indices_per_shard, len(by_class))
        done = task.out.shards()
        missing = [unit for unit in units if unit["shard"] not in done]
        facts: Facts = {"startup_seconds": 0.0, "peak_memory_bytes": 0}
        if missing:
            facts = run_tasks(
                missing,
                lambda threads: AugmentUnit(task, by_class, rows, threads),
                task.compute,
                task.progress,
                images=sum(len(items(unit)) for unit in missing),
            )
        return {**facts, **collect_shards(task.out, units), "mode": task.inputs["index"].manifest["mode"]}


def _labelled_images(task: Task[AugmentSettings]) -> tuple[list[list[str]], pa.Table]:
    """Return the ids of each class's labelled images, in the order of the list, and their index rows."""
    table = pq.read_table(task.inputs["labels"].local_file(LABELS_FILE))
    names = task.inputs["index"].read_json("classes.json")
    by_class: list[list[str]] = [[] for _ in names]
    for identifier, label in zip(table["id"].to_pylist(), table["label"].to_pylist(), strict=True):
        by_class[label].append(identifier)
    if not all(by_class):
        name = names[by_class.index([])]
        raise ConfigError(
            f"evaluate.controls: class {name} has no labelled image to augment; label one, or set "
            "evaluate.controls=false"
        )
    return by_class, find_rows(task.inputs["index"], table["id"].to_pylist())


class AugmentUnit:
    """Make the views of one shard."""

    def __init__(
        self, task: Task[AugmentSettings], by_class: list[list[str]], rows: pa.Table, threads: int = 1
    ) -> None:
        self.out, self.by_class, self.rows = task.out, by_class, rows
        self.seed, self.strength = task.settings.seed, task.settings.strength
        self.augmentation = task.settings.augmentation
        self.classes = task.inputs["index"].read_json("classes.json")
        self.crop = Crop("adm", task.settings.image_size)
        self.mode = task.inputs["index"].manifest["mode"]
        self.threads = threads

    @unit_call
    def __call__(self, unit: ClassRange) -> Result:
        """Publish the views of a range of indices x classes."""
        import torch

        torch.set_num_threads(self.threads)
        started = time.perf_counter()
        chosen = items(unit)
        views: list[np.ndarray] = []
        for first in range(0, len(chosen), VIEWS):
            images = self._images(chosen[first : first + VIEWS])
            # Classes of another range have other numbers; of the first 1,000 they are those of the place.
            position = unit["classes"][0] * (unit["indices"][1] - unit["indices"][0]) + first
            views += list(self._views(images, unit["indices"][0], position))
        columns = image_columns("aug", unit)

        def write(path: Path) -> None:
            write_images(path, views, columns)

        self.out.publish_shard(unit["shard"], ".parquet", len(chosen), write)
        return {
            "seconds": time.perf_counter() - started,
            "peak_memory_bytes": peak_memory(),
            "images": len(chosen),
        }

    def _images(self, pairs: list[tuple[int, int]]) -> np.ndarray:
        """Return the labelled images (n, H, W, C) uint8 of (class, index) pairs."""
        chosen = [self._candidates(label, index)[0] for label, index in pairs]
        found = self._decode(chosen)
        images = []
        for identifier, (label, index) in zip(chosen, pairs, strict=True):
            if identifier not in found:  # unreadable: use the next one of its class
                found |= self._decode(self._candidates(label, index))
            readable = [image for image in self._candidates(label, index) if image in found]
            if not readable:
                raise ConfigError(f"labels: no labelled image of class {self.classes[label]} can be read")
            images.append(found[readable[0]])
        return np.stack(images)

    def _candidates(self, label: int, index: int) -> list[str]:
        """Return a class's labelled images, rotated to start at the (index mod n)-th."""
        ids = self.by_class[label]
        first = index % len(ids)
        return ids[first:] + ids[:first]

    def _decode(self, ids: list[str]) -> dict[str, np.ndarray]:
        """Return the pixels of the readable images by id."""
        rows = self.rows.filter(pc.is_in(self.rows["id"], value_set=pa.array(set(ids), pa.string())))
        return decode_rows(rows, self.crop, self.mode)

    def _views(self, images: np.ndarray, step: int, position: int) -> np.ndarray:
        """Return one random view of each image (n, H, W, C) uint8, seeded by its `position` in all shards."""
        import torch

        from dpt_ray.learners.augmentations import VIEWS
        from dpt_ray.training.order import GROUP
        from dpt_ray.training.random import StepRandom

        n = len(images)
        padded = -(-n // GROUP) * GROUP
        x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
        x = torch.cat([x, x[:1].expand(padded - n, -1, -1, -1)])
        random = StepRandom(self.seed, step, position, position + padded)
        views = VIEWS[self.augmentation](x, random, "view", self.strength)
        pixels = ((views[:n].clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        return pixels.permute(0, 2, 3, 1).numpy()
