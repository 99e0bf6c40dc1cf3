"""index: one row per image with the location of its bytes, its split and its true label if known."""

from __future__ import annotations

from typing import Annotated

import pyarrow as pa

from dpt_ray.cluster.shards import InTasks
from dpt_ray.config import ConfigError
from dpt_ray.config.hashing import HashedIfSet
from dpt_ray.config.sections import Data, ListFormat
from dpt_ray.data.digits import write_digits
from dpt_ray.data.labels import read_label_list
from dpt_ray.data.listing import SPLIT_NAMES
from dpt_ray.data.sources import index_source
from dpt_ray.data.splits import assign_splits
from dpt_ray.data.units import write_index
from dpt_ray.engine.node import Stage, Task
from dpt_ray.store.records import Facts


class IndexSettings(Data):
    """Adds the source's `fingerprint`, and the digests and format of the `keep_in_train` lists."""

    fingerprint: str
    lists: Annotated[tuple[str, ...] | None, HashedIfSet] = None
    list_format: Annotated[ListFormat | None, HashedIfSet] = None


class Index(Stage[IndexSettings]):
    """The table of images, read by row group, and the class names."""

    artifact = "index"
    settings = IndexSettings

    @classmethod
    def make(cls, task: Task[IndexSettings]) -> Facts:
        """Publish the files of the index and `classes.json`."""
        data = task.settings
        try:
            table, classes = _build(data, task)
        except ValueError as error:
            raise ConfigError(f"data: {error}") from error
        units = write_index(task.out, table)
        task.out.write_json("classes.json", classes)
        return {"rows": table.num_rows, "units": units, "classes": len(classes), "mode": data.mode}


def _build(data: IndexSettings, task: Task[IndexSettings]) -> tuple[pa.Table, list[str]]:
    if data.source == "digits":
        return write_digits(task.out.uri)
    assert data.uri is not None  # checked by Data
    splits, each = SPLIT_NAMES | data.splits, InTasks(task.compute, task.progress)
    table, classes = index_source(data.source, data.uri, data.classes or None, splits, each)
    if data.validation or data.test:
        list_format = data.list_format or "csv"
        lists = [read_label_list(uri, list_format, table, classes) for uri in data.keep_in_train]
        kept = {identifier for listed in lists for identifier in listed["id"].to_pylist()}
        table = assign_splits(table, data.validation, data.test, data.split_seed, kept)
    return table, classes
