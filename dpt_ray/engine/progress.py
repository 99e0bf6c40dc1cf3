"""Progress of running stages: a bar on a terminal, a line every 30 s elsewhere."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from types import MappingProxyType
from typing import NamedTuple, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

NOTHING: Mapping[str, float] = MappingProxyType({})


class Report(Protocol):
    """A callback for the progress of a stage: `done` of `total` `what` (images, steps, ...).

    `numbers` are of the work itself, such as the `loss` of a training or the `unreadable` images so far.
    """

    def __call__(self, done: int, total: int, what: str = "", numbers: Mapping[str, float] = NOTHING) -> None:
        """Report the current numbers."""


def silent(done: int, total: int, what: str = "", numbers: Mapping[str, float] = NOTHING) -> None:
    """Report nothing."""


# Told the name of a step and its numbers as it reports, again every WATCHED seconds while it runs, and at its
# end. Ray forgets the value of a metric that is not set for 20 s.
WATCHED = 5.0
Watch = Callable[[str, Mapping[str, float]], None]


class Reached(NamedTuple):
    """How far a piece of work has come, and its numbers (see `Report`)."""

    done: int
    numbers: Mapping[str, float] = NOTHING


# Seconds between polls of a stage's progress: in a local folder, and on a remote store, where each poll is a
# request and downloads a training's whole log.
POLL, REMOTE_POLL = 1.0, 15.0

LINE_EVERY = 30.0  # seconds between the lines of a stage where there is no terminal


@contextmanager
def following(
    progress: Report, total: int, what: str, read: Callable[[], Reached], every: float = POLL
) -> Iterator[None]:
    """Report the progress of the block, polled with `read()` every `every` seconds and at its end.

    Nothing is reported while `read` fails, for example because the storage is unavailable.
    """

    def look() -> None:
        with suppress(Exception):  # each storage raises errors of its own
            reached = read()
            progress(reached.done, total, what, reached.numbers)

    look()
    with repeating(look, every):
        yield
    look()


@contextmanager
def repeating(act: Callable[[], None], every: float) -> Iterator[None]:
    """Call `act` in a thread every `every` seconds while the block runs."""
    stop = threading.Event()

    def repeat() -> None:
        while not stop.wait(every):
            act()

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def describe(task: Task) -> str:
    """Return the progress of a step as text: done of total, rate, loss, time left, unreadable images."""
    total, done, numbers = task.total, task.completed, task.fields["numbers"]
    if not total:
        return f"running for {duration(task.elapsed or 0.0)}"
    words = [f"{done:,.0f}/{total:,.0f} {task.fields['what']}".rstrip()]
    speed = _speed(task)
    if speed:
        words.append(f"{_rate(speed)}/s")
    loss = numbers.get("loss", math.nan)
    if math.isfinite(loss):
        words.append(f"loss {loss:.4g}")
    if speed and done < total:
        words.append(f"{duration((total - done) / speed)} left")
    if numbers.get("unreadable"):
        words.append(f"{numbers['unreadable']:,.0f} unreadable")
    return ", ".join(words)


def _speed(task: Task) -> float:
    """Return the rate per second until now (not until the last report); 0 where it is unknown.

    Work from before this run is not counted, nor the start-up until the first progress.
    """
    if not task.fields["first"]:
        return 0.0
    since, done = task.fields["first"]
    passed = task.get_time() - since
    return (task.completed - done) / passed if passed > 0 else 0.0


def duration(seconds: float) -> str:
    """Return a duration for display: 40 s, 12 min, 3 h 20 min, 2 d 4 h."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days, hours = divmod(round(seconds / 3600), 24)
    return f"{days} d {hours} h" if hours else f"{days} d"


def _rate(speed: float) -> str:
    return f"{speed:,.0f}" if speed >= 10 else f"{speed:.2g}"


class _Described(ProgressColumn):
    """A column with the text of `describe`."""

    def render(self, task: Task) -> Text:
        """Return the column of one step."""
        return Text(describe(task))


class Display:
    """Progress of the steps of a run on `console`; `watch` is told their numbers too."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self.watch: Watch = lambda step, numbers: None
        self._told_to_wait = False
        self._expected = False

    def expect(self, seconds: float | None) -> None:
        """Print once how long a run will take, if that is known; None is not."""
        if seconds is not None and not self._expected:
            self._line(f"about {duration(seconds)} on this machine, computed as `dpt plan` does")
            self._expected = True

    def reused(self, number: int, total: int, name: str) -> None:
        """Print that a step's artifacts are already published."""
        self.console.print(f"[dim][{number}/{total}] {name}: done before[/dim]", highlight=False)

    def waiting(self, holder: str) -> None:
        """Print once that another process is making the same artifact."""
        if not self._told_to_wait:
            self.console.print(
                f"waiting: another run is making this ({holder})", highlight=False, markup=False
            )
        self._told_to_wait = True

    @contextmanager
    def step(
        self, number: int, total: int, name: str, left: Callable[[], float | None] = lambda: None
    ) -> Iterator[Report]:
        """Show a step while it runs; yield the function that reports its progress.

        `left()` is asked at the end for the seconds that all later steps will take; None is not known.
        """
        started = time.monotonic()
        self._told_to_wait = False
        is_terminal = self.console.is_terminal
        live = Progress(
            TextColumn("[{task.fields[number]}] {task.description}"),
            BarColumn(bar_width=20),
            _Described(),
            console=self.console,
            transient=True,
            disable=not is_terminal,
        )
        bar = live.add_task(
            name, total=None, number=f"{number}/{total}", what="", numbers=NOTHING, first=None
        )
        task, before = live.tasks[0], -1
        latest: Mapping[str, float] = NOTHING

        def report(done: int, total: int, what: str = "", numbers: Mapping[str, float] = NOTHING) -> None:
            nonlocal before, latest
            before = done if before < 0 else before
            first = task.fields["first"] or ((task.get_time(), done) if done > before else None)
            live.update(bar, completed=done, total=total, what=what, numbers=numbers, first=first)
            rate = _speed(task)
            left = {"seconds_left": (total - done) / rate} if rate else {}
            latest = {**numbers, "done": done, "total": total, "rate": rate, **left}
            self.watch(name, latest)

        def line() -> None:
            self._line(f"[{number}/{total}] {name}: {describe(task)}")

        # The lines also show a stage that is starting, or that reports nothing.
        with (
            live,
            repeating(lambda: self.watch(name, latest), WATCHED),
            nullcontext() if is_terminal else repeating(line, LINE_EVERY),
        ):
            yield report
        self.watch(name, {**latest, "rate": 0.0, "seconds_left": 0.0})
        seconds = time.monotonic() - started
        later = left() if seconds >= LINE_EVERY else None
        more = f"; about {duration(later)} left for all that follows" if later else ""
        self._line(f"[{number}/{total}] {name}: {seconds:.1f} s{more}")

    def _line(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)
