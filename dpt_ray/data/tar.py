"""Index of WebDataset tar shards: KEY.jpg (or another image suffix) with KEY.cls or KEY.json."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import IO

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

    The id is the key, the member's name up to the first dot of its last part. Only headers and label
    files are read: a .cls has a class name or number, a .json an object with it under "label" or "cls".
    The split is the first part of the shard's name in `split_names`. Raises ValueError for a compressed,
    damaged or truncated tar, and where dots in a name hide an image.
    """
    return build_index(_rows(uri, split_names), classes)


def _rows(uri: str, split_names: Mapping[str, str]) -> Iterator[Row]:
    for name, shard in list_shards(uri, ".tar"):
        split = split_of_shard(name, split_names)
        for key, offset, size, label in _samples(shard):
            yield key, shard, offset, size, split, label


def _samples(shard: str) -> Iterator[tuple[str, int, int, str | None]]:
    """Yield (key, offset, size, label) per image; a sample's files are consecutive in the tar."""
    for key, files in groupby(_members(shard), lambda file: _key_and_kind(file[0].name)[0]):
        image: tuple[int, int] | None = None
        label, other = None, ""
        for member, payload in files:
            kind = _key_and_kind(member.name)[1]
            if f".{kind}" in IMAGE_SUFFIXES:
                if image:
                    raise ValueError(f"{shard}: {key} has two images; keep one per key")
                image = (member.offset_data, member.size)
            elif kind in LABEL_KINDS:
                label = _label(payload, kind, f"{shard}: {member.name}") or label
            elif kind.endswith(IMAGE_SUFFIXES):
                other = member.name  # such as the a.mask.png of a.jpg
        if image:
            yield key, *image, label
        elif other:
            raise ValueError(
                f"{shard}: {other} is not the image of a sample, since its key {key!r} ends at the first "
                "dot (WebDataset's rule); write the tar again with names that have one dot"
            )


def _key_and_kind(name: str) -> tuple[str, str]:
    """Split a member's name at the first dot of its last part."""
    folder, slash, file = name.rpartition("/")
    stem, _, kind = file.partition(".")
    return f"{folder}{slash}{stem}", kind.lower()


def _members(shard: str) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    """Yield each regular member's header and, for label files only, its payload; skip hidden members."""
    fs, path = url_to_fs(shard)
    try:
        with fs.open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            while member := tar.next():
                if member.isreg() and not member.name.rpartition("/")[2].startswith("."):
                    is_label = member.name.lower().endswith(LABEL_KINDS)
                    content = tar.extractfile(member) if is_label else None
                    yield member, content.read() if content else b""
                tar.members.clear()  # type: ignore[attr-defined]  # which keeps every header otherwise
            _check_end(file, tar.offset)
    except tarfile.TarError as error:
        raise ValueError(
            f"{shard} is not a complete uncompressed tar ({error}); write it again, without gzip"
        ) from error


def _check_end(file: IO[bytes], offset: int) -> None:
    """Raise tarfile.ReadError unless the members are followed by a tar's two blocks of zeros.

    tarfile treats any header after the first that it cannot read as the end.
    """
    file.seek(offset)
    end = file.read(2 * tarfile.BLOCKSIZE)
    if len(end) < tarfile.BLOCKSIZE or any(end):
        raise tarfile.ReadError(f"neither a member nor the end mark at byte {offset}")


def _label(payload: bytes, kind: str, where: str) -> str | None:
    if kind == "cls":
        return payload.decode().strip()
    try:
        record = json.loads(payload)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON ({error}); correct the file") from error
    label = record.get("label", record.get("cls")) if isinstance(record, dict) else None
    return None if label is None else str(label)
