"""How long a run will still take: computed before it starts, corrected while it is made."""

import io

import pytest
from rich.console import Console

from dpt_ray.config import load_config
from dpt_ray.engine import progress
from dpt_ray.engine.execute import execute
from dpt_ray.engine.progress import Display
from dpt_ray.pipeline import time_left
from dpt_ray.pipeline.cost import costs
from dpt_ray.pipeline.flow import flow
from dpt_ray.pipeline.speed import FitShape, Rates
from dpt_ray.pipeline.time_left import TimeLeft
from dpt_ray.store.artifact import Store
from tests.helpers.paths import DIGITS


class Clock:
    """`time.monotonic` set by hand."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now


@pytest.fixture
def left(tmp_path, monkeypatch):
    """TimeLeft of a run on the digits whose index is there, at 1 GFLOP/s for everything."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(time_left, "machine_rates", lambda *given: Rates(1e9, 1e9, "cpu", 1e9))
    config, store = load_config(DIGITS), Store(str(tmp_path))
    nodes = flow(config)
    execute([nodes["index"]], store, config.compute, Display(Console(file=io.StringIO())), {})
    found = TimeLeft(config, nodes["index"], store)
    found.nodes = nodes
    return found


def test_a_short_run_measures_nothing(left):
    assert left(list(left.nodes.values())) is None


def test_without_an_index_nothing_is_known(left, tmp_path):
    empty = TimeLeft(load_config(DIGITS), left.nodes["index"], Store(str(tmp_path / "other")))
    assert empty(list(left.nodes.values())) is None


def test_on_a_cluster_that_was_there_before_nothing_is_told(left, monkeypatch):
    monkeypatch.setattr(time_left, "SHORT", 0.0)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert left(list(left.nodes.values())) is None


@pytest.mark.parametrize(("missing", "measured"), [("balanced_self_training", True), ("features", False)])
def test_the_speed_of_fits_is_measured_where_there_are_some_to_make(missing, measured, monkeypatch):
    monkeypatch.setattr(time_left, "machine_rates", lambda config, threads, shape: shape)
    config, images = load_config(DIGITS, ["ladder={}"]), {"train": 1290, "validation": 100}
    found = time_left.rates_for(config, images, 10, {missing: costs(config, images, 10)[missing]})
    assert found == (FitShape(1300, 64, 10) if measured else None)


def test_the_time_left_is_that_of_the_nodes_and_grows_on_a_slow_machine(left, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(time_left, "time", clock)
    monkeypatch.setattr(time_left, "SHORT", 0.0)
    everything = list(left.nodes.values())
    whole = left(everything)
    after = [node for node in everything if node.name != "encoder"]
    clock.now = 1.0  # faster than computed, as what an earlier run began: not corrected
    computed = left(after)
    assert 0 < computed < whole
    clock.now = 3 * (whole - computed)
    assert left(after) == pytest.approx(3 * computed)
    assert left([]) == 0


def test_the_display_tells_the_expected_time_once_and_what_follows_a_long_step(monkeypatch):
    clock, log = Clock(), io.StringIO()
    monkeypatch.setattr(progress, "time", clock)
    display = Display(Console(file=log))
    for seconds in (None, 4200, 3000):
        display.expect(seconds)
    for number, (name, later) in enumerate({"index": 60.0, "encoder": 1260.0, "report": None}.items(), 1):
        with display.step(number, 3, name, lambda later=later: later):
            clock.now += 0 if name == "index" else 90
    assert log.getvalue().splitlines() == [
        "about 1 h 10 min on this machine, computed as `dpt plan` does",
        "[1/3] index: 0.0 s",
        "[2/3] encoder: 90.0 s; about 21 min left for all that follows",
        "[3/3] report: 90.0 s",
    ]
