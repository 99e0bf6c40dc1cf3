"""Features, moments and images on disk: one file a shard, joined by id, opened by plain pyarrow.

Features and images are Parquet; moments are uncompressed Arrow IPC, so that a row is read where it lies
in the memory-mapped file.
"""

from __future__ import annotations

import io
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dpt_ray.store.artifact import Artifact
from dpt_ray.store.filesystem import open_exact
from dpt_ray.store.records import Shard

THREADS = 16  # concurrent reads of remote shards
ROW_GROUP = 2 << 20  # bytes of the image files in a row group; to read one of them at random, all are read


def write_features(
    path: Path, ids: Sequence[str], features: np.ndarray, columns: Mapping[str, pa.Array] | None = None
) -> None:
    """Write rows of `id` and `feature` (n, dim) float32 as Parquet, with other columns."""
    known = {"id": pa.array(ids, pa.string()), "feature": _fixed(features, pa.float32())}
    pq.write_table(pa.table({**known, **(columns or {})}), path)


def read_features(
    artifact: Artifact, whole: Collection[str] | None = None, ids: pa.Array | None = None
) -> tuple[pa.Array, np.ndarray]:
    """Return ids and features (n, dim) float32 of an artifact, in shard order, one copy in memory.

    With `whole`, only those shards are read completely, and only the images `ids` of the others.
    """
    shards = [shard for shard in artifact.listed_shards() if shard["rows"]]
    if not shards:
        raise ValueError(f"{artifact.uri}: holds no rows")
    is_whole = [whole is None or shard["shard"] in whole for shard in shards]
    most = sum(shard["rows"] for shard, all_of_it in zip(shards, is_whole, strict=True) if all_of_it)
    most += 0 if ids is None else len(ids)
    found: list[pa.Array] = []
    dim = pq.read_schema(artifact.local_file(shards[0]["file"])).field("feature").type.list_size
    features = np.empty((most, dim), np.float32)
    row = 0
    for shard, all_of_it in zip(shards, is_whole, strict=True):
        if not all_of_it and ids is None:
            continue
        names, block = read_feature_shard(artifact, shard, None if all_of_it else ids)
        features[row : row + len(block)] = block
        found += names.chunks
        row += len(block)
    return pa.chunked_array(found, pa.string()).combine_chunks(), features[:row]


def read_feature_shard(
    artifact: Artifact, shard: Shard, ids: pa.Array | None = None
) -> tuple[pa.ChunkedArray, np.ndarray]:
    """Return ids and read-only features (n, dim) float32 of a non-empty shard, or of its images `ids`."""
    file = pq.ParquetFile(artifact.local_file(shard["file"]))
    names = file.read(["id"])["id"]
    if ids is None:
        return names, matrix(file.read(["feature"]).combine_chunks()["feature"].chunk(0))
    wanted = pc.is_in(names, value_set=ids)
    if not pc.any(wanted).as_py():  # most shards: their features stay unread
        return names.slice(0, 0), np.empty((0, file.schema_arrow.field("feature").type.list_size), np.float32)
    block = matrix(file.read(["feature"]).combine_chunks()["feature"].chunk(0))
    return names.filter(wanted), block[wanted.to_numpy()]


def write_moments(path: Path, ids: Sequence[str], moments: np.ndarray) -> None:
    """Write rows of `id` and `moments` (n, ...) float16 as an uncompressed Arrow IPC file."""
    values = math.prod(moments.shape[1:])
    flat = _fixed(moments.reshape(len(moments), values).astype(np.float16), pa.float16())
    table = pa.table({"id": pa.array(ids, pa.string()), "moments": flat})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def write_images(
    path: Path, images: Sequence[np.ndarray], columns: Mapping[str, pa.Array | list[str]]
) -> None:
    """Write uint8 (H, W, C) images as PNG bytes in column `image`, with other columns, in row groups."""
    files = pa.array(map(encode_png, images), pa.binary())
    rows = ROW_GROUP * len(files) // max(files.nbytes, 1)
    pq.write_table(pa.table({**columns, "image": files}), path, row_group_size=max(rows, 1))


def read_images(artifact: Artifact) -> Iterator[pa.Table]:
    """Yield the shards of an image artifact (of its extent), one table each."""
    for shard in artifact.listed_shards():
        yield read_image_shard(artifact, shard)


def read_image_shard(artifact: Artifact, shard: Shard) -> pa.Table:
    """Return one shard of images."""
    return pq.read_table(artifact.local_file(shard["file"]))


def read_columns(
    artifact: Artifact, columns: Sequence[str], shards: Sequence[Shard] | None = None
) -> pa.Table:
    """Return some columns of Parquet shards (all of the extent), without what else the shards hold."""
    read = partial(read_shard_columns, artifact, columns=columns)
    with ThreadPoolExecutor(THREADS) as threads:  # a remote shard is a wait for each of its row groups
        return pa.concat_tables(threads.map(read, artifact.listed_shards() if shards is None else shards))


def read_shard_columns(artifact: Artifact, shard: Shard, columns: Sequence[str]) -> pa.Table:
    """Return some columns of a Parquet shard; of a remote one no more than these is read."""
    with open_exact(artifact.file_uri(shard["file"])) as file:
        return pq.read_table(file, columns=list(columns))


def encode_png(image: np.ndarray, texts: Mapping[str, str] | None = None) -> bytes:
    """Return the PNG file of a uint8 (H, W, C) image with one or three channels, with texts by keyword."""
    buffer, info = io.BytesIO(), PngInfo()
    for keyword, text in (texts or {}).items():
        info.add_text(keyword, text)
    Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def _fixed(values: np.ndarray, kind: pa.DataType) -> pa.FixedSizeListArray:
    flat = pa.array(np.ascontiguousarray(values).reshape(-1), kind)
    return pa.FixedSizeListArray.from_arrays(flat, values.shape[1])


def matrix(column: pa.FixedSizeListArray) -> np.ndarray:
    """Return the rows of a fixed-size list as a matrix (n, list size), without a copy."""
    size = column.type.list_size
    values = column.values.slice(column.offset * size, len(column) * size)
    return values.to_numpy(zero_copy_only=True).reshape(-1, size)
