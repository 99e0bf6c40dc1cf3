"""The error of a failed stage, and the one line that an error below Ray's wrappers comes to."""

from __future__ import annotations


class StageError(RuntimeError):
    """A stage that failed: which one, and what to do."""


def in_one_line(error: BaseException) -> str:
    """Return what went wrong below Ray's wrappers, in one line."""
    while type(error) is not StageError:  # Ray's wrapper of one is an instance of it as well
        cause = getattr(error, "cause", None) or error.__cause__
        if cause is None or not str(cause):  # Ray Data marks what is not a user's error by an empty cause
            break
        error = cause
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
    if type(error) is StageError:
        return lines[0]
    if type(error).__module__.startswith("ray."):  # the text of a remote traceback: its last line says it
        return lines[-1]
    return f"{type(error).__name__}: {lines[0]}"
