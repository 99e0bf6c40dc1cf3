"""The shards of a source, listed in tasks."""

import os
import signal
import time

import pytest

from dpt_ray.cluster import shards
from dpt_ray.config.sections import Compute

NAMES = [f"{number}.tar" for number in range(7)]


def test_the_results_come_in_order_and_are_told(cluster, monkeypatch):
    monkeypatch.setattr(shards, "AHEAD", 3)
    told = []
    each = shards.InTasks(Compute(), lambda done, *rest: told.append((done, *rest)))
    names, processes = zip(*each(lambda name: (name, os.getpid()), NAMES), strict=True)
    assert list(names) == NAMES and os.getpid() not in processes
    assert sorted(set(told)) == [(number, 7, "shards") for number in range(7)]


def test_an_error_is_that_of_the_function(cluster):
    def do(name):
        if name == NAMES[1]:
            raise ValueError(f"{name} is not a complete tar")
        return name

    found = shards.InTasks(Compute())(do, NAMES)
    assert next(found) == NAMES[0]
    with pytest.raises(ValueError, match=r"^1.tar is not a complete tar"):
        next(found)


def test_a_task_whose_process_dies_is_repeated(cluster, tmp_path):
    def do(name):
        mark = tmp_path / name
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return name

    assert list(shards.InTasks(Compute())(do, NAMES[:2])) == NAMES[:2]


def test_what_has_not_begun_is_cancelled_where_nobody_wants_it(cluster, tmp_path):
    def do(name):
        (tmp_path / name).touch()
        if name != "0":
            time.sleep(3)
        return name

    found = shards.InTasks(Compute())(do, [str(number) for number in range(60)])
    assert next(found) == "0"
    found.close()
    end = time.monotonic() + 60
    while cluster.pids("ray::list shards"):
        assert time.monotonic() < end
        time.sleep(0.1)
    assert len(list(tmp_path.iterdir())) < 30  # eight at a time
