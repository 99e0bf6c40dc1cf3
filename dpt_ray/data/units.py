"""Work units over images: fixed groups of rows, so that what is computed together never varies.

Two kinds of artifacts hold images: the index (rows that say where the bytes are) and image shards
(generated or augmented images). A unit of the index is a row group of its table; a unit of the other is
a shard.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dpt_ray.data.crops import Crop, crop
from dpt_ray.data.decode import BadImage, decode
from dpt_ray.data.index import SPLITS, read_bytes
from dpt_ray.data.shards import read_image_shard
from dpt_ray.store.artifact import Artifact

ROWS = 256  # of an index unit
INDEX = "index.parquet"

Unit = dict[str, Any]


def write_index(path: Path, index: pa.Table) -> list[Unit]:
    """Writes the index with the rows of a split together, a row group for each unit; the units."""
    units: list[Unit] = []
    with pq.ParquetWriter(path, index.schema) as writer:
        for split in SPLITS:
            rows = index.filter(pc.equal(index["split"], split))
            for number, start in enumerate(range(0, rows.num_rows, ROWS)):
                part = rows.slice(start, ROWS)
                key = f"{split}-{number:06d}"
                units.append({"shard": key, "split": split, "row_group": len(units), "rows": part.num_rows})
                writer.write_table(part, row_group_size=ROWS)
    return units


def list_units(images: Artifact) -> list[Unit]:
    """The units of a published index or image artifact, of its extent."""
    return list(images.manifest["units" if images.exists(INDEX) else "shards"])


def read_index(index: Artifact, columns: list[str] | None = None) -> pa.Table:
    """The whole table of an index artifact."""
    return pq.read_table(index.local_file(INDEX), columns=columns)


def find_rows(index: Artifact, ids: Collection[str]) -> pa.Table:
    """The rows of some images in an index artifact, in its order, read a row group at a time."""
    wanted = pa.array(sorted(ids), pa.string())
    found = []
    with pq.ParquetFile(index.local_file(INDEX)) as file:
        for group in range(file.num_row_groups):
            rows = file.read_row_group(group)
            found.append(rows.filter(pc.is_in(rows["id"], value_set=wanted)))
    return pa.concat_tables(found).combine_chunks()


def decode_rows(rows: pa.Table, how: Crop, mode: str) -> dict[str, np.ndarray]:
    """The pixels (H, W, C) uint8 of index rows by id, in their order; unreadable images are left out."""
    found = {}
    for identifier, data in zip(rows["id"].to_pylist(), read_bytes(rows), strict=True):
        with suppress(BadImage):
            found[identifier] = crop(decode(data, mode), how)  # type: ignore[arg-type]
    return found


def read_unit(images: Artifact, unit: Unit) -> tuple[list[str], list[bytes]]:
    """The ids of a unit and the bytes of its image files."""
    if "row_group" in unit:
        rows = pq.ParquetFile(images.local_file(INDEX)).read_row_group(unit["row_group"])
        return rows["id"].to_pylist(), read_bytes(rows)
    rows = read_image_shard(images, unit)
    return rows["id"].to_pylist(), rows["image"].to_pylist()


def decode_unit(
    images: Artifact, unit: Unit, crops: dict[str, Crop], mode: str
) -> tuple[list[str], dict[str, np.ndarray], list[tuple[str, str]]]:
    """One decode an image: the ids that can be read, their pixels (n, H, W, C) uint8 for each crop,
    and (id, reason) of those that cannot."""
    ids: list[str] = []
    bad: list[tuple[str, str]] = []
    pixels: dict[str, list[np.ndarray]] = {name: [] for name in crops}
    for identifier, data in zip(*read_unit(images, unit), strict=True):
        try:
            image = decode(data, mode)  # type: ignore[arg-type]
            cut = {name: crop(image, how) for name, how in crops.items()}
        except BadImage as error:
            bad.append((identifier, error.reason))
            continue
        except ValueError as error:
            raise ValueError(f"image {identifier}: {error}") from None
        ids.append(identifier)
        for name, value in cut.items():
            pixels[name].append(value)
    return ids, {name: _stack(values, mode) for name, values in pixels.items()}, bad


def iterate_pixels(
    images: Artifact, how: Crop, mode: str, split: str | None = None
) -> Iterator[tuple[list[str], np.ndarray]]:
    """(ids, pixels) of every unit, of one split where it is named; unreadable images are left out."""
    for unit in list_units(images):
        if split is None or unit["split"] == split:
            ids, pixels, _ = decode_unit(images, unit, {"pixels": how}, mode)
            yield ids, pixels["pixels"]


def _stack(values: list[np.ndarray], mode: str) -> np.ndarray:
    if not values:
        return np.zeros((0, 1, 1, 1 if mode == "L" else 3), np.uint8)
    return np.stack(values)
