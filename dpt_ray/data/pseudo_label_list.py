"""Pseudo-labels from elsewhere, for example of a zero-shot classifier: a table of id, label, confidence."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePosixPath

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dpt_ray.data.index import class_id
from dpt_ray.data.lookup import nearest_id
from dpt_ray.data.tables import read_csv
from dpt_ray.store.filesystem import url_to_fs

COLUMNS = ("id", "label", "confidence")


def read_pseudo_label_list(uri: str, index: pa.Table, classes: Sequence[str]) -> pa.Table:
    """Return id, split, label (int32), class_name and confidence (float32) of a CSV or Parquet table.

    An id is the index's, a label a class name or a class id, a confidence lies in [0, 1]. Every training
    image needs a row; others may have one. Raises ValueError naming the first wrong row and the remedy.
    """
    table = _read(uri)
    _refuse_missing(uri, table)
    where = pc.index_in(table["id"], index["id"].combine_chunks())
    if where.null_count:
        lost = table["id"].filter(pc.is_null(where))[0].as_py()
        nearest = nearest_id(lost, index["id"])
        hint = f" (did you mean {nearest!r}?)" if nearest else ""
        raise ValueError(
            f"{uri}: no image {lost!r}{hint}, {where.null_count} such rows; correct or remove them"
        )
    _refuse_repeats(uri, table["id"])
    train = index.filter(pc.equal(index["split"], "train"))["id"]
    missing = train.filter(pc.invert(pc.is_in(train, value_set=table["id"])))
    if len(missing):
        raise ValueError(
            f"{uri}: {len(missing)} of {len(train)} training images have no row, the first is "
            f"{missing[0].as_py()!r}; give every training image a label"
        )
    _refuse_confidences(uri, table)
    labels = _class_ids(uri, table, classes)
    return pa.table(
        {
            "id": table["id"],
            "split": index["split"].take(where),
            "label": labels,
            "class_name": pa.array(classes, pa.string()).take(labels),
            "confidence": table["confidence"].cast(pa.float32()),
        }
    )


def _read(uri: str) -> pa.Table:
    fs, path = url_to_fs(uri)
    text = {"id": pa.string(), "label": pa.string(), "confidence": pa.float64()}
    with fs.open(path, "rb") as file:
        if PurePosixPath(path).suffix.lower() == ".parquet":
            table = pq.read_table(file)
        else:
            table = read_csv(file, uri, text)
    if lost := [name for name in COLUMNS if name not in table.column_names]:
        raise ValueError(f"{uri}: lacks the column {', '.join(lost)}; it needs {', '.join(COLUMNS)}")
    table = table.select(list(COLUMNS)).cast(pa.schema(text)).combine_chunks()
    if not len(table):
        raise ValueError(f"{uri}: has no rows")
    return table


def _refuse_missing(uri: str, table: pa.Table) -> None:
    for name in ("id", "label"):
        missing = pc.equal(pc.fill_null(table[name], ""), "")
        if count := pc.sum(missing).as_py():
            row = pc.index(missing, True).as_py()
            of = f" ({table['id'][row].as_py()!r})" if name == "label" else ""
            raise ValueError(
                f"{uri}: row {row + 1}{of} has no {name}, {count} such rows; fill them in or remove them"
            )


def _refuse_confidences(uri: str, table: pa.Table) -> None:
    found = table["confidence"]
    # A comparison with NaN is false, with null it is null.
    fits = pc.and_(pc.greater_equal(found, 0.0), pc.less_equal(found, 1.0))
    wrong = pc.invert(pc.fill_null(fits, False))
    if pc.any(wrong).as_py():
        row = pc.index(wrong, True).as_py()
        raise ValueError(
            f"{uri}: row {row + 1}: confidence {found[row].as_py()} of {table['id'][row].as_py()!r}; it must "
            "lie between 0 and 1: correct it"
        )


def _refuse_repeats(uri: str, ids: pa.ChunkedArray) -> None:
    counts = pc.value_counts(ids.combine_chunks())
    repeated = counts.filter(pc.greater(counts.field("counts"), 1))
    if len(repeated):
        raise ValueError(
            f"{uri}: {repeated[0].as_py()['values']!r} has {repeated[0].as_py()['counts']} rows "
            f"({len(repeated)} such images); keep one of each"
        )


def _class_ids(uri: str, table: pa.Table, classes: Sequence[str]) -> pa.Array:
    """Return the class ids (int32). Raises ValueError naming the first image of an unknown class."""
    by_name = {name: number for number, name in enumerate(classes)}
    coded = table["label"].combine_chunks().dictionary_encode()
    found = []
    for label in coded.dictionary.to_pylist():
        try:
            number = class_id(label, by_name)
            if number is None:
                raise ValueError(f"class {label} stands for an unknown one; name a class")
        except ValueError as error:
            first = table["id"].filter(pc.equal(table["label"], label))[0].as_py()
            raise ValueError(f"{uri}: {first!r}: {error}") from None
        found.append(number)
    return pa.array(found, pa.int32()).take(coded.indices)
