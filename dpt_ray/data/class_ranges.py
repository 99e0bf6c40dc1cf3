"""Work units of generated and augmented images: fixed ranges of indices x classes.

More images per class add units and change none. The images of a unit are ordered by (index, class).
"""

from __future__ import annotations

from typing import TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dpt_ray.data.shards import read_columns
from dpt_ray.store.artifact import Artifact

CLASSES_PER_SHARD = 1000


class ClassRange(TypedDict):
    """Images `indices[0]` .. `indices[1] - 1` of the classes `classes[0]` .. `classes[1] - 1`."""

    shard: str
    indices: list[int]
    classes: list[int]


def class_ranges(images_per_class: int, indices_per_shard: int, classes: int) -> list[ClassRange]:
    """Return the units with the first `images_per_class` images of every class."""
    return [
        _class_range(first, start, indices_per_shard, classes)
        for first in range(0, images_per_class, indices_per_shard)
        for start in range(0, classes, CLASSES_PER_SHARD)
    ]


def class_range_of(label: int, index: int, indices_per_shard: int, classes: int) -> ClassRange:
    """Return the unit with image `index` of class `label`."""
    first, start = index // indices_per_shard, label // CLASSES_PER_SHARD
    return _class_range(first * indices_per_shard, start * CLASSES_PER_SHARD, indices_per_shard, classes)


def _class_range(first: int, start: int, indices_per_shard: int, classes: int) -> ClassRange:
    return {
        "shard": f"i{first:07d}-c{start:05d}",
        "indices": [first, first + indices_per_shard],
        "classes": [start, min(start + CLASSES_PER_SHARD, classes)],
    }


def made_per_class(images_per_class: int, indices_per_shard: int) -> int:
    """Return how many images of a class the units hold: the last one is whole."""
    return -(-images_per_class // indices_per_shard) * indices_per_shard


def items(unit: ClassRange) -> list[tuple[int, int]]:
    """Return (class, index) of each image of a unit in order."""
    return [(label, index) for index in range(*unit["indices"]) for label in range(*unit["classes"])]


def image_columns(kind: str, unit: ClassRange) -> dict[str, pa.Array]:
    """Return the columns id, class and index of a unit; ids begin with `kind` ("gen", "aug", "feat")."""
    found = items(unit)
    return {
        "id": pa.array([f"{kind}-{label:05d}-{index:07d}" for label, index in found], pa.string()),
        "class": pa.array([label for label, _ in found], pa.int32()),
        "index": pa.array([index for _, index in found], pa.int64()),
    }


def read_class_and_index(images: Artifact) -> pa.Table:
    """Return id, class and index of all images of an artifact at its extent."""
    return read_columns(images, ["id", "class", "index"])


def locate_images(images: Artifact) -> pa.Table:
    """Return id, class, index, uri, offset and length of all images of an artifact at its extent.

    They are located as the rows of Parquet files in `data.index`; remote shards are copied to this node.
    """
    parts = []
    for shard in images.listed_shards():
        path = images.local_file(shard["file"])
        rows = pq.read_table(path, columns=["id", "class", "index"])
        rows = rows.append_column("uri", pa.repeat(str(path), len(rows)))
        rows = rows.append_column("offset", pa.array(np.arange(len(rows))))
        parts.append(rows.append_column("length", pa.repeat(-1, len(rows))))
    return pa.concat_tables(parts)


def first_of_all(table: pa.Table, classes: int, count: int) -> np.ndarray:
    """Return the mask (n,) of the rows among the first `count` images by (index, class).

    `table` has the columns class and index.
    """
    place = table["index"].to_numpy() * classes + table["class"].to_numpy()
    return place < count
