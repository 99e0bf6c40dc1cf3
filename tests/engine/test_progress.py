"""What is told of a stage that runs, while its storage comes and goes."""

import io
import re
import threading

import pytest
from rich.console import Console

from dpt_ray.engine import progress
from dpt_ray.engine.progress import Display, Reached, duration, following


def test_progress_is_followed_through_a_storage_that_is_away_for_a_moment():
    reads, told, again = iter(["away", 3, "away", "away", 5]), [], threading.Event()

    def read():
        value = next(reads, 5)
        if value == "away":
            raise RuntimeError("the endpoint cannot be reached")  # as botocore's, no OSError
        return Reached(value, {"loss": 0.5})

    def report(*numbers):
        told.append(numbers)
        if numbers[0] == 5:
            again.set()

    with following(report, 10, "steps", read, every=0.01):
        assert again.wait(10)
    assert told[:2] == [(3, 10, "steps", {"loss": 0.5}), (5, 10, "steps", {"loss": 0.5})]


class Clock:
    """The time that rich measures, set by hand."""

    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    real = progress.Progress
    monkeypatch.setattr(progress, "Progress", lambda *columns, **more: real(*columns, get_time=clock, **more))
    return clock


class Log(io.StringIO):
    """A log file that tells of each new line."""

    def __init__(self):
        super().__init__()
        self.written = threading.Event()

    def write(self, text):
        super().write(text)
        self.written.set()


def test_a_log_file_gets_a_line_now_and_then_with_rate_loss_and_time_left(clock, monkeypatch):
    monkeypatch.setattr(progress, "LINE_EVERY", 0.01)
    log = Log()
    with Display(Console(file=log)).step(3, 16, "encoder") as report:
        for clock.now, done in ((0, 0), (100, 10), (110, 510), (120, 1010)):
            report(done, 4010, "steps", {"loss": 2.5})
        log.written.clear()
        assert log.written.wait(10)
    lines = log.getvalue().splitlines()
    # 1,000 steps in 20 s, whatever the start took; 3,000 more need a minute.
    assert "[3/16] encoder: 1,010/4,010 steps, 50/s, loss 2.5, 1 min left" in lines
    assert re.fullmatch(r"\[3/16\] encoder: [\d.]+ s", lines[-1])


def test_a_stage_that_reports_nothing_is_told_to_run(clock, monkeypatch):
    monkeypatch.setattr(progress, "LINE_EVERY", 0.01)
    log = Log()
    with Display(Console(file=log)).step(1, 2, "evaluation"):
        clock.now = 90
        log.written.clear()
        assert log.written.wait(10)
    assert "[1/2] evaluation: running for 2 min" in log.getvalue()


def test_a_terminal_has_a_bar_and_no_lines(clock, monkeypatch):
    monkeypatch.setattr(progress, "LINE_EVERY", 0.01)
    terminal = Console(file=io.StringIO(), force_terminal=True, width=100)
    with Display(terminal).step(1, 2, "features") as report:
        for clock.now, done in ((0, 0), (1, 256), (11, 512), (21, 768)):
            report(done, 2048, "images")
    shown = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", terminal.file.getvalue())
    assert re.search(r"\[1/2\] features [━╸╺]+ 768/2,048 images, 26/s, 50 s left", shown)
    assert shown.count("[1/2] features: ") == 1  # the line at its end


def test_time_that_passes_without_progress_slows_the_rate(clock):
    terminal = Console(file=io.StringIO(), force_terminal=True, width=100)
    with Display(terminal).step(1, 2, "sweep") as report:
        for clock.now, done in ((0, 0), (1, 1), (6, 6), (101, 6)):
            report(done, 8, "settings")
    assert "6/8 settings, 0.05/s, 40 s left" in terminal.file.getvalue()


def test_what_was_done_before_is_not_taken_for_speed(clock):
    terminal = Console(file=io.StringIO(), force_terminal=True, width=100)
    with Display(terminal).step(1, 2, "denoiser") as report:
        for clock.now, done in ((0, 900), (10, 910), (20, 920)):
            report(done, 1000, "steps")
    assert "920/1,000 steps, 1/s, 1 min left" in terminal.file.getvalue()


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        *((0.4, "0 s"), (59, "59 s"), (89, "1 min"), (3540, "59 min"), (3600, "1 h")),
        *((12000, "3 h 20 min"), (86400, "1 d"), (187200, "2 d 4 h")),
    ],
)
def test_times_are_told_as_a_person_says_them(seconds, words):
    assert duration(seconds) == words
