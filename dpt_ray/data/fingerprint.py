"""What a source of images is known by, without reading an image."""

from __future__ import annotations

import hashlib
from importlib.metadata import version as package_version

from dpt_ray.config import ConfigError
from dpt_ray.config.sections import Data
from dpt_ray.data.folder import class_folders
from dpt_ray.data.listing import SPLIT_NAMES, open_root, version, walk_versions
from dpt_ray.data.sources import SUFFIXES
from dpt_ray.store.artifact import sha256


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
        one = [("", int(fs.size(root)), version(fs.info(root)))] if fs.isfile(root) else None
        suffixes = SUFFIXES.get(data.source, "")  # "": every file
        listed = (file for file in walk_versions(fs, root) if file[0].lower().endswith(suffixes))
        folders = set[str]()
        for name, size, tag in one or listed:
            facts = [name, str(size), tag] if tag else [name, str(size)]
            digest.update(("\0".join(facts) + "\n").encode())
            folders |= {"/".join(name.split("/")[:depth]) for depth in (1, 2)}
        if data.source == "folder":  # a folder without an image names a class, too
            found = class_folders(fs, root, SPLIT_NAMES | data.splits)
            digest.update("".join(f"{name}/\n" for name in found if name not in folders).encode())
    except Exception as error:  # every kind of storage has errors of its own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(
            f"data.uri: {data.uri!r} cannot be read ({reason}); check the path and the credentials"
        ) from error
    return digest.hexdigest()[:16]
