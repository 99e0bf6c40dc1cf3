"""The error of a failed stage, and one-line texts of errors wrapped by Ray."""

from __future__ import annotations


class StageError(RuntimeError):
    """A failed stage: its name, the reason and the remedy in one line."""


def in_one_line(error: BaseException) -> str:
    """Return the cause of an error below Ray's wrappers in one line."""
    while type(error) is not StageError:  # a Ray wrapper of one is an instance, too
        cause = getattr(error, "cause", None) or error.__cause__
        if cause is None or not str(cause):  # Ray Data gives its own errors an empty cause
            break
        error = cause
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
    if type(error) is StageError:
        return lines[0]
    if type(error).__module__.startswith("ray."):  # a remote traceback: the last line is the error
        return lines[-1]
    return f"{type(error).__name__}: {lines[0]}"
