"""The kinds of sources of an index, besides the bundled digits (`digits.write_digits`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pyarrow as pa

from dpt_ray.data.folder import index_folder
from dpt_ray.data.listing import IMAGE_SUFFIXES, ForEach
from dpt_ray.data.manifest import index_manifest
from dpt_ray.data.parquet import index_parquet
from dpt_ray.data.tar import index_tar
from dpt_ray.store.filesystem import is_local

# Each: (uri, classes=None, split_names=SPLIT_NAMES) -> (index, class names). Those of files that have to be
# looked into take a fourth argument, see `ForEach`.
SHARDED = {"tar": index_tar, "parquet": index_parquet}
INDEXERS = {
    "folder": index_folder,
    **SHARDED,
    "manifest": index_manifest,
}

# How the files that are looked at end, in any case of letters; other files beside them are passed over.
SUFFIXES = {"folder": IMAGE_SUFFIXES, "tar": (".tar",), "parquet": (".parquet",)}


def index_source(
    kind: str, uri: str, classes: Sequence[str] | None, split_names: Mapping[str, str], each: ForEach
) -> tuple[pa.Table, list[str]]:
    """Return the index of a source and its class names; `each` looks into the shards of an object store."""
    if kind in SHARDED and not is_local(uri):
        return SHARDED[kind](uri, classes, split_names, each)
    return INDEXERS[kind](uri, classes, split_names)
