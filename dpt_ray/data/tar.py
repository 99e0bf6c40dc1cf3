"""Index of WebDataset tar shards: KEY.jpg (or another image suffix) with KEY.cls or KEY.json."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import IO

import pyarrow as pa

from dpt_ray.data.index import Row, build_index
from dpt_ray.data.listing import IMAGE_SUFFIXES, SPLIT_NAMES, ForEach, list_shards, splits_of_shards
from dpt_ray.store.filesystem import open_skipping, url_to_fs

LABEL_KINDS = ("cls", "json")
Sample = tuple[str, int, int, str | None]  # key, offset, size, label
LABEL_BYTES = 1 << 20  # of a label file, which is read as a whole


def index_tar(
    uri: str,
    classes: Sequence[str] | None = None,
    split_names: Mapping[str, str] = SPLIT_NAMES,
    each: ForEach | None = None,
) -> tuple[pa.Table, list[str]]:
    """Return the index of one tar or of all .tar files under a folder, and the class names.

    The id is the key, the member's name up to the first dot of its last part. Only headers and label
    files are read: a .cls has a class name or number, a .json an object with it under "label" or "cls".
    The split is the first part of the shard's name in `split_names`. Raises ValueError for a compressed,
    damaged or truncated tar, where dots in a name hide an image, and for a member that is a link, is
    sparse, has a name that leads out of the tar, or is a label of more than a MiB. `each` looks into many
    shards at a time, by little more than their headers; without it all of a remote one is read.
    """
    return build_index(_rows(uri, split_names, each), classes)


def _rows(uri: str, split_names: Mapping[str, str], each: ForEach | None) -> Iterator[Row]:
    shards = list_shards(uri, ".tar")
    splits = splits_of_shards([name for name, _ in shards], split_names)
    uris = [shard for _, shard in shards]
    # One after the other, a request for each header takes longer than the images between them.
    listed = each(_listed_by_headers, uris) if each else map(_listed, uris)
    for shard, split, samples in zip(uris, splits, listed, strict=True):
        for key, offset, size, label in samples:
            yield key, shard, offset, size, split, label


def _listed(shard: str) -> list[Sample]:
    """Return the samples of a shard; of a remote one all is read."""
    fs, path = url_to_fs(shard)
    with fs.open(path, "rb") as file:
        return list(_samples(shard, file))


def _listed_by_headers(shard: str) -> list[Sample]:
    """Return the samples of a shard, of which little more than the headers is read."""
    with open_skipping(shard) as file:
        return list(_samples(shard, file))


def _samples(shard: str, file: IO[bytes]) -> Iterator[Sample]:
    """Yield a sample per image; its files are consecutive in the tar."""
    seen, apart = set[str](), set[str]()  # keys of images, and of labels without one beside them
    for key, files in groupby(_members(shard, file), lambda file: _key_and_kind(file[0].name)[0]):
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
            seen.add(key)
        elif label:
            apart.add(key)
        if key in seen and key in apart:
            raise ValueError(
                f"{shard}: the label of {key} is not beside its image, as WebDataset needs it; write the tar "
                "again with --sort=name"
            )
        if image:
            yield key, *image, label
        elif other:
            raise ValueError(
                f"{shard}: {other} is not the image of a sample, since its key {key!r} ends at the first "
                "dot (WebDataset's rule); write the tar again with names that have one dot"
            )


def _key_and_kind(name: str) -> tuple[str, str]:
    """Split a member's name at the first dot of its last part; `tar -C` may have written "./a" for "a"."""
    folder, slash, file = name.removeprefix("./").rpartition("/")
    stem, _, kind = file.partition(".")
    return f"{folder}{slash}{stem}", kind.lower()


def _members(shard: str, file: IO[bytes]) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    """Yield each regular member's header and, for label files only, its payload; skip hidden members."""
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while member := tar.next():
                if reason := _refused(member):
                    raise ValueError(f"{shard}: {member.name} {reason}")
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


def _refused(member: tarfile.TarInfo) -> str | None:
    """Return why a member is not accepted, and the remedy.

    A tar is never unpacked, but names become ids, from which somebody may make paths. The bytes of a link
    are elsewhere, and a few bytes of a sparse member stand for any number.
    """
    name = member.name.lower()
    if name.startswith("/") or ".." in name.split("/"):
        return "leads out of the tar; write it again with names below its folder"
    if (member.issym() or member.islnk()) and name.endswith((*IMAGE_SUFFIXES, *LABEL_KINDS)):
        return "is a link; write the tar again with --dereference --hard-dereference"
    if member.issparse():
        return "is sparse; write the tar again without --sparse"
    if member.isreg() and name.endswith(LABEL_KINDS) and member.size > LABEL_BYTES:
        return f"is a label of {member.size} bytes, and {LABEL_BYTES} are allowed; give labels.file instead"
    return None


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
