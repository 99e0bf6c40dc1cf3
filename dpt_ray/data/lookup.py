"""Look up the images that a user's list names, by id, path or file name."""

from __future__ import annotations

import difflib
import posixpath
import re
import unicodedata
from bisect import bisect
from collections.abc import Callable, Collection

import pyarrow as pa
import pyarrow.compute as pc

from dpt_ray.data.listing import IMAGE_SUFFIXES, SHARD_SUFFIXES

COMPARED = 4000  # ids that a misspelt one is compared with; a million would take minutes
_SUFFIX = rf"(?i)({'|'.join(map(re.escape, IMAGE_SUFFIXES))})$"


def find_images(index: pa.Table, keys: Collection[str]) -> dict[str, list[tuple[str, str]]]:
    """Return the (id, split) of the images that each key names, by the strictest reading with a match.

    A key is an id (the path below the source's folder without suffix), that path with a suffix, an
    absolute path or URI, or a file name with or without suffix, which several images may share. Keys
    without a match are left out.
    """
    found: dict[str, list[tuple[str, str]]] = {}
    for read_key, read_column in _READINGS:
        wanted: dict[str, list[str]] = {}
        for key in keys:
            if key not in found and (form := read_key(key)):
                wanted.setdefault(form, []).append(key)
        if not wanted:
            continue
        column = read_column(index)
        is_wanted = pc.is_in(column, value_set=pa.array(wanted, pa.string()))
        rows = index.select(["id", "split"]).append_column("form", column).filter(is_wanted)
        for identifier, split, form in zip(*(values.to_pylist() for values in rows.columns), strict=True):
            for key in wanted[form]:
                found.setdefault(key, []).append((identifier, split))
    return found


def nearest_id(key: str, ids: pa.ChunkedArray) -> str | None:
    """Return the id most similar to `key`, None where none is similar.

    Candidates are images of the same file name and the neighbours in sorted order, which share the start
    of the path.
    """
    wanted = _without_suffix(key)
    name = f"/{wanted.rpartition('/')[2]}"
    same = ids.filter(pc.ends_with(pc.binary_join_element_wise("", ids, "/"), name))
    ordered = sorted(ids.to_pylist())
    place = bisect(ordered, wanted)
    beside = ordered[max(0, place - COMPARED // 2) : place + COMPARED // 2]
    likely = [*same.slice(0, COMPARED).to_pylist(), *beside]
    forms = {identifier.rpartition("/")[2]: identifier for identifier in likely}
    forms |= {identifier: identifier for identifier in likely}
    return next((forms[form] for form in difflib.get_close_matches(wanted, forms, n=1)), None)


def _without_suffix(path: str) -> str:
    return re.sub(_SUFFIX, "", path)


def _relative_path(key: str) -> str | None:
    return None if key.startswith("/") else _without_suffix(posixpath.normpath(key))


def _absolute_path(key: str) -> str | None:
    if key.startswith("/"):
        return f"file://{_without_suffix(posixpath.normpath(key))}"
    return _without_suffix(key) if "://" in key else None


def _file_name(key: str) -> str | None:
    return None if "/" in key else key


def _file_stem(key: str) -> str | None:
    return None if "/" in key else _without_suffix(key)


def _composed(read: Callable[[str], str | None]) -> Callable[[str], str | None]:
    """Return how a key is read, with letters and their accents as one: macOS writes them apart."""

    def composed(key: str) -> str | None:
        form = read(key)
        return form and unicodedata.normalize("NFC", form)

    return composed


def _composed_ids(index: pa.Table) -> pa.ChunkedArray:
    """Return the ids in that form, without the "./" that `find` writes before names in a manifest."""
    return pc.utf8_normalize(pc.replace_substring_regex(index["id"], r"^(\./+)+", ""), form="NFC")


def _names(index: pa.Table) -> pa.ChunkedArray:
    """Return the images' file names, which for shards are part of the id."""
    shard = f"(?i)({'|'.join(map(re.escape, SHARD_SUFFIXES))})$"
    path = pc.if_else(pc.match_substring_regex(index["uri"], shard), index["id"], index["uri"])
    return pc.replace_substring_regex(path, "^.*/", "")


def _cut(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.replace_substring_regex(column, _SUFFIX, "")


# (form of a key, column of the index to compare it with), the strictest first
_READINGS: tuple[tuple[Callable[[str], str | None], Callable[[pa.Table], pa.ChunkedArray]], ...] = (
    (lambda key: key, lambda index: index["id"]),
    (_relative_path, lambda index: index["id"]),
    (_absolute_path, lambda index: _cut(index["uri"])),
    (_file_name, _names),
    (_file_stem, lambda index: _cut(_names(index))),
    (_composed(_relative_path), _composed_ids),
    (_composed(_file_stem), lambda index: pc.utf8_normalize(_cut(_names(index)), form="NFC")),
)
