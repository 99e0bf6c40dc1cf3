"""File systems by URI; object stores that fail for a while are waited for."""

from __future__ import annotations

import io
from functools import cache
from typing import IO, Any, cast

import fsspec
import fsspec.core

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
    fs, path = url_to_fs(uri)
    file: IO[bytes] = fs.open(path, "rb", cache_type="none")
    return file


def open_skipping(uri: str) -> IO[bytes]:
    """Open a file of which parts are read in order; see `SkippingFile`, where it is a remote one."""
    if not is_local(uri):
        return cast(IO[bytes], SkippingFile(uri))
    fs, path = url_to_fs(uri)
    file: IO[bytes] = fs.open(path, "rb")
    return file


class SkippingFile(io.RawIOBase):
    """Read a remote file from its start on, in small parts where much is skipped between them.

    What reads the headers of a tar of photographs moves a few kilobytes of each, and what reads one of small
    images gets it in large blocks, since a request takes as long as a megabyte.
    """

    SMALL, LARGE, FAR = 4 << 10, 1 << 20, 64 << 10  # bytes of a part, and of what is skipped

    def __init__(self, uri: str) -> None:
        self._fs, self._path = url_to_fs(uri)
        self._size = int(self._fs.size(self._path))
        self._place = self._start = 0
        self._part = b""

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the place of the next read."""
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Set the place of the next read."""
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        return self._place

    def read(self, size: int = -1) -> bytes:
        """Return the next bytes, fewer than asked for at the end of the file."""
        stop = self._size if size < 0 else min(self._place + size, self._size)
        if stop <= self._place:
            return b""
        end = self._start + len(self._part)
        if not self._start <= self._place < stop <= end:
            far = not 0 <= self._place - end < self.FAR
            wanted = max(stop, self._place + (self.SMALL if far else self.LARGE))
            self._part = self._fs.cat_file(self._path, start=self._place, end=min(wanted, self._size))
            self._start = self._place
        found = self._part[self._place - self._start : stop - self._start]
        self._place += len(found)
        return found


@cache
def _wait_for_s3() -> None:
    """Repeat requests after all errors that pass; by default s3fs gives up after two seconds, or at once."""
    import s3fs  # type: ignore[import-untyped]
    from s3fs.core import set_custom_error_handler  # type: ignore[import-untyped]

    s3fs.S3FileSystem.retries = S3_RETRIES
    set_custom_error_handler(is_transient)
