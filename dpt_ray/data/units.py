"""Work units over images: fixed groups of rows, so that what is computed together never varies.

Two kinds of artifacts hold images: the index (rows that say where the bytes are) and image shards
(generated or augmented images). A unit of the index is a row group of its table; a unit of the other is
a shard.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dpt_ray.data.crops import Crop, crop
from dpt_ray.data.decode import BadImage, Mode, decode
from dpt_ray.data.index import SPLITS, read_bytes
from dpt_ray.data.shards import read_image_shard
from dpt_ray.store.artifact import Artifact
from dpt_ray.store.records import Facts, IndexUnit, Manifest, Shard

ROWS = 256  # of an index unit
INDEX = "index.parquet"
# Units of one file of the index: to read any of its units a process holds the footer, 7 KB for each of them.
PER_FILE = 1024

Unit = IndexUnit | Shard


def write_index(out: Artifact, index: pa.Table) -> list[IndexUnit]:
    """Write the index sorted by split, a row group a unit, in files of PER_FILE units; return the units."""
    parts: list[tuple[IndexUnit, pa.Table]] = []
    for split in SPLITS:
        rows = index.filter(pc.equal(index["split"], split))
        for number, start in enumerate(range(0, rows.num_rows, ROWS)):
            file, row_group = divmod(len(parts), PER_FILE)
            part = rows.slice(start, ROWS)
            unit: IndexUnit = {
                "shard": f"{split}-{number:06d}",
                "split": split,
                "row_group": row_group,
                "rows": part.num_rows,
            }
            parts.append((unit | {"part": f"index-{file:05d}.parquet"} if file else unit, part))
    for first in range(0, len(parts), PER_FILE):
        within = parts[first : first + PER_FILE]
        with out.writing(_part(within[0][0])) as path, pq.ParquetWriter(path, index.schema) as writer:
            for _, part in within:
                writer.write_table(part, row_group_size=ROWS)
    return [unit for unit, _ in parts]


def _part(unit: IndexUnit) -> str:
    """Return the file of the index that has a unit; the first one is INDEX."""
    return unit.get("part", INDEX)


def _parts(index: Artifact) -> list[Path]:
    """Return the files of an index artifact."""
    return [index.local_file(name) for name in dict.fromkeys(map(_part, index.manifest["units"]))]


@lru_cache(maxsize=2)
def _footer(path: Path) -> pq.FileMetaData:
    """Return the metadata of a file of the index, which is never written again; parsing takes 9 us a unit."""
    return pq.read_metadata(path)


def list_units(images: Artifact) -> list[Unit]:
    """Return the units of a published index or image artifact (of its extent)."""
    manifest = images.manifest
    return list(manifest["units"]) if is_index(manifest) else list(manifest["shards"])


def is_index(manifest: Manifest) -> bool:
    """Return whether an artifact of images is the index, whose images are real."""
    return "units" in manifest


def collect_shards(out: Artifact, units: Sequence[Mapping[str, Any]]) -> Facts:
    """Return the facts of an artifact whose shards of `units` are all published: shards, rows, bytes."""
    published = out.shards()
    shards = [published[unit["shard"]] for unit in units]
    return {
        "rows": sum(shard["rows"] for shard in shards),
        "bytes": sum(shard["bytes"] for shard in shards),
        "shards": shards,
    }


def split_of(unit: Unit) -> str:
    """Return the split of a unit; generated and augmented images are for training."""
    return str(unit.get("split", "train"))


def read_index(index: Artifact, columns: list[str] | None = None) -> pa.Table:
    """Return the table of an index artifact."""
    return pa.concat_tables([pq.read_table(path, columns=columns) for path in _parts(index)])


def find_rows(index: Artifact, ids: Collection[str]) -> pa.Table:
    """Return the rows of the images `ids` in an index artifact, in its order, read by row group."""
    wanted = pa.array(sorted(ids), pa.string())
    found = []
    for path in _parts(index):
        with pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                rows = file.read_row_group(group)
                found.append(rows.filter(pc.is_in(rows["id"], value_set=wanted)))
    return pa.concat_tables(found).combine_chunks()


def decode_rows(rows: pa.Table, how: Crop, mode: Mode) -> dict[str, np.ndarray]:
    """Return the pixels (H, W, C) uint8 of index rows by id, in their order, without unreadable images."""
    found = {}
    for identifier, data in zip(rows["id"].to_pylist(), read_bytes(rows), strict=True):
        with suppress(BadImage):
            found[identifier] = crop(decode(data, mode), how)
    return found


def read_unit(images: Artifact, unit: Unit) -> tuple[list[str], list[bytes]]:
    """Return the ids of a unit and the bytes of its image files."""
    if "file" in unit:
        rows = read_image_shard(images, cast(Shard, unit))
        return rows["id"].to_pylist(), rows["image"].to_pylist()
    path = images.local_file(_part(unit))
    rows = pq.ParquetFile(path, metadata=_footer(path)).read_row_group(unit["row_group"])
    return rows["id"].to_pylist(), read_bytes(rows)
