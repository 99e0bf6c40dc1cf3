"""Index of Parquet files that contain the images, as Hugging Face datasets writes them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dpt_ray.data.index import Row, build_index, image_column, image_structs
from dpt_ray.data.listing import SPLIT_NAMES, ForEach, file_stem, list_shards, splits_of_shards
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
    image bytes are read. Class names default to those of the first file's Hugging Face metadata, among which
    integers are ranks: 2 is "10" of "0", "1", "10", "2". With other `classes` they are ranks among these. The
    split is part of the file's name, as for tars. `each` looks into many files at a time.
    """
    shards = list_shards(uri, ".parquet")
    names = _published_classes(shards[0][1])
    if classes is None:
        classes = names
    ranked = names if names and set(names) <= set(classes or ()) else None
    return build_index(_rows(shards, split_names, each, ranked), classes)


def has_images(file: str) -> bool:
    """Return whether a Parquet file contains images, and not what a manifest says of images elsewhere."""
    with _opened(file) as parquet:
        return bool(image_structs(parquet.schema_arrow))


def _rows(
    shards: Sequence[tuple[str, str]],
    split_names: Mapping[str, str],
    each: ForEach | None,
    ranked: Sequence[str] | None,
) -> Iterator[Row]:
    splits = splits_of_shards([name for name, _ in shards], split_names)
    uris = [shard for _, shard in shards]
    look = partial(_listed, ranked=ranked)
    listed = each(look, uris) if each else map(look, uris)
    for (name, shard), split, images in zip(shards, splits, listed, strict=True):
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


def _listed(shard: str, ranked: Sequence[str] | None) -> list[tuple[str | None, str | None]]:
    """Return the path and the label of each image of a file; integers are ranks in `ranked`, if given."""
    return list(_paths_and_labels(shard, ranked))


def _paths_and_labels(shard: str, ranked: Sequence[str] | None) -> Iterator[tuple[str | None, str | None]]:
    with _opened(shard) as parquet:
        schema = parquet.schema_arrow
        image = image_column(schema)
        named, labelled = schema.field(image).type.get_field_index("path") >= 0, "label" in schema.names
        columns = [f"{image}.path"] * named + ["label"] * labelled
        for batch in parquet.iter_batches(columns=columns):
            unknown = [None] * batch.num_rows
            paths = pc.struct_field(batch[image], "path").to_pylist() if named else unknown
            labels = _as_text(batch["label"], shard, ranked).to_pylist() if labelled else unknown
            yield from zip(paths, labels, strict=True)


def _as_text(labels: pa.Array, shard: str, ranked: Sequence[str] | None) -> pa.Array:
    """Return labels as names or numbers in text, null where unknown."""
    if pa.types.is_dictionary(labels.type):
        labels = labels.dictionary_decode()
    if pa.types.is_floating(labels.type):  # as pandas writes integers with gaps
        return pc.if_else(pc.is_nan(labels), None, labels).cast(pa.string())
    if pa.types.is_nested(labels.type):
        raise ValueError(f"{shard} has labels of type {labels.type}; write one name or number an image")
    if not ranked or not pa.types.is_integer(labels.type):
        return labels.cast(pa.string())
    most = pc.max(labels).as_py()
    if most is not None and most >= len(ranked):
        raise ValueError(
            f"{shard} has label {most}, and its metadata names {len(ranked)} classes; correct one"
        )
    ranks = pc.if_else(pc.greater_equal(labels, 0), labels, None).cast(pa.int64())
    return pa.array(ranked, pa.string()).take(ranks)


def columns_of_classes(uri: str) -> list[str]:
    """Return the ClassLabel columns of the first file that are not called `label`, and so are not read."""
    features = _features(list_shards(uri, ".parquet")[0][1])
    kinds = {name: kind.get("_type") for name, kind in features.items() if isinstance(kind, dict)}
    return [name for name, kind in kinds.items() if kind == "ClassLabel" and name != "label"]


def _published_classes(shard: str) -> list[str] | None:
    """Return the names of the ClassLabel feature `label` in the file's metadata, None without one."""
    return (_features(shard).get("label") or {}).get("names")


def _features(shard: str) -> dict[str, Any]:
    """Return the features, which Hugging Face datasets stores as JSON under the key "huggingface"."""
    with _opened(shard) as parquet:
        metadata = parquet.schema_arrow.metadata or {}
    found = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    return cast(dict[str, Any], found)
