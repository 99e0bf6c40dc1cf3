"""What files a source has: sorted listings of local folders and object stores."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, TypeVar

from fsspec.implementations.local import LocalFileSystem

from dpt_ray.store.filesystem import url_to_fs

R = TypeVar("R")

# What file systems call the mark of a file's content: S3; Google's and Azure's; the Hugging Face hub.
VERSION_KEYS = ("ETag", "etag", "blob_id")

# What is an image: the suffixes of files, by the format that Pillow reads them as. Left out on purpose:
# EPS starts Ghostscript on the bytes it is given, and vector formats have no pixels of their own.
FORMATS = {
    "JPEG": (".jpg", ".jpeg", ".jfif"),
    "PNG": (".png",),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "JPEG2000": (".jp2", ".j2k"),
}
IMAGE_SUFFIXES = tuple(suffix for suffixes in FORMATS.values() for suffix in suffixes)
SHARD_SUFFIXES = (".tar", ".parquet")  # files that hold many images
MAC_FOLDER = "__MACOSX"  # what macOS adds to a zip: hidden files that are no images

SEPARATORS = r"[-_./]+"  # of the parts of a shard's name

# How sources name the splits. ImageNet's "val" is this project's test set: pass {"val": "test"}.
SPLIT_NAMES = {
    "train": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
}


def open_root(uri: str) -> tuple[Any, str]:
    """Return (file system, path) without a cache of listings, which would grow with the source."""
    fs, path = url_to_fs(uri, use_listings_cache=False)
    return fs, path.rstrip("/")


def canonical(uri: str) -> str:
    """Return the same place as one text: an absolute path for this machine's files, else the URI."""
    if "://" in uri and not uri.startswith("file://"):
        return uri.rstrip("/")
    return str(url_to_fs(uri)[1]).rstrip("/") or "/"


def list_directory(fs: Any, directory: str) -> list[tuple[str, bool, int, str]]:
    """Return (name, is a folder, bytes, version) of what a folder holds, by name, without hidden files.

    A symlink to nothing is a file of 0 bytes: as an image, one that cannot be read. So is one to a folder
    that it lies in, whose files are listed already. Raises ValueError for a name that is not UTF-8.
    """
    if isinstance(fs, LocalFileSystem):  # no dictionary per file for a flat million
        with os.scandir(directory) as entries:
            found = [_local_entry(entry) for entry in entries]
    else:
        prefix = directory.rstrip("/") + "/"
        found = [
            (
                entry["name"].rstrip("/")[len(prefix) :],
                entry["type"] == "directory",
                entry["size"],
                version(entry),
            )
            for entry in fs.ls(directory, detail=True)
            if entry["name"].startswith(prefix)  # object stores may list the folder itself
        ]
    shown = sorted(e for e in found if e[0] and not e[0].startswith(".") and e[0] != MAC_FOLDER)
    for name, *_ in shown:
        if not name.isascii() and "\udc80" <= max(name) <= "\udcff":  # bytes that Python could not decode
            raise ValueError(f"the name of {name!a} in {directory} is not UTF-8; rename it")
    return shown


def _local_entry(entry: os.DirEntry[str]) -> tuple[str, bool, int, str]:
    try:
        around = Path(entry.path).absolute().parents if entry.is_symlink() and entry.is_dir() else ()
        if any(parent.samefile(entry.path) for parent in around):
            return entry.name, False, 0, ""
        return entry.name, entry.is_dir(), entry.stat().st_size, ""
    except OSError:
        if not entry.is_symlink():
            raise
        return entry.name, False, 0, ""


def version(info: Mapping[str, Any]) -> str:
    """Return what a file system's `info` says of a file's content: an object store's ETag or hash, or ""."""
    return next((str(info[key]) for key in VERSION_KEYS if info.get(key)), "")


def walk_files(fs: Any, root: str, under: str = "") -> Iterator[tuple[str, int]]:
    """Yield (path relative to root, bytes) of every file below `root/under`, in sorted order."""
    for path, is_folder, size, _ in walk(fs, root, under):
        if not is_folder:
            yield path, size


def walk(fs: Any, root: str, under: str = "") -> Iterator[tuple[str, bool, int, str]]:
    """Yield (path relative to root, is a folder, bytes, version) of all below `root/under`, sorted."""
    for name, is_folder, size, tag in list_directory(fs, f"{root}/{under}".rstrip("/")):
        path = f"{under}/{name}" if under else name
        yield path, is_folder, size, tag
        if is_folder:
            yield from walk(fs, root, path)


class ForEach(Protocol):
    """Applies a function to each of a list and yields the results in order, as `map` does."""

    def __call__(self, do: Callable[[str], R], shards: Sequence[str], /) -> Iterable[R]:
        """Yield `do` of every shard."""


def list_shards(uri: str, suffix: str) -> list[tuple[str, str]]:
    """Return (relative name, uri) of the one file `uri`, or of all files below it with `suffix`.

    Raises ValueError where there is none.
    """
    fs, root = open_root(uri)
    if fs.isfile(root):
        return [(PurePosixPath(root).name, fs.unstrip_protocol(root))]
    if not fs.isdir(root):
        raise ValueError(f"{uri} does not exist; check the source's uri and the credentials")
    names = [name for name, _ in walk_files(fs, root) if name.lower().endswith(suffix)]
    if not names:
        raise ValueError(f"{uri} holds no {suffix} files; check the uri and the kind of the source")
    return [(name, fs.unstrip_protocol(f"{root}/{name}")) for name in names]


def is_in_shard(uri: str) -> bool:
    """Return whether an image's uri is that of a file which holds many, in any case of letters."""
    return uri.lower().endswith(SHARD_SUFFIXES)


def splits_of_shards(names: Sequence[str], split_names: Mapping[str, str]) -> list[str]:
    """Return the split named by a part of each shard's path ("val/0.tar", "x-test-01.tar"), "train" without.

    Raises ValueError where some name the split train, or several splits, and others none: these would put
    test images in train.
    """
    found = [_split_in(name, split_names) for name in names]
    known = {split for split in found if split}
    if None in found and ("train" in known or len(known) > 1):
        others = [name for name, split in zip(names, found, strict=True) if split is None]
        shown = ", ".join(others[:3]) + (f" ({len(others)} in all)" if len(others) > 3 else "")
        part = next(iter(re.split(SEPARATORS, others[0].lower())))
        raise ValueError(
            f"some files have a split in their names, and others none: {shown}; move them away, or name "
            f"their split as in data.splits={{{part}: train}} (or validation, or test)"
        )
    return [split or "train" for split in found]


def _split_in(name: str, split_names: Mapping[str, str]) -> str | None:
    parts = re.split(SEPARATORS, name.lower())
    return next((split_names[part] for part in parts if part in split_names), None)


def file_stem(path: str) -> str:
    """Return the last part of a path, without the suffix where that is an image's."""
    stem, dot, suffix = path.rpartition("/")[2].rpartition(".")
    return stem if f"{dot}{suffix}".lower() in IMAGE_SUFFIXES else f"{stem}{dot}{suffix}"
