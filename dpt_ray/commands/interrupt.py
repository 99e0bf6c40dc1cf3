"""Ctrl-C: one line and exit code 130 at any time."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

from rich.console import Console
from typer.core import TyperGroup

STOPPED = "stopped; run the same command again to continue"


class Group(TyperGroup):
    """Commands that print how to continue after Ctrl-C; typer would print nothing."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            Console(stderr=True).print(STOPPED, highlight=False, soft_wrap=True)
            sys.exit(130)


@contextmanager
def interruptible() -> Iterator[None]:
    """Make the first Ctrl-C in the block shut down in order, and the second exit at once."""
    before = signal.signal(signal.SIGINT, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _interrupt(signal_number: int, frame: FrameType | None) -> NoReturn:
    signal.signal(signal.SIGINT, _end_at_once)
    raise KeyboardInterrupt


def _end_at_once(signal_number: int, frame: FrameType | None) -> NoReturn:
    os.write(2, f"{STOPPED}\n".encode())
    os._exit(130)
