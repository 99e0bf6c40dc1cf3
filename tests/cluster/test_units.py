"""A unit of work whose storage or process fails."""

import errno
import os
import subprocess
import sys

import pytest
from tenacity import wait_none

from dpt_ray.cluster import units
from dpt_ray.cluster.session import connect
from dpt_ray.config.sections import Compute
from dpt_ray.engine.errors import StageError
from tests.helpers.paths import ROOT


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(units, "PAUSES", wait_none())
    monkeypatch.setattr(units, "ATTEMPTS", 4)


class Work:
    """A unit's call that fails as often as told, with an error."""

    def __init__(self, failures, error):
        self.failures, self.error, self.calls = failures, error, 0

    @units.unit_call
    def __call__(self, unit):
        self.calls += 1
        if self.calls <= self.failures:
            raise self.error
        return unit["shard"]


BUSY = OSError(errno.EBUSY, "Please reduce your request rate")


def test_a_unit_is_repeated_while_its_storage_is_busy():
    work = Work(3, BUSY)
    assert work({"shard": "a"}) == "a" and work.calls == 4


def test_a_storage_that_stays_busy_ends_the_unit_by_its_name():
    work = Work(99, BUSY)
    with pytest.raises(StageError, match=r"^shard a: OSError: .*reduce your request rate"):
        work({"shard": "a"})
    assert work.calls == 4


@pytest.mark.parametrize("error", [PermissionError("denied"), ValueError("a bug")])
def test_other_errors_end_it_at_once(error):
    work = Work(1, error)
    with pytest.raises(StageError, match=r"^shard a: "):
        work({"shard": "a"})
    assert work.calls == 1


def test_the_last_call_after_many_deaths_names_the_shard_and_does_nothing(monkeypatch):
    work = Work(0, BUSY)
    monkeypatch.setattr(units, "lost_processes", lambda: units.DEATHS - 1)
    assert work({"shard": "a"}) == "a"
    monkeypatch.setattr(units, "lost_processes", lambda: units.DEATHS)
    with pytest.raises(StageError, match=r"^shard a: 10 processes ended while they worked on it: "):
        work({"shard": "a"})
    assert work.calls == 1


QUIET = """
from dpt_ray.cluster import units
from dpt_ray.config.sections import Compute


class Actor:
    def __call__(self, unit):
        return {"seconds": 0.0, "peak_memory_bytes": 1, "images": 1}


def tell(done, total, what="", numbers=None):
    print(done)


work = [{"shard": "a"}, {"shard": "b"}]
units.run_actors(work, Actor, lambda threads: {}, Compute(readers=3), tell, 2, read=lambda unit: unit)
units.run_tasks(work, lambda threads: Actor(), Compute(readers=3), tell, 2)
"""


def test_a_pass_prints_nothing_of_its_own(cluster):
    done = subprocess.run(
        [sys.executable, "-c", QUIET],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, ["0", "1", "2"] * 2, "")


class Echo:
    """An actor that returns the unit that it was given."""

    def __call__(self, unit):
        return {"unit": repr(unit)}


@pytest.mark.parametrize("read", [None, lambda unit: dict(unit)])
def test_many_units_come_one_by_one_and_as_they_are(cluster, monkeypatch, read):
    """On a cluster whose CPUs are all held by the actors."""
    work = [
        {
            "shard": f"train-{n}",
            "unit": {"rows": n} | ({"part": "b"} if n > 30 else {}),
            "wanted": ["x", "y"][: 1 + n % 2],
        }
        for n in range(50)
    ]
    compute = Compute(actors=2)
    connect(compute)
    few = sorted(row["unit"] for row in units.stream_units(work, read, Echo, {}, compute))
    monkeypatch.setattr(units, "AT_ONCE", 20)
    monkeypatch.setattr(units, "PER_BLOCK", 8)
    many = sorted(row["unit"] for row in units.stream_units(work, read, Echo, {}, compute))
    assert few == many == sorted(map(repr, work))


def test_tasks_ask_for_the_memory_that_they_hold(cluster, tmp_path):
    def task(threads):
        def call(unit):
            import ray

            asked = ray.get_runtime_context().get_assigned_resources()["memory"]
            (tmp_path / unit["shard"]).write_text(str(int(asked)))
            return {"seconds": 0.0, "peak_memory_bytes": 1, "images": 1}

        return call

    units.run_tasks([{"shard": "a"}], task, Compute(), lambda *numbers: None, 1, name="graph", held=3 << 20)
    assert int((tmp_path / "a").read_text()) == (1 << 30) + (3 << 20)


@pytest.mark.parametrize("where", ["reader", "actor", "task"])
def test_a_unit_that_ends_every_process_ends_the_pass_in_one_line(cluster, where, tmp_path, monkeypatch):
    monkeypatch.setattr(units, "DEATHS", 1)
    log = tmp_path / "deaths"

    def die(unit):
        import os

        if unit["shard"] == "2":
            with log.open("a") as file:
                file.write("x")
            os._exit(1)

    def read(unit):
        if where == "reader":
            die(unit)
        return unit

    class Actor:
        def __call__(self, unit):
            if where == "actor":
                die(unit)
            return {"seconds": 0.0, "peak_memory_bytes": 1, "images": 1}

    def task(threads):
        def call(unit):
            die(unit)
            return {"seconds": 0.0, "peak_memory_bytes": 1, "images": 1}

        return call

    work, compute = [{"shard": str(number)} for number in range(4)], Compute()
    with pytest.raises(StageError, match=r"^2 processes ended while they worked on it: "):
        if where == "task":
            units.run_tasks(work, task, compute, lambda *numbers: None, 4)
        else:
            given = (compute, lambda *numbers: None, 4)
            units.run_actors(work, Actor, lambda threads: {}, *given, read=read)
    assert log.read_text() == "xx"
