"""augment: random views of the labelled images, as many as there are generated ones (a control).

If a classifier gains as much from these as from generated images, the denoiser added nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dpt_ray.data.crops import Crop
from dpt_ray.data.shards import write_images
from dpt_ray.data.units import iterate_pixels
from dpt_ray.stages.generate import shard_units
from dpt_ray.stages.labels import LABELS
from dpt_ray.stages.node import Task
from dpt_ray.stages.rows import image_id


def make(task: Task) -> dict[str, Any]:
    """Publishes shards of views; view `index` of a class is of its (index mod n)-th labelled image."""
    mode = task.inputs["index"].manifest["mode"]
    by_class = _labelled_images(task, mode)
    units = shard_units(int(task.node.extent[1:]), task.settings["indices_per_shard"], len(by_class))
    shards = []
    for number, unit in enumerate(units, 1):
        items = [(label, index) for index in range(*unit["indices"]) for label in range(*unit["classes"])]
        chosen = [by_class[label][index % len(by_class[label])] for label, index in items]
        views = _views(np.stack(chosen), unit["indices"][0], task)
        columns = {
            "id": [image_id("aug", label, index) for label, index in items],
            "class": pa.array([label for label, _ in items], pa.int32()),
            "index": pa.array([index for _, index in items], pa.int64()),
        }

        def write(path: Path, views: np.ndarray = views, columns: dict[str, Any] = columns) -> None:
            write_images(path, list(views), columns)

        shards.append(task.out.publish_shard(unit["shard"], ".parquet", len(items), write))
        task.progress(number, len(units))
    return {"rows": sum(shard["rows"] for shard in shards), "shards": shards, "mode": mode}


def _labelled_images(task: Task, mode: str) -> list[list[np.ndarray]]:
    """The labelled images (H, W, C) uint8 of each class, in the order of the label list."""
    table = pq.read_table(task.inputs["labels"].local_file(LABELS))
    wanted = dict(zip(table["id"].to_pylist(), table["label"].to_pylist(), strict=True))
    found: dict[str, np.ndarray] = {}
    how = Crop("adm", task.settings["image_size"])
    for ids, pixels in iterate_pixels(task.inputs["index"], how, mode, "train"):
        found |= {i: image for i, image in zip(ids, pixels, strict=True) if i in wanted}
    by_class: list[list[np.ndarray]] = [[] for _ in task.inputs["index"].read_json("classes.json")]
    for identifier, label in wanted.items():
        by_class[label].append(found[identifier])
    return by_class


def _views(images: np.ndarray, step: int, task: Task) -> np.ndarray:
    """One random view of each image (n, H, W, C) uint8, by position in the shard."""
    import torch

    from dpt_ray.learners.simclr import augment
    from dpt_ray.training.random import GROUP, StepRandom

    n = len(images)
    padded = -(-n // GROUP) * GROUP
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    x = torch.cat([x, x[:1].expand(padded - n, -1, -1, -1)])
    views = augment(x, StepRandom(task.settings["seed"], step, 0, padded), "view", task.settings["strength"])
    pixels = ((views[:n].clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).numpy()
