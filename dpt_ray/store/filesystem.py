"""File systems by URI; object stores that fail for a while are waited for."""

from __future__ import annotations

from functools import cache
from typing import Any

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


@cache
def _wait_for_s3() -> None:
    """Repeat requests after all errors that pass; by default s3fs gives up after two seconds, or at once."""
    import s3fs  # type: ignore[import-untyped]
    from s3fs.core import set_custom_error_handler  # type: ignore[import-untyped]

    s3fs.S3FileSystem.retries = S3_RETRIES
    set_custom_error_handler(is_transient)
