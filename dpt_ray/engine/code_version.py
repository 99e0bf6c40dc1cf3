"""The version of the code, recorded in manifests and never hashed."""

from __future__ import annotations

import os
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import dpt_ray


@cache
def code_version() -> str:
    """Return the git commit of the package's checkout at the first call, or the package version.

    "unknown" where the code lies in a folder without git and is not installed.
    """
    checkout = Path(dpt_ray.__file__).resolve().parents[1]
    # An installed package may be inside another project's repository.
    ours = _git(checkout, "rev-parse", "--show-toplevel") == str(checkout)
    if ours and (described := _git(checkout, "describe", "--always", "--dirty")):
        return described
    try:
        return version("dpt_ray")
    except PackageNotFoundError:
        return "unknown"


def _git(folder: Path, *arguments: str) -> str:
    """Return the output of git, "" where it fails or is not installed."""
    try:
        shown = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        )
    except OSError:
        return ""
    return "" if shown.returncode else shown.stdout.strip()
