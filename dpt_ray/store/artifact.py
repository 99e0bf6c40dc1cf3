"""Artifacts, the outputs of stages: identity, location and atomic publication.

An artifact is a folder `store/STAGE/HASH/`. Its shards are published one by one (payload first, then a
small manifest) and the artifact itself by its manifest, written last. Readers follow manifests
only, so partial and duplicate attempts are never visible. An artifact that can grow (samples) has one
manifest per extent in the same folder, and the extents share shards.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar, cast
from urllib.parse import urlsplit

import fsspec
from fsspec.implementations.local import LocalFileSystem

from dpt_ray.store.cache import RemoteFile, is_disk_full, scratch
from dpt_ray.store.filesystem import url_to_fs
from dpt_ray.store.records import Manifest, Shard

SHARDS = "shards"

T = TypeVar("T")


def identity(stage: str, version: int, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """Return the 16-digit hash of everything that determines a stage's result."""
    what = {"stage": stage, "version": version, "settings": settings, "inputs": inputs}
    text = json.dumps(what, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def local_copy(uri: str | Path, family: str = "") -> Path:
    """Return a local path with the content of a file: the file itself, or a copy of a remote one.

    A remote file is downloaded atomically, once per content; the processes of a node share the copy.
    Copies of one `family` can be removed together. Raises ValueError for a missing file, denied access,
    or a full disk; transient errors of the storage pass through unchanged.
    """
    fs, path = url_to_fs(str(uri), use_listings_cache=False)
    with _permitted(str(uri)):
        try:
            info = fs.info(path)
        except (FileNotFoundError, NotADirectoryError):
            info = {"type": "none"}
        if info["type"] != "file":
            raise ValueError(f"{uri}: no such file; give the path or URI of an existing file")
        if isinstance(fs, LocalFileSystem):
            return Path(path)
        # ukey changes with the content as far as the file system knows: an ETag, or size and time.
        content = f"{uri} {fs.ukey(path)}"
        return RemoteFile(fs, path, content, info["size"], family).opened(lambda copy: copy)


@contextmanager
def _permitted(uri: str) -> Iterator[None]:
    """Turn denied access into a one-line ValueError: object stores say only "Forbidden"."""
    try:
        yield
    except PermissionError as error:
        where = urlsplit(uri).netloc
        missing = f"credentials that may read bucket {where} (s3:GetObject, s3:ListBucket)" if where else ""
        raise ValueError(
            f"{uri}: denied ({error.strerror or error}); give {missing or 'this user the right to read it'}"
        ) from error


def sha256(uri: str | Path) -> str:
    """Return the SHA-256 of a local or remote file's bytes, in hexadecimal."""
    with local_copy(uri).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class Artifact:
    """A folder `uri` below a store, at one `extent` (empty for an artifact that cannot grow)."""

    uri: str
    extent: str = ""

    @cached_property
    def _location(self) -> tuple[fsspec.AbstractFileSystem, str]:
        # The listing cache of remote file systems would hide what other processes publish.
        return url_to_fs(self.uri, use_listings_cache=False)

    @property
    def fs(self) -> fsspec.AbstractFileSystem:
        """The file system that holds the artifact."""
        return self._location[0]

    @property
    def store(self) -> Store:
        """The store that holds the artifact."""
        return Store(self.uri.rpartition("/store/")[0] or self.uri)

    @property
    def is_local(self) -> bool:
        """Whether the artifact is on this machine's own file system."""
        return "file" in self.fs.protocol

    def path(self, name: str) -> str:
        """Return the path of a file on `fs`."""
        return f"{self._location[1].rstrip('/')}/{name}"

    def file_uri(self, name: str) -> str:
        """Return the URI of a file of the artifact."""
        return f"{self.uri.rstrip('/')}/{name}"

    @property
    def manifest_name(self) -> str:
        """The name of the manifest that publishes the artifact."""
        return f"manifest.{self.extent}.json" if self.extent else "manifest.json"

    @property
    def published(self) -> bool:
        """Whether the artifact is published."""
        return self.exists(self.manifest_name)

    @property
    def manifest(self) -> Manifest:
        """Return the manifest of a published artifact."""
        return cast(Manifest, self.read_json(self.manifest_name))

    def read_bytes(self, name: str) -> bytes:
        """Return the content of a file."""
        with _permitted(self.file_uri(name)):
            return self.fs.cat_file(self.path(name))

    def read_json(self, name: str) -> Any:
        """Return the content of a JSON file."""
        return json.loads(self.read_bytes(name))

    def exists(self, name: str) -> bool:
        """Return whether a file exists. Raises ValueError where access is denied."""
        with _permitted(self.file_uri(name)):
            return bool(self.fs.exists(self.path(name)))

    def write_bytes(self, name: str, data: bytes) -> None:
        """Publish a file atomically: by a rename locally, by a single put on an object store."""
        if not self.is_local:
            self.fs.pipe_file(self.path(name), data)
            return
        with self.writing(name) as local:
            local.write_bytes(data)

    def write_json(self, name: str, value: Any) -> None:
        """Publish a JSON file atomically."""
        self.write_bytes(name, json.dumps(value, indent=1, allow_nan=False).encode())

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """Yield a local path to write; publish it as `name` when the block ends without an error.

        Raises ValueError, one line, where the disk is full.
        """
        with self._folder_for(name) as folder, _one_line_if_full(folder):
            part = folder / f".{Path(name).name}.{uuid.uuid4().hex[:8]}.tmp"
            try:
                yield part
                self._put(part, name)
            finally:
                part.unlink(missing_ok=True)

    @contextmanager
    def _folder_for(self, name: str) -> Iterator[Path]:
        """Yield the local folder to write a file in: its own, so that a rename publishes it, or scratch."""
        if not self.is_local:
            with scratch() as folder:
                yield folder
            return
        folder = Path(self.path(name)).parent
        folder.mkdir(parents=True, exist_ok=True)
        yield folder

    def _put(self, part: Path, name: str) -> None:
        """Publish a written file: by a rename locally, by a single put on an object store."""
        if not self.is_local:
            self.fs.put_file(str(part), self.path(name))
            return
        with part.open("rb") as written:
            os.fsync(written.fileno())
        part.replace(self.path(name))

    def publish_files(self, write: Callable[[Path], None], prefix: str = "") -> None:
        """Publish each file that `write(folder)` leaves in a scratch folder, under `prefix`."""
        with scratch() as folder:
            write(folder)
            for file in sorted(folder.rglob("*")):
                if file.is_file():
                    with self.writing(prefix + file.relative_to(folder).as_posix()) as target:
                        shutil.copyfile(file, target)

    def local_file(self, name: str) -> Path:
        """Return a local path with the content of a file: the file itself, or a copy of a remote one."""
        if self.is_local:  # called often, so the existence is not checked here
            return Path(self.path(name))
        return local_copy(self.file_uri(name))

    # Shards ------------------------------------------------------------------------------------

    def publish_shard(
        self, key: str, suffix: str, rows: int, write: Callable[[Path], None], **facts: Any
    ) -> Shard:
        """Publish a shard, then its manifest; return the manifest.

        `write(path)` writes the payload, under a name of this attempt. The first complete attempt wins: if
        the shard is published already, nothing is written; if it was published meanwhile, this attempt's
        payload is removed.
        """
        manifest_name = f"{SHARDS}/{key}.json"
        if self.exists(manifest_name):
            return cast(Shard, self.read_json(manifest_name))
        payload = f"{SHARDS}/{key}.{uuid.uuid4().hex[:8]}{suffix}"
        with self.writing(payload) as local:
            write(local)
            size, digest = local.stat().st_size, sha256(local)
        if self.exists(manifest_name):
            self.fs.rm_file(self.path(payload))
            return cast(Shard, self.read_json(manifest_name))
        entry: Shard = {
            "shard": key,
            "file": payload,
            "rows": rows,
            "bytes": size,
            "sha256": digest,
            **facts,  # type: ignore[typeddict-item]
        }
        self.write_json(manifest_name, entry)
        return entry

    def shards(self) -> dict[str, Shard]:
        """Return the published shards in the folder by key."""
        if not self.fs.exists(self.path(SHARDS)):
            return {}
        names = sorted(n for n in self.fs.ls(self.path(SHARDS), detail=False) if n.endswith(".json"))
        # Not `cat`, which takes the [ ] of a folder's name for a pattern.
        contents = self.fs.cat_ranges(names, None, None, on_error="raise")
        entries = [json.loads(data) for data in contents]
        return {entry["shard"]: entry for entry in entries}

    def listed_shards(self) -> list[Shard]:
        """Return the shards in the published manifest of this extent, in its order."""
        return list(self.manifest["shards"])

    def open_shard(self, shard: Shard, open_file: Callable[[Path], T]) -> T:
        """Return `open_file(path)` of a shard's payload: of the file itself or of this node's copy."""
        remote = self.remote_shard(shard)
        return remote.opened(open_file) if remote else open_file(Path(self.path(shard["file"])))

    def remote_shard(self, shard: Shard) -> RemoteFile | None:
        """Return the payload of a shard on a remote store, None for a local one."""
        if self.is_local:
            return None
        return RemoteFile(self.fs, self.path(shard["file"]), shard["sha256"], shard["bytes"])

    def check_room(self, needed: float) -> None:
        """Raise ValueError where a local artifact's disk has less than `needed` bytes free."""
        if not self.is_local:
            return
        folder = Path(self.path(""))
        there = next(parent for parent in (folder, *folder.parents) if parent.exists())
        if needed > shutil.disk_usage(there).free:
            raise ValueError(
                f"{folder}: about {needed / 1e9:.1f} GB will be written, but the disk has "
                f"{_free_gb(there):.1f} GB free; free some, or set output to a folder with more"
            )

    def publish(self, manifest: Manifest) -> None:
        """Publish the manifest: from now on the artifact exists."""
        self.write_json(self.manifest_name, dict(manifest))


@contextmanager
def _one_line_if_full(folder: Path) -> Iterator[None]:
    """Turn the error of a full disk into a one-line ValueError."""
    try:
        yield
    except Exception as error:
        if not is_disk_full(error):
            raise
        raise ValueError(
            f"{folder}: the disk is full ({_free_gb(folder):.1f} GB free without the unfinished file); "
            "free some, and run the same command again to continue"
        ) from error


def _free_gb(folder: Path) -> float:
    return shutil.disk_usage(folder).free / 1e9


@dataclass(frozen=True)
class Store:
    """The output URI of one or many runs, with `store/STAGE/HASH/` and `runs/NAME/` below it."""

    uri: str

    def artifact(self, stage: str, digest: str, extent: str = "") -> Artifact:
        """Return the artifact of an identity, published or not."""
        return Artifact(f"{self.uri.rstrip('/')}/store/{stage}/{digest}", extent)

    def run_folder(self, name: str) -> Artifact:
        """Return the folder of a run's results."""
        return Artifact(f"{self.uri.rstrip('/')}/runs/{name}")

    def check_writable(self) -> None:
        """Raise ValueError, naming the folder and the reason, if it cannot be written."""
        probe = Artifact(self.uri)
        name = f".writable-{uuid.uuid4().hex[:8]}"
        try:
            probe.write_bytes(name, b"")
            probe.fs.rm_file(probe.path(name))
        except Exception as error:  # every storage has its own errors
            reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
            raise ValueError(
                f"output: {self.uri!r} cannot be written ({reason}); choose another folder, or change its "
                "permissions"
            ) from error

    def all_artifacts(self) -> Iterator[tuple[str, str, int]]:
        """Yield (stage, hash, bytes) of every folder in the store, published or not."""
        root = Artifact(f"{self.uri.rstrip('/')}/store")
        if not root.fs.exists(root.path("")):
            return
        sizes: dict[tuple[str, str], int] = {}
        for file, info in root.fs.find(root.path(""), detail=True).items():
            stage, digest, *_ = file[len(root.path("")) :].split("/")
            sizes[stage, digest] = sizes.get((stage, digest), 0) + int(info["size"] or 0)
        for (stage, digest), size in sorted(sizes.items()):
            yield stage, digest, size

    def digests(self, stage: str) -> list[str]:
        """Return the hashes of a stage's folders in the store, published or not."""
        root = Artifact(f"{self.uri.rstrip('/')}/store/{stage}")
        if not root.fs.exists(root.path("")):
            return []
        return sorted(name.rstrip("/").rpartition("/")[2] for name in root.fs.ls(root.path(""), detail=False))

    def remove(self, stage: str, digest: str) -> None:
        """Remove an artifact, its manifests first, so that no reader trusts a partial one."""
        artifact = self.artifact(stage, digest)
        for name in artifact.fs.ls(artifact.path(""), detail=False):
            if name.rpartition("/")[2].startswith("manifest"):
                artifact.fs.rm_file(name)
        artifact.fs.rm(artifact.path(""), recursive=True)
