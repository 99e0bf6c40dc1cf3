"""File systems by URI; object stores that fail for a while are waited for."""

from __future__ import annotations

from functools import cache
from typing import IO, Any

import fsspec
import fsspec.core
from fsspec.caching import BaseCache, register_cache

from dpt_ray.store.transient import is_transient

# Of each request, each with botocore's own five attempts: an outage of about a minute is waited for.
S3_RETRIES = 8


def url_to_fs(uri: str, **options: Any) -> tuple[fsspec.AbstractFileSystem, str]:
    """Return the file system of a URI and the path on it, as fsspec's function of this name."""
    fs, path = fsspec.core.url_to_fs(uri, **options)
    if "s3" in fs.protocol:
        _wait_for_s3()
    return fs, path


def is_local(uri: str) -> bool:
    """Return whether a URI is that of a file or folder of this machine."""
    return "file" in url_to_fs(uri)[0].protocol


def open_exact(uri: str) -> IO[bytes]:
    """Open a file for reading, each read of which moves the bytes that it returns and no others.

    Without this s3fs reads 50 MB ahead of each of them.
    """
    return _opened(uri, "none")


def open_skipping(uri: str) -> IO[bytes]:
    """Open a file of which parts are read in order, with much between some of them; see `SkippingCache`."""
    return _opened(uri, SkippingCache.name)


def _opened(uri: str, cache_type: str) -> IO[bytes]:
    fs, path = url_to_fs(uri)
    file: IO[bytes] = fs.open(path, "rb", cache_type=cache_type)  # of a local file nothing is cached
    return file


class SkippingCache(BaseCache):
    """Moves small parts of a remote file where much is skipped before them, else large ones.

    What reads the headers of a tar of photographs moves a few kilobytes of each, and what reads one of small
    images gets it in large parts, since a request takes as long as a megabyte.
    """

    name = "skipping"
    SMALL, LARGE, FAR = 4 << 10, 1 << 20, 64 << 10  # bytes of a part, and of what is skipped

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._start, self._part = 0, b""

    def _fetch(self, start: int | None, stop: int | None) -> bytes:
        start, stop = start or 0, self.size if stop is None else min(stop, self.size)
        if start >= stop:
            return b""
        end = self._start + len(self._part)
        if not self._start <= start < stop <= end:
            far = not 0 <= start - end < self.FAR
            wanted = max(stop, start + (self.SMALL if far else self.LARGE))
            self._start, self._part = start, self.fetcher(start, min(wanted, self.size))
        return self._part[start - self._start : stop - self._start]


register_cache(SkippingCache)


@cache
def _wait_for_s3() -> None:
    """Repeat requests after all errors that pass; by default s3fs gives up after two seconds, or at once."""
    import s3fs  # type: ignore[import-untyped]
    from s3fs.core import set_custom_error_handler  # type: ignore[import-untyped]

    s3fs.S3FileSystem.retries = S3_RETRIES
    set_custom_error_handler(is_transient)
