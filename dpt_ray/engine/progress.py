"""What a person sees while stages run: a progress bar on a terminal, one line a stage elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

Report = Callable[[int, int], None]

# Seconds between two looks at how far a stage is: into a folder, and into a remote store, where each look
# is a request and the download of a training's whole log.
POLL, REMOTE_POLL = 1.0, 15.0


@contextmanager
def following(progress: Report, total: int, read: Callable[[], int], every: float = POLL) -> Iterator[None]:
    """Reports every so many seconds how far `read()` says that the work in the block has come.

    While `read` fails, as where a storage is away for a moment, nothing new is reported.
    """
    stop = threading.Event()

    def look() -> None:
        with suppress(Exception):  # each kind of storage has errors of its own
            progress(read(), total)

    def watch() -> None:
        while not stop.wait(every):
            look()

    look()
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        stop.set()
        watcher.join()


class Display:
    """Progress of the steps of a run on `console`."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self._told_to_wait = False

    def reused(self, number: int, total: int, name: str) -> None:
        """Says that a step's artifacts are there already."""
        self.console.print(f"[dim][{number}/{total}] {name}: done before[/dim]", highlight=False)

    def waiting(self, holder: str) -> None:
        """Says once that another process is making the same artifact."""
        if not self._told_to_wait:
            self.console.print(f"waiting: another run is making this ({holder})", highlight=False)
        self._told_to_wait = True

    @contextmanager
    def step(self, number: int, total: int, name: str) -> Iterator[Report]:
        """Shows a step while it runs; gives the function that reports (done, total)."""
        started = time.monotonic()
        self._told_to_wait = False
        columns = [
            TextColumn("[{task.fields[number]}] {task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        ]
        live = Progress(*columns, console=self.console, transient=True, disable=not self._is_terminal)
        with live:
            bar = live.add_task(name, total=None, number=f"{number}/{total}")
            yield lambda done, of: live.update(bar, completed=done, total=of)
        seconds = time.monotonic() - started
        self.console.print(f"[{number}/{total}] {name}: {seconds:.1f} s", highlight=False, markup=False)

    @property
    def _is_terminal(self) -> bool:
        return self.console.is_terminal
