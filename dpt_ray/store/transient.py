"""Errors of a storage that pass: throttling, lost connections, bodies that end too early."""

from __future__ import annotations

import errno

# As s3fs translates S3's codes: 503 and SlowDown are EBUSY, 500 is EREMOTEIO.
CODES = frozenset(
    getattr(errno, name)
    for name in (
        *("EAGAIN", "EBUSY", "EIO", "EREMOTEIO", "EPIPE", "ETIMEDOUT"),
        *("ECONNABORTED", "ECONNREFUSED", "ECONNRESET", "EHOSTUNREACH", "ENETUNREACH"),
    )
    if hasattr(errno, name)
)
# The clients of object stores have errors of their own, which are no OSErrors.
CLIENTS = ("aiohttp", "botocore", "google", "httpcore", "httpx", "requests", "urllib3")
PASSING = (
    "Connect",
    "Disconnected",
    "Incomplete",
    "Payload",
    "Protocol",
    "ReadError",
    "Streaming",
    "Timeout",
)


def is_transient(error: BaseException) -> bool:
    """Return whether trying again later may help, by the error or one that it was raised from."""
    seen: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in seen:
        if _passes(cause):
            return True
        seen.append(cause)
        cause = cause.__cause__ or cause.__context__
    return False


def _passes(error: BaseException) -> bool:
    if isinstance(error, (ConnectionError, TimeoutError)):
        return True
    if isinstance(error, OSError) and error.errno in CODES:
        return True
    response = getattr(error, "response", None)  # botocore's ClientError
    if isinstance(response, dict):
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return status >= 500 or status == 429
    kind = type(error)
    client = kind.__module__.partition(".")[0]
    return client in CLIENTS and any(word in kind.__name__ for word in PASSING)
