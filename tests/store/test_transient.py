"""Which errors of a storage pass, as its client raises them."""

import errno

import aiohttp
import botocore.exceptions as boto
import pytest
from s3fs.errors import ERROR_CODE_TO_EXCEPTION

from dpt_ray.store.transient import is_transient


@pytest.mark.parametrize(
    "error",
    [
        *(ERROR_CODE_TO_EXCEPTION[code]("said") for code in ("500", "503", "SlowDown", "RequestTimeout")),
        ConnectionResetError("reset"),
        TimeoutError(),
        TimeoutError(),
        OSError(errno.EIO, "got 3 of 7 bytes"),
        aiohttp.ClientPayloadError("ended too early"),
        aiohttp.ServerDisconnectedError(),
        boto.ClientError({"ResponseMetadata": {"HTTPStatusCode": 503}}, "HeadObject"),  # which has no body
        boto.EndpointConnectionError(endpoint_url="http://x"),
        boto.ReadTimeoutError(endpoint_url="http://x"),
        boto.IncompleteReadError(actual_bytes=1, expected_bytes=2),
    ],
    ids=repr,
)
def test_what_passes_is_tried_again(error):
    assert is_transient(error)
    wrapped = ValueError("of mine")
    wrapped.__cause__ = error
    assert is_transient(wrapped)


@pytest.mark.parametrize(
    "error",
    [
        *(ERROR_CODE_TO_EXCEPTION[code]("said") for code in ("403", "404", "400", "NoSuchBucket")),
        OSError(errno.ENOSPC, "full"),
        ValueError("a bug"),
        boto.ClientError({"ResponseMetadata": {"HTTPStatusCode": 403}}, "HeadObject"),
        boto.NoCredentialsError(),
        aiohttp.InvalidURL("x"),
    ],
    ids=repr,
)
def test_what_does_not_pass_ends_a_unit_at_once(error):
    assert not is_transient(error)
