"""The few labels: drawn from the true ones, or read from a list. A table of (id, label)."""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Mapping, Sequence
from typing import Literal, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from dpt_ray.data.index import class_id, occurring_classes
from dpt_ray.data.listing import file_stem, is_in_shard
from dpt_ray.data.lookup import find_images, nearest_id
from dpt_ray.data.splits import draw_key
from dpt_ray.store.filesystem import url_to_fs

SCHEMA = pa.schema([("id", pa.string()), ("label", pa.int32())])


def draw_labels(index: pa.Table, per_class: int, seed: int, classes: Sequence[str] | None = None) -> pa.Table:
    """Return (id, label) of `per_class` images of each class of the train split, by (label, id).

    The draw depends on the seed and the ids only, not on the order of rows, and is nested: that of
    n images per class is part of that of n + 1. Raises ValueError naming the class and its count
    where a class has fewer; without `classes`, the classes are the labels that the index has.
    """
    if per_class < 1:
        raise ValueError(f"labels per class is {per_class}; it must be at least 1")
    labelled = index.filter(pc.is_valid(index["label"]))
    names = (
        dict(enumerate(classes))
        if classes is not None
        else {label: str(label) for label in pc.unique(labelled["label"]).to_pylist()}
    )
    if not names:
        raise ValueError("the index has no true labels to draw from; give a label list")
    ids: dict[int, list[str]] = {label: [] for label in names}
    train = labelled.filter(pc.equal(labelled["split"], "train"))
    for identifier, label in zip(train["id"].to_pylist(), train["label"].to_pylist(), strict=True):
        ids[label].append(identifier)
    drawn = []
    for label in sorted(names):
        if len(ids[label]) < per_class:
            raise ValueError(
                f"class {names[label]} has {len(ids[label])} labelled training images, "
                f"{per_class} per class were asked for; ask for fewer"
            )
        first = sorted(ids[label], key=lambda i: draw_key(seed, i))[:per_class]
        drawn += [(identifier, label) for identifier in sorted(first)]
    return _table(drawn)


def _table(labels: Sequence[tuple[str, int]]) -> pa.Table:
    columns = zip(*labels, strict=True)
    return pa.table([pa.array(c, t) for c, t in zip(columns, SCHEMA.types, strict=True)], SCHEMA)


class Entry(NamedTuple):
    """One line of a label list: `key` names the image (csv) or is a file name's stem (published)."""

    line: int
    key: str
    label: str


def read_label_list(
    uri: str, format: Literal["csv", "published"], index: pa.Table, classes: Sequence[str]
) -> pa.Table:
    """Return (id, label) of a label list, in its order.

    csv: columns `id,label`, the id as `find_images` takes it, the label a class name or a class id.
    published: one file name such as n04235860_14959.JPEG per line, its class the text before the first
    "_", joined to the images by file name without suffix. Where the images' classes go by other names
    (Hugging Face's ImageNet says "tench, Tinca tinca"), a list of as many classes tells them by rank, as
    the published class ids do.
    Windows line ends and blank lines are accepted.

    Raises ValueError naming the line: an image or class that does not exist, an image listed twice
    (with one label or two), a file name that several images have, an image outside the train split.
    """
    entries = _read_entries(uri, format)
    if not entries:
        raise ValueError(f"label list {uri} is empty; list at least one labelled image")
    listed = sorted({entry.label for entry in entries})
    ranked = format == "published" and len(listed) == len(classes) and set(listed).isdisjoint(classes)
    by_name = {name: i for i, name in enumerate(listed if ranked else classes)}
    find = _find_published if format == "published" else find_images
    images = find(index, {entry.key for entry in entries})
    labels: list[tuple[str, int]] = []
    seen: dict[str, tuple[int, int]] = {}
    for entry in entries:
        where = f"label list {uri} line {entry.line}"
        label = _label(entry, by_name, format, where)
        image = _image(entry, images, index, where)
        line, first = seen.setdefault(image, (entry.line, label))
        if line != entry.line:
            problem = "repeats" if first == label else f"(class {classes[label]}) contradicts"
            raise ValueError(
                f"{where} {problem} line {line} (class {classes[first]}) for {entry.key}; remove one"
            )
        labels.append((image, label))
    return _table(labels)


def class_names(uri: str) -> list[str]:
    """Return the classes that a csv label list names, in class-id order, where the images do not say.

    Of numbers, those that occur: a class that no line names would have no label.
    """
    return occurring_classes([entry.label for entry in _read_entries(uri, "csv")])


def is_empty_list(uri: str, format: str) -> bool:
    """Return whether a label list has no line yet, besides the names of its columns."""
    return not _read_entries(uri, format)


def unlabelled(labels: pa.Table, classes: Sequence[str]) -> str:
    """Return a line that names the classes without a row in a table of (id, label); "" where all have one."""
    seen = set(pc.unique(labels["label"]).to_pylist())
    names = [name for number, name in enumerate(classes) if number not in seen]
    if not names:
        return ""
    return (
        f"warning: no label of {', '.join(names[:5])} ({len(names)} of {len(classes)} classes); label an "
        "image of each, or it is never predicted"
    )


def _read_entries(uri: str, format: str) -> list[Entry]:
    fs, path = url_to_fs(uri)
    try:
        text = fs.cat_file(path).decode("utf-8-sig")  # spreadsheets start their CSV with a BOM
    except UnicodeDecodeError as error:
        raise ValueError(f"label list {uri} is not UTF-8 text ({error.reason}); save it as such") from None
    if format == "published":
        lines = [(i, line.strip()) for i, line in enumerate(text.splitlines(), start=1)]
        return [Entry(i, file_stem(line), line.partition("_")[0]) for i, line in lines if line]
    if format != "csv":
        raise ValueError(f"label list format is {format!r}; use csv or published")
    reader = csv.DictReader(io.StringIO(text, newline=""))
    if not {"id", "label"} <= set(reader.fieldnames or ()):
        raise ValueError(f"label list {uri} line 1: columns {reader.fieldnames}; it needs id,label")
    entries: list[Entry] = []
    try:
        for row in reader:
            entries.append(Entry(reader.line_num, row["id"] or "", (row["label"] or "").strip()))
            _refuse_misread(row, f"label list {uri} line {reader.line_num}")
    except csv.Error as error:  # a value that is longer than any is meant to be
        begun = entries[-1].line + 1 if entries else 2
        raise ValueError(f"label list {uri} line {begun}: {error}; close its quotation mark") from None
    for entry in entries:
        if not entry.key.strip():
            raise ValueError(
                f"label list {uri} line {entry.line}: the row has no id; name its image or remove the line"
            )
        if not entry.label.strip():
            raise ValueError(
                f"label list {uri} line {entry.line}: {entry.key} has no label; give one or remove the line"
            )
    return entries


def _refuse_misread(row: Mapping[str | None, object], where: str) -> None:
    """Raise ValueError where a comma or a quotation mark has cut a row in other fields than were meant."""
    if None in row:
        raise ValueError(
            f"{where}: more fields than the first line has; put a value that has a comma in quotation marks"
        )
    if "\n" in f"{row['id']}{row['label']}":
        raise ValueError(f"{where}: a value goes over several lines; close its quotation mark")


def _label(entry: Entry, by_name: Mapping[str, int], format: str, where: str) -> int:
    try:
        label = class_id(entry.label, by_name) if format == "csv" else by_name.get(entry.label)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if label is None:
        raise ValueError(
            f"{where}: unknown class {entry.label!r}; it is none of the class names (data.classes names them)"
        )
    return label


def _image(entry: Entry, images: Mapping[str, list[tuple[str, str]]], index: pa.Table, where: str) -> str:
    found = images.get(entry.key, [])
    if not found:
        nearest = nearest_id(entry.key, index["id"])
        hint = f" (did you mean {nearest!r}?)" if nearest else ""
        raise ValueError(f"{where}: no image {entry.key!r} in the index{hint}; correct or remove the line")
    if len(found) > 1:
        ids = ", ".join(identifier for identifier, _ in found[:5])
        raise ValueError(f"{where}: {entry.key!r} could be any of {ids}; use a csv list with ids")
    identifier, split = found[0]
    if split != "train":
        raise ValueError(
            f"{where}: {identifier} is in the {split} split; only train has labels: remove the line"
        )
    return identifier


def _find_published(index: pa.Table, keys: Collection[str]) -> dict[str, list[tuple[str, str]]]:
    """Return the (id, split) of the images that each published name means."""
    found: dict[str, list[tuple[str, str]]] = {}
    for batch in index.select(["id", "uri", "split"]).to_batches(max_chunksize=65_536):
        for identifier, uri, split in zip(*(c.to_pylist() for c in batch.columns), strict=True):
            # In a shard the id has the file's name.
            key = _published_name(identifier if is_in_shard(uri) else uri)
            if key in keys:
                found.setdefault(key, []).append((identifier, split))
    return found


def _published_name(path: str) -> str:
    """Return the file's stem, without the class that Hugging Face's ImageNet repeats at its end."""
    stem = file_stem(path)
    name, _, repeated = stem.rpartition("_")
    return name if "_" in name and stem.startswith(f"{repeated}_") else stem
