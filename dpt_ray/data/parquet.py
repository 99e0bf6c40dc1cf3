"""Index of Parquet files that contain the images, as Hugging Face datasets writes them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dpt_ray.data.index import Row, build_index, image_column, image_structs
from dpt_ray.data.listing import SPLIT_NAMES, ForEach, file_stem, list_shards, split_of_shard
from dpt_ray.store.filesystem import open_exact


def index_parquet(
    uri: str,
    classes: Sequence[str] | None = None,
    split_names: Mapping[str, str] = SPLIT_NAMES,
    each: ForEach | None = None,
) -> tuple[pa.Table, list[str]]:
    """Return the index of one Parquet file or of all below a folder, and the class names.

    Each has one column struct<bytes, ...> of images and optionally a column `label` (negative: unknown).
    The id is the file's path below `uri` without suffix, the row, and the image's file name where the
    struct has a `path`: "train-00000-000041/n01440764_10026_n01440764". Offset is the row, length -1; no
    image bytes are read. Class names default to those of the file's Hugging Face metadata. The split is
    part of the file's name, as for tars. `each` looks into many files at a time.
    """
    shards = list_shards(uri, ".parquet")
    if classes is None:
        classes = _published_classes(shards[0][1])
    return build_index(_rows(shards, split_names, each), classes)


def has_images(file: str) -> bool:
    """Return whether a Parquet file contains images, and not what a manifest says of images elsewhere."""
    with _opened(file) as parquet:
        return bool(image_structs(parquet.schema_arrow))


def _rows(
    shards: Sequence[tuple[str, str]], split_names: Mapping[str, str], each: ForEach | None
) -> Iterator[Row]:
    uris = [shard for _, shard in shards]
    listed = each(_listed, uris) if each else map(_listed, uris)
    for (name, shard), images in zip(shards, listed, strict=True):
        split = split_of_shard(name, split_names)
        for row, (path, label) in enumerate(images):
            identifier = f"{name.removesuffix('.parquet')}-{row:06d}"
            yield f"{identifier}/{file_stem(path)}" if path else identifier, shard, row, -1, split, label


@contextmanager
def _opened(shard: str) -> Iterator[pq.ParquetFile]:
    with open_exact(shard) as file:
        try:
            yield pq.ParquetFile(file)
        except pa.ArrowInvalid as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{shard} is not a complete Parquet file ({reason}); write it again") from error


def _listed(shard: str) -> list[tuple[str | None, str | None]]:
    """Return the path and the label of each image of a file."""
    return list(_paths_and_labels(shard))


def _paths_and_labels(shard: str) -> Iterator[tuple[str | None, str | None]]:
    with _opened(shard) as parquet:
        schema = parquet.schema_arrow
        image = image_column(schema)
        named, labelled = schema.field(image).type.get_field_index("path") >= 0, "label" in schema.names
        columns = [f"{image}.path"] * named + ["label"] * labelled
        for batch in parquet.iter_batches(columns=columns):
            unknown = [None] * batch.num_rows
            paths = pc.struct_field(batch[image], "path").to_pylist() if named else unknown
            labels = batch["label"].cast(pa.string()).to_pylist() if labelled else unknown
            yield from zip(paths, labels, strict=True)


def _published_classes(shard: str) -> list[str] | None:
    """Return the names of the ClassLabel feature `label` in the file's metadata, None without one.

    Hugging Face datasets stores its features as JSON under the key "huggingface".
    """
    with _opened(shard) as parquet:
        metadata = parquet.schema_arrow.metadata or {}
    info = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {})
    return (info.get("features", {}).get("label") or {}).get("names")
