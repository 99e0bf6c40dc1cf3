"""Index of a folder per class, optionally below a folder per split, or of images without classes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import pyarrow as pa
from fsspec import AbstractFileSystem

from dpt_ray.data.index import Row, build_index
from dpt_ray.data.listing import (
    IMAGE_SUFFIXES,
    SPLIT_NAMES,
    list_directory,
    open_root,
    walk_files,
)


def index_folder(
    uri: str,
    classes: Sequence[str] | None = None,
    split_names: Mapping[str, str] = SPLIT_NAMES,
) -> tuple[pa.Table, list[str]]:
    """Return the index of the image files below `uri` and the class names (sorted folder names).

    The layout is CLASS/**/NAME.jpg, or SPLIT/CLASS/**/NAME.jpg where every top folder is one of
    `split_names`. Images outside the class folders have no label. The id is the path below `uri`
    without suffix. Hidden files and files without an image suffix are skipped.
    """
    fs, root = open_root(uri)
    if not fs.isdir(root):
        raise ValueError(f"{uri} is not a folder; check the source's uri and the credentials")
    top = _folders(fs, root)
    has_splits = bool(top) and all(name.lower() in split_names for name in top)
    splits = {name: split_names[name.lower()] for name in top} if has_splits else {"": "train"}
    if classes is None:
        classes = sorted({name for split in splits for name in _folders(fs, f"{root}/{split}")})
    return build_index(_rows(fs, root, splits), classes)


def _folders(fs: AbstractFileSystem, directory: str) -> list[str]:
    return [name for name, is_folder, *_ in list_directory(fs, directory) if is_folder]


def _rows(fs: AbstractFileSystem, root: str, splits: Mapping[str, str]) -> Iterator[Row]:
    for folder, split in splits.items():
        for path, size in walk_files(fs, root, folder):
            stem, dot, suffix = path.rpartition(".")
            if f"{dot}{suffix}".lower() not in IMAGE_SUFFIXES:
                continue
            inside = path.removeprefix(f"{folder}/").split("/")
            label = inside[0] if len(inside) > 1 else None
            yield stem, fs.unstrip_protocol(f"{root}/{path}"), 0, size, split, label
