"""The console that results are printed on."""

from __future__ import annotations

import os

from rich.console import Console

UNCUT = 160  # columns: the widest table, with names of stages and hashes


def output_console() -> Console:
    """Return standard output; in a log or a pipe it is wide enough to cut no column of a table."""
    console = Console(markup=False, highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = UNCUT
    return console
