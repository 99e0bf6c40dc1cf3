"""The index: one row per image with the location of its bytes, its split and its true label if known.

A row's bytes are a whole file (offset 0, length its size or -1), a range of a tar shard, or, where
the uri ends in .parquet, row number `offset` of that file's image column (length -1). `classes.json`
beside the table lists the class names in class-id order.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import islice
from threading import Lock

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem

from dpt_ray.data.listing import IMAGE_SUFFIXES
from dpt_ray.store.filesystem import open_exact, url_to_fs

SPLITS = ("train", "validation", "test")
UNIQUE = "ids are unique, and a file's is its path without suffix: rename one, or list ids in a manifest"

SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("length", pa.int64(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("label", pa.int32()),
    ]
)

# The image column of generated and augmented images (`data.shards`).
OF_SHARD = pa.field("image", pa.binary())

# id, uri, offset, length, split, label as in the source (class name or number)
Row = tuple[str, str, int, int, str, str | None]
# (uri, number) -> the encoded images of a row group of a Parquet file
RowGroup = Callable[[str, int], pa.ChunkedArray]


def build_index(rows: Iterable[Row], classes: Sequence[str] | None = None) -> tuple[pa.Table, list[str]]:
    """Return the validated index of `rows`, in their order, and its classes.

    Memory is the table plus at most 65,536 rows. Labels become class ids by `encode_labels`.
    """
    draft = SCHEMA.set(5, pa.field("label", pa.string()))
    batches = []
    for chunk in _chunks(rows, 65_536):
        columns = [pa.array(c, f.type) for c, f in zip(zip(*chunk, strict=True), draft, strict=True)]
        batches.append(pa.RecordBatch.from_arrays(columns, schema=draft))
    table = pa.Table.from_batches(batches, draft)
    labels, names = encode_labels(table["label"], classes)
    table = table.set_column(5, SCHEMA.field("label"), labels)
    validate_index(table, names)
    return table, names


def _chunks(rows: Iterable[Row], size: int) -> Iterable[tuple[Row, ...]]:
    iterator = iter(rows)
    while chunk := tuple(islice(iterator, size)):
        yield chunk


def encode_labels(
    values: pa.ChunkedArray, classes: Sequence[str] | None = None
) -> tuple[pa.ChunkedArray, list[str]]:
    """Return (int32 class ids, class names) for labels given as class names or class numbers.

    Null, empty and negative values are unknown labels (null). Without `classes`, class names are those of
    `occurring_classes` (class id = rank, as in the published ImageNet lists). Raises ValueError for a value
    that is neither one of `classes` nor one of their numbers, and, without `classes`, GapsError for numbers
    with gaps: to fill them would add classes without images, to close them would shift published class ids.
    """
    text = values.cast(pa.string())
    distinct = [value for value in pc.unique(text).to_pylist() if value]
    if classes is None:
        classes = occurring_classes(distinct)
        _refuse_gaps(classes)
    by_name = {name: i for i, name in enumerate(classes)}
    ids = pa.array([class_id(value, by_name) for value in distinct], pa.int32())
    return pc.take(ids, pc.index_in(text, value_set=pa.array(distinct, pa.string()))), list(classes)


def occurring_classes(values: Sequence[str]) -> list[str]:
    """Return the class names of labels that come without them: sorted, or the numbers from 0 up by value."""
    numbers = {value: _integer(value) for value in values}
    known = {value: number for value, number in numbers.items() if number is None or number >= 0}
    if None in known.values():
        return sorted(known)
    return [str(number) for number in sorted({number for number in known.values() if number is not None})]


class GapsError(ValueError):
    """Labels are numbers with gaps; `classes` are those that occur, as names."""

    def __init__(self, text: str, classes: Sequence[str]) -> None:
        super().__init__(text)
        self.classes = list(classes)


def _refuse_gaps(classes: Sequence[str]) -> None:
    """Raise GapsError where most of the numbers from 0 occur as classes, and some do not.

    Far fewer than their range are names, such as GBIF's keys of species.
    """
    numbers = [number for number in map(_integer, classes) if number is not None]
    if len(numbers) < len(classes) or not len(numbers) <= max(numbers, default=-1) < 10 * len(numbers):
        return
    first = next(number for number in range(len(numbers)) if numbers[number] != number)
    missing = numbers[-1] + 1 - len(numbers)
    listed = f"={json.dumps(classes)}" if len(classes) <= 10 else ""
    raise GapsError(
        f"the labels are numbers up to {numbers[-1]}, and {missing} of them have no image, the first is "
        f"{first}; list the classes there are as data.classes{listed}, number them from 0, or write names",
        classes,
    )


def class_id(value: str, by_name: Mapping[str, int]) -> int | None:
    """Return the class id of a class name or number; None for a negative number (unknown).

    A name takes precedence over a number; where all names are numbers, a number is a name only.
    Raises ValueError for anything else.
    """
    if value in by_name:
        return by_name[value]
    number = _integer(value)
    if number is not None and number < 0:
        return None
    if str(number) in by_name:  # "7.0" or "007" for 7
        return by_name[str(number)]
    numbered = all(_integer(name) is not None for name in by_name)
    if not by_name:
        raise ValueError(
            f"unknown class {value!r}: the images come without classes; check data.uri, or name the classes "
            "with data.classes"
        )
    if number is None or numbered or number >= len(by_name):
        known = ", ".join(list(by_name)[:5])
        ids = "" if numbered else f" or a class id from 0 to {len(by_name) - 1}"
        raise ValueError(
            f"unknown class {value!r}; use one of the {len(by_name)} class names ({known}, ...){ids}"
        )
    return number


def _integer(value: str) -> int | None:
    """Parse "3", "-1" and the "3.0" that pandas writes for integers in a column with gaps."""
    return int(value.split(".")[0]) if re.fullmatch(r"-?\d+(\.0)?", value) else None


def validate_index(table: pa.Table, classes: Sequence[str] | None = None) -> None:
    """Raise ValueError, naming the first offenders, unless `table` is an index.

    Checked are the schema, at least one row, nulls in `label` only, unique ids, known splits, valid
    ranges and, with `classes`, their uniqueness and that every label is one of them.
    """
    if (table.schema.names, table.schema.types) != (SCHEMA.names, SCHEMA.types):
        found, needed = (", ".join(f"{f.name} {f.type}" for f in s) for s in (table.schema, SCHEMA))
        raise ValueError(f"the index has columns {found}; it needs {needed}")
    if table.num_rows == 0:
        raise ValueError(
            "the index has no images; check the uri and the kind of the source (files of images end in "
            f"{', '.join(IMAGE_SUFFIXES)})"
        )
    for name in SCHEMA.names[:5]:
        if table[name].null_count:
            raise ValueError(f"the index has {table[name].null_count} nulls in column {name}")
    counts = table.group_by("id", use_threads=False).aggregate([("id", "count")])
    _refuse(counts, pc.greater(counts["id_count"], 1), f"is used by several images; {UNIQUE}")
    known = pc.is_in(table["split"], value_set=pa.array(SPLITS))
    _refuse(table, pc.invert(known), f"has an unknown split; use one of {', '.join(SPLITS)}")
    bad = pc.or_(pc.less(table["offset"], 0), pc.less(table["length"], -1))
    _refuse(table, bad, "has a negative offset, or a length below -1")
    if classes is not None:
        if len(set(classes)) < len(classes):
            raise ValueError("two classes have the same name; class names are unique")
        bad = pc.or_(pc.less(table["label"], 0), pc.greater_equal(table["label"], len(classes)))
        _refuse(table, bad, f"has a label outside 0 to {len(classes) - 1}")


def _refuse(table: pa.Table, bad: pa.ChunkedArray, problem: str) -> None:
    ids = table["id"].filter(bad)
    if len(ids):
        first = ", ".join(ids[:5].to_pylist())
        raise ValueError(f"image id {problem}: {first} ({len(ids)} in all)")


def read_bytes(rows: pa.Table, row_group: RowGroup | None = None) -> list[bytes]:
    """Return the bytes of the index rows, in their order; a null in a Parquet column gives b"".

    Each uri is opened once, and ranges of object stores are read concurrently. Parquet images are read
    by row group, by default with a cache of the last one: pass those rows in order. Raises OSError, naming
    the uri, where a file is missing, access is denied or a store fails.
    """
    found: list[bytes] = [b""] * rows.num_rows
    requests: dict[str, list[tuple[int, int, int]]] = {}
    columns = (rows[name].to_pylist() for name in ("uri", "offset", "length"))
    for position, (uri, offset, length) in enumerate(zip(*columns, strict=True)):
        if length != 0:  # object stores reject an empty range
            requests.setdefault(uri, []).append((offset, length, position))
    remote: dict[AbstractFileSystem, list[tuple[str, str, int, int, int]]] = {}
    for uri, ranges in requests.items():
        fs, path = url_to_fs(uri)
        if fs.async_impl and not _is_parquet(uri):
            remote.setdefault(fs, []).extend((uri, path, *request) for request in ranges)
            continue
        try:
            of_group = row_group or _last_row_group
            read = (
                _read_parquet_rows(uri, ranges, of_group) if _is_parquet(uri) else _read_ranges(uri, ranges)
            )
            for (_, _, position), data in zip(ranges, read, strict=True):
                found[position] = data
        except OSError as error:
            raise _unreadable(uri, error) from error
    for fs, ranges_of_fs in remote.items():
        uris, paths, offsets, lengths, positions = zip(*ranges_of_fs, strict=True)
        ends = [o + n if n >= 0 else None for o, n in zip(offsets, lengths, strict=True)]
        results = fs.cat_ranges(list(paths), list(offsets), ends, on_error="return")
        for uri, position, data in zip(uris, positions, results, strict=True):
            if isinstance(data, Exception):
                raise _unreadable(uri, data) from data
            found[position] = data
    return found


def _unreadable(uri: str, error: Exception) -> OSError:
    """Return the error with the file's uri, which those of object stores do not name."""
    if isinstance(error, PermissionError):
        return PermissionError(f"access denied to {uri}; check the credentials")
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(f"{uri} does not exist any more; restore it or index the images again")
    return OSError(f"{uri} cannot be read ({' '.join(str(error).split()) or type(error).__name__})")


def _is_parquet(uri: str) -> bool:
    return uri.lower().endswith(".parquet")


def _read_ranges(uri: str, ranges: list[tuple[int, int, int]]) -> Iterator[bytes]:
    fs, path = url_to_fs(uri)
    with fs.open(path, "rb") as file:
        for offset, length, _ in ranges:
            file.seek(offset)
            yield file.read(length)


def _read_parquet_rows(uri: str, ranges: list[tuple[int, int, int]], row_group: RowGroup) -> Iterator[bytes]:
    starts = _row_group_starts(uri)
    for row, _, _ in ranges:
        if not 0 <= row < starts[-1]:
            raise ValueError(
                f"{uri} has {starts[-1]} rows, the index refers to row {row}; index the images again"
            )
        group = int(np.searchsorted(starts, row, side="right")) - 1
        yield row_group(uri, group)[row - starts[group]].as_py() or b""


@lru_cache(maxsize=64)  # some hundred KB each
def _parquet_metadata(uri: str) -> pq.FileMetaData:
    with open_exact(uri) as file:
        return pq.read_metadata(file)


@lru_cache(maxsize=1024)
def _row_group_starts(uri: str) -> np.ndarray:
    metadata = _parquet_metadata(uri)
    sizes = [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)]
    return np.cumsum([0, *sizes])


def read_row_group(uri: str, group: int) -> pa.ChunkedArray:
    """Return the encoded images of a row group of a Parquet file."""
    metadata = _parquet_metadata(uri)
    with open_exact(uri) as file:
        parquet = pq.ParquetFile(file, metadata=metadata)
        if not image_structs(parquet.schema_arrow) and OF_SHARD in list(parquet.schema_arrow):
            return parquet.read_row_group(group, columns=[OF_SHARD.name])[OF_SHARD.name]
        name = image_column(parquet.schema_arrow)
        column = parquet.read_row_group(group, columns=[f"{name}.bytes"])[name]
    return pc.struct_field(column, "bytes")


_of_last_row_group = lru_cache(maxsize=1)(read_row_group)
_one_reader = Lock()


def _last_row_group(uri: str, group: int) -> pa.ChunkedArray:
    with _one_reader:  # else each of several threads would read and hold the row group
        return _of_last_row_group(uri, group)


def image_column(schema: pa.Schema) -> str:
    """Return the name of the image column, a struct with a field `bytes`."""
    names = image_structs(schema)
    if len(names) != 1:
        raise ValueError(
            f"expected one image column, a struct with a field bytes, among {schema.names}, "
            f"found {names}; write the images as Hugging Face datasets does"
        )
    return names[0]


def image_structs(schema: pa.Schema) -> list[str]:
    """Return the names of the columns that are structs with a field `bytes`."""
    return [
        field.name
        for field in schema
        if pa.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0
    ]
