"""index: one row per image, saying where its bytes are, its split and its true label if known."""

from __future__ import annotations

import hashlib
from typing import Any

import pyarrow as pa
from sklearn import __version__ as sklearn_version

from dpt_ray.config import ConfigError
from dpt_ray.config.sections import Data
from dpt_ray.data.digits import write_digits
from dpt_ray.data.labels import read_label_list
from dpt_ray.data.listing import SPLIT_NAMES, open_root, version, walk_versions
from dpt_ray.data.sources import INDEXERS, SUFFIXES
from dpt_ray.data.splits import assign_splits
from dpt_ray.data.units import INDEX, write_index
from dpt_ray.engine.node import Task
from dpt_ray.store.artifact import sha256


def fingerprint(data: Data) -> str:
    """A hash of the source's files: other files, another run. Files of other kinds beside them do not count.

    Images and shards are listed, never read: they count by name and size, and by their ETag where a remote
    listing tells it. A manifest counts by its content; the images it lists, by what it says of them.
    """
    if data.source == "digits":
        return f"scikit-learn {sklearn_version.split('.')[0]}"
    assert data.uri is not None  # checked by Data
    digest = hashlib.sha256()
    try:
        fs, root = open_root(data.uri)
        if not fs.exists(root):
            raise FileNotFoundError("does not exist")
        if data.source == "manifest":
            return sha256(data.uri)[:16]
        one = [("", int(fs.size(root)), version(fs.info(root)))] if fs.isfile(root) else None
        suffixes = SUFFIXES[data.source]
        listed = (file for file in walk_versions(fs, root) if file[0].lower().endswith(suffixes))
        for name, size, tag in one or listed:
            facts = [name, str(size), tag] if tag else [name, str(size)]
            digest.update(("\0".join(facts) + "\n").encode())
    except Exception as error:  # every kind of storage has errors of its own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(
            f"data.uri: {data.uri!r} cannot be read ({reason}); check the path and the credentials"
        ) from error
    return digest.hexdigest()[:16]


def make(task: Task) -> dict[str, Any]:
    """Builds the index once; later stages read its row groups."""
    data = Data(**{key: task.settings[key] for key in Data.model_fields})
    try:
        table, classes = _build(data, task)
    except ValueError as error:
        raise ConfigError(f"data: {error}") from error
    with task.out.writing(INDEX) as path:
        units = write_index(path, table)
    task.out.write_json("classes.json", classes)
    return {"rows": table.num_rows, "units": units, "classes": len(classes), "mode": data.mode}


def _build(data: Data, task: Task) -> tuple[pa.Table, list[str]]:
    if data.source == "digits":
        return write_digits(task.out.uri)
    assert data.uri is not None
    table, classes = INDEXERS[data.source](data.uri, data.classes or None, SPLIT_NAMES | data.splits)
    if data.validation or data.test:
        lists = [
            read_label_list(uri, task.settings["list_format"], table, classes) for uri in data.keep_in_train
        ]
        kept = {identifier for listed in lists for identifier in listed["id"].to_pylist()}
        table = assign_splits(table, data.validation, data.test, data.split_seed, kept)
    return table, classes
