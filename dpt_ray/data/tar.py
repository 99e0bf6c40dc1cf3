"""WebDataset tar shards: KEY.jpg|jpeg|png|webp beside KEY.cls or KEY.json."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence

import pyarrow as pa
from fsspec.core import url_to_fs

from dpt_ray.data.index import Row, build_index
from dpt_ray.data.listing import IMAGE_SUFFIXES, SPLIT_NAMES, list_shards, split_of_shard

LABEL_KINDS = ("cls", "json")


def index_tar(
    uri: str,
    classes: Sequence[str] | None = None,
    split_names: Mapping[str, str] = SPLIT_NAMES,
) -> tuple[pa.Table, list[str]]:
    """Return the index of one tar or of all .tar files under a folder, and the class names.

    id = the key, the member's name up to the first dot of its last part. Only headers and the small
    label files are read: a .cls holds a class name or number, a .json an object with it under
    "label" or "cls". The split is the first part of the shard's name that `split_names` knows.
    Raises ValueError for a compressed or broken tar (their members have no fixed offsets).
    """
    return build_index(_rows(uri, split_names), classes)


def _rows(uri: str, split_names: Mapping[str, str]) -> Iterator[Row]:
    for name, shard in list_shards(uri, ".tar"):
        split = split_of_shard(name, split_names)
        for key, offset, size, label in _samples(shard):
            yield key, shard, offset, size, split, label


def _samples(shard: str) -> Iterator[tuple[str, int, int, str | None]]:
    """Yield (key, offset, size, label) per image; a sample's files stand together in the tar."""
    key, label = "", None
    image: tuple[str, int, int] | None = None
    for member, payload in _members(shard):
        folder, _, name = member.name.rpartition("/")
        stem, _, suffix = name.partition(".")
        member_key = f"{folder}/{stem}" if folder else stem
        if member_key != key:
            if image:
                yield *image, label
            key, image, label = member_key, None, None
        kind = suffix.lower()
        if f".{kind}" in IMAGE_SUFFIXES:
            if image:
                raise ValueError(f"{shard}: {key} has two images; keep one per key")
            image = (key, member.offset_data, member.size)
        elif kind in LABEL_KINDS:
            label = _label(payload, kind, f"{shard}: {member.name}") or label
    if image:
        yield *image, label


def _members(shard: str) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    """Yield each regular member's header and, for label files only, its payload."""
    fs, path = url_to_fs(shard)
    try:
        with fs.open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            while member := tar.next():
                is_label = member.name.lower().endswith(LABEL_KINDS)
                content = tar.extractfile(member) if member.isreg() and is_label else None
                if member.isreg():
                    yield member, content.read() if content else b""
                tar.members.clear()  # type: ignore[attr-defined]  # or it remembers every header
    except tarfile.TarError as error:
        raise ValueError(
            f"{shard} is no complete uncompressed tar ({error}); write it again, without gzip"
        ) from error


def _label(payload: bytes, kind: str, where: str) -> str | None:
    if kind == "cls":
        return payload.decode().strip()
    try:
        record = json.loads(payload)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON ({error}); correct the file") from error
    label = record.get("label", record.get("cls")) if isinstance(record, dict) else None
    return None if label is None else str(label)
