"""The kinds of sources of an index, besides the bundled digits (`digits.write_digits`)."""

from __future__ import annotations

from dpt_ray.data.folder import index_folder
from dpt_ray.data.listing import IMAGE_SUFFIXES
from dpt_ray.data.manifest import index_manifest
from dpt_ray.data.parquet import index_parquet
from dpt_ray.data.tar import index_tar

# Each: (uri, classes=None, split_names=SPLIT_NAMES) -> (index, class names). Those of many files that each
# have to be looked into take a fourth argument, see `listing.ForEach`.
SHARDED = {"tar": index_tar, "parquet": index_parquet}
INDEXERS = {
    "folder": index_folder,
    **SHARDED,
    "manifest": index_manifest,
}

# How the files that are looked at end, in any case of letters; other files beside them are passed over.
SUFFIXES = {"folder": IMAGE_SUFFIXES, "tar": (".tar",), "parquet": (".parquet",)}
