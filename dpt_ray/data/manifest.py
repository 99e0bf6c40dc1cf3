"""Index of a table of images: Parquet or CSV with `uri` or `id`, and optional `label` and `split`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem

from dpt_ray.data.index import Row, build_index
from dpt_ray.data.listing import SPLIT_NAMES, list_directory, open_root
from dpt_ray.data.tables import read_csv

TEXT_COLUMNS = ("id", "uri", "label", "split")
PLACE_COLUMNS = ("offset", "length")
COLUMNS = (*TEXT_COLUMNS, *PLACE_COLUMNS)


def index_manifest(
    uri: str,
    classes: Sequence[str] | None = None,
    split_names: Mapping[str, str] = SPLIT_NAMES,
    *,
    images_alone: bool = False,
) -> tuple[pa.Table, list[str]]:
    """Return the index of the images that a manifest lists, in its order, and the class names.

    Column `uri` has URIs, or paths relative to the manifest; it defaults to `id`, and `id` to the uri
    without suffix. `label` is a class name or number, empty where unknown; an empty `split` is train.
    With `length` (and `offset`) a row is a range of its file; otherwise each folder is listed once for
    the sizes, and missing files raise ValueError. With `images_alone` labels and splits are not looked at.
    """
    fs, path = open_root(uri)
    table = _read(fs, path)
    if images_alone:
        table = table.drop_columns([name for name in ("label", "split") if name in table.column_names])
    key = "uri" if "uri" in table.column_names else "id"
    given = table[key]
    _check_given(given, key, uri)
    folder = fs.unstrip_protocol(path).rpartition("/")[0]
    is_whole = pc.match_substring_regex(given, r"^(/|\w+://)")
    uris = pc.if_else(is_whole, given, pc.binary_join_element_wise(folder, given, "/"))

    def column(name: str, otherwise: pa.Scalar) -> pa.ChunkedArray:
        if name in table.column_names:
            return table[name]
        return pa.chunked_array([pa.repeat(otherwise, len(uris))])

    has_lengths = "length" in table.column_names
    columns = {
        "id": table["id"] if "id" in table.column_names else _without_suffix(given),
        "uri": uris,
        "offset": column("offset", pa.scalar(0)),
        "length": table["length"] if has_lengths else _file_sizes(uris, uri),
        "split": column("split", pa.scalar("")),
        "label": pc.utf8_trim_whitespace(column("label", pa.scalar(None, pa.string()))),
    }
    return build_index(_rows(pa.table(columns), split_names, uri), classes)


def _read(fs: AbstractFileSystem, path: str) -> pa.Table:
    with fs.open(path, "rb") as file:
        if path.lower().endswith(".csv"):
            types = dict.fromkeys(TEXT_COLUMNS, pa.string()) | dict.fromkeys(PLACE_COLUMNS, pa.int64())
            table = read_csv(file, f"manifest {path}", types)
            found = table.column_names
        elif path.lower().endswith(".parquet"):
            found = pq.read_schema(file).names
            names = [name for name in found if name in COLUMNS]
            table = pq.read_table(file, columns=names)
        else:
            raise ValueError(f"manifest {path} is neither .csv nor .parquet; write it as one of them")
    meant = {name: name.strip().lower() for name in found if name not in COLUMNS}
    if wrong := next((name for name, known in meant.items() if known in COLUMNS), None):
        raise ValueError(f"manifest {path} has a column {wrong!r}; write it {meant[wrong]!r}")
    if not {"id", "uri"} & set(table.column_names):
        raise ValueError(f"manifest {path} has columns {table.column_names}; it needs uri or id")
    for i, name in enumerate(table.column_names):
        if name in TEXT_COLUMNS:
            if pa.types.is_floating(table[name].type):  # pandas and numpy write NaN where there is no label
                known = pc.is_finite(table[name])
                table = table.set_column(i, name, pc.if_else(known, table[name], None))
            table = table.set_column(i, name, table[name].cast(pa.string()))
    return table


def _check_given(given: pa.ChunkedArray, key: str, manifest: str) -> None:
    if not len(given):
        raise ValueError(f"manifest {manifest} lists no images; write a row per image")
    missing = pc.equal(pc.fill_null(given, ""), "")
    if count := pc.sum(missing).as_py():
        first = pc.index(missing, True).as_py() + 1
        raise ValueError(
            f"manifest {manifest} has {count} row(s) without {key}, the first is row {first}; "
            "fill them in or remove them"
        )


def _without_suffix(given: pa.ChunkedArray) -> pa.ChunkedArray:
    path = pc.replace_substring_regex(given, r"^\w+://|^/", "")
    return pc.replace_substring_regex(path, r"\.[^./]*$", "")


def _file_sizes(uris: pa.ChunkedArray, manifest: str) -> pa.ChunkedArray:
    """Return the size of each file, listing every folder once, with one listing in memory."""
    parents = pc.replace_substring_regex(uris, "/[^/]*$", "/").combine_chunks().dictionary_encode()
    names = pc.replace_substring_regex(uris, "^.*/", "").combine_chunks()
    folder_of = parents.indices.to_numpy()
    by_folder = np.argsort(folder_of, kind="stable")
    ends = np.cumsum(np.bincount(folder_of, minlength=len(parents.dictionary)))
    sizes = np.empty(len(uris), np.int64)
    for folder, rows in zip(parents.dictionary, np.split(by_folder, ends[:-1]), strict=True):
        fs, path = open_root(folder.as_py())
        found = list_directory(fs, path) if fs.isdir(path) else []
        listed = {name: size for name, _, size, _ in found}
        wanted = names.take(pa.array(rows)).to_pylist()
        missing = [f"{folder}{name}" for name in wanted if name not in listed]
        if missing:
            raise ValueError(
                f"manifest {manifest} lists files that do not exist: {', '.join(missing[:5])} "
                f"({len(missing)} in that folder); correct or remove their rows"
            )
        sizes[rows] = [listed[name] for name in wanted]
    return pa.chunked_array([pa.array(sizes)])


def _rows(table: pa.Table, split_names: Mapping[str, str], manifest: str) -> Iterator[Row]:
    for batch in table.to_batches(max_chunksize=65_536):
        for row in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            identifier, uri, offset, length, split, label = row
            name = (split or "train").lower()
            if name not in split_names:
                raise ValueError(
                    f"manifest {manifest}: {identifier} has split {split!r}; "
                    f"use one of {', '.join(split_names)}"
                )
            yield identifier, uri, offset, length, split_names[name], label
