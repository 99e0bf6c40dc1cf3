"""What a source of images is known by, without reading an image."""

from __future__ import annotations

import hashlib
from importlib.metadata import version as package_version
from itertools import accumulate
from typing import TYPE_CHECKING

from fsspec import AbstractFileSystem

from dpt_ray.config import ConfigError
from dpt_ray.config.sections import Data
from dpt_ray.data.folder import folders_above_classes
from dpt_ray.data.listing import SPLIT_NAMES, open_root, version, walk
from dpt_ray.data.sources import SUFFIXES
from dpt_ray.store.artifact import sha256

if TYPE_CHECKING:
    from hashlib import _Hash as Hash


def fingerprint(data: Data) -> str:
    """A hash of the source's files: other files, another run. Files of other kinds beside them do not count.

    Images and shards are listed, never read: they count by name and size, and by their ETag where a remote
    listing tells it. A manifest counts by its content; the images it lists, by what it says of them.
    """
    if data.source == "digits":
        return f"scikit-learn {package_version('scikit-learn').split('.')[0]}"
    assert data.uri is not None  # checked by Data
    digest = hashlib.sha256()
    try:
        fs, root = open_root(data.uri)
        if not fs.exists(root):
            raise FileNotFoundError("does not exist")
        if data.source == "manifest":
            return sha256(data.uri)[:16]
        if fs.isfile(root):
            _add(digest, "", int(fs.size(root)), version(fs.info(root)))
        else:
            _add_folder(digest, fs, root, data)
    except Exception as error:  # every kind of storage has errors of its own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(
            f"data.uri: {data.uri!r} cannot be read ({reason}); check the path and the credentials"
        ) from error
    return digest.hexdigest()[:16]


def _add_folder(digest: Hash, fs: AbstractFileSystem, root: str, data: Data) -> None:
    """Add the images or shards below a folder, and the folders that name a class and hold no image."""
    suffixes = SUFFIXES.get(data.source, "")  # "": every file
    folders, filled = list[str](), set[str]()  # of classes or splits
    for path, is_folder, size, tag in walk(fs, root):
        if is_folder and path.count("/") < 2:
            folders.append(path)
        elif not is_folder and path.lower().endswith(suffixes):
            _add(digest, path, size, tag)
            filled.update(accumulate(path.split("/")[:-1][:2], "{}/{}".format))
    if data.source == "folder":
        top = [path for path in folders if "/" not in path]
        above = folders_above_classes(top, SPLIT_NAMES | data.splits)
        for path in folders:
            if path.count("/") == above and path not in filled:
                digest.update(f"{path}/\n".encode())


def _add(digest: Hash, path: str, size: int, tag: str) -> None:
    facts = [path, str(size), tag] if tag else [path, str(size)]
    digest.update(("\0".join(facts) + "\n").encode())
