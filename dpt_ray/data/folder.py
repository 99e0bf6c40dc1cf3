"""Index of a folder per class, optionally below a folder per split, or of images without classes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set

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
    `split_names`. Images outside the class folders have no label, nor has any image where no folder is one
    of `classes`: folders are years or cameras then. Where each of `classes` has a folder, images in other
    folders have no label either. The id is the path below `uri` without suffix. Hidden
    files and files without an image suffix are skipped. Raises ValueError where other folders lie beside
    those of splits, unless `classes` says that all of them are classes.
    """
    fs, root = open_root(uri)
    if not fs.isdir(root):
        raise ValueError(f"{uri} is not a folder; check the source's uri and the credentials")
    top = _folders(fs, root)
    has_splits = folders_above_classes(top, split_names) == 1
    if not has_splits and not set(top) <= set(classes or ()):
        _refuse_mixture(uri, top, split_names)
    splits = {name: split_names[name.lower()] for name in top} if has_splits else {"": "train"}
    folders = sorted({name for split in splits for name in _folders(fs, f"{root}/{split}")})
    classes = folders if classes is None else classes
    if set(classes) <= set(folders):
        labelled = set(classes)
    else:  # a class folder that is not among them is named as an error
        labelled = set() if set(folders).isdisjoint(classes) else set(folders)
    return build_index(_rows(fs, root, splits, labelled), classes)


def folders_above_classes(top: Sequence[str], split_names: Mapping[str, str]) -> int:
    """Return how many folders are above those of classes, 1 where all `top` ones in the root are splits."""
    return int(bool(top) and all(name.lower() in split_names for name in top))


def _refuse_mixture(uri: str, top: Sequence[str], split_names: Mapping[str, str]) -> None:
    """Raise ValueError where some top folders are splits: as classes they would put test images in train."""
    splits = [name for name in top if name.lower() in split_names]
    others = [name for name in top if name.lower() not in split_names]
    if others and (len(splits) > 1 or any(split_names[name.lower()] == "train" for name in splits)):
        shown = ", ".join(others[:5]) + (f" ({len(others)} in all)" if len(others) > 5 else "")
        raise ValueError(
            f"{uri} has folders of splits ({', '.join(splits)}) and others: {shown}; move the others away, "
            f"name their split as in data.splits={{{others[0].lower()}: train}}, or, where all of them are "
            "classes, name them with data.classes"
        )


def _folders(fs: AbstractFileSystem, directory: str) -> list[str]:
    return [name for name, is_folder, *_ in list_directory(fs, directory) if is_folder]


def _rows(fs: AbstractFileSystem, root: str, splits: Mapping[str, str], labelled: Set[str]) -> Iterator[Row]:
    for folder, split in splits.items():
        for path, size in walk_files(fs, root, folder):
            stem, dot, suffix = path.rpartition(".")
            if f"{dot}{suffix}".lower() not in IMAGE_SUFFIXES:
                continue
            inside = path.removeprefix(f"{folder}/").split("/")
            label = inside[0] if len(inside) > 1 and inside[0] in labelled else None
            yield stem, fs.unstrip_protocol(f"{root}/{path}"), 0, size, split, label
