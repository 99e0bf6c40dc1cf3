"""How units stream through an actor, on a real cluster."""

import threading
from types import SimpleNamespace

import pytest

from dpt_ray.cluster import session as stage_cluster
from dpt_ray.cluster import training
from dpt_ray.cluster.units import stream_units
from dpt_ray.config import ConfigError
from dpt_ray.config.sections import Compute
from tests.helpers.gated_training import gated_task


def test_an_actor_publishes_a_unit_while_it_has_the_next(cluster):
    class Meeting:
        """Publishes a unit only once another one is being computed or published as well."""

        def __init__(self):
            self.both = threading.Barrier(2, timeout=60)

        def __call__(self, unit):
            self.both.wait()
            return unit

    compute = Compute(actors=1)
    stage_cluster.connect(compute)
    units = [{"shard": n} for n in range(4)]
    found = list(stream_units(units, None, Meeting, {}, compute))
    assert sorted(unit["shard"] for unit in found) == [0, 1, 2, 3]


@pytest.mark.parametrize(("apart", "startup"), [(2.5, 2.5), (-86400.0, 0.0), (86400.0, 9.0)])
def test_a_startup_between_two_wall_clocks_is_within_the_seconds_that_passed(apart, startup):
    assert stage_cluster.startup_seconds(apart, 9.0) == startup


@pytest.mark.parametrize(
    ("settings", "readers"),
    [({"actors": 3}, 3), ({"actors": 2, "actor_gpus": 1.0}, 8), ({"actors": 2, "readers": 5}, 5)],
)
def test_readers_are_as_many_as_the_setting_or_the_actors_ask_for(settings, readers):
    assert stage_cluster.readers(Compute(**settings)) == readers


def test_more_training_workers_than_there_is_room_for_are_refused_when_training_starts(
    cluster, tmp_path, monkeypatch
):
    started = []
    monkeypatch.setattr(training, "_fit", lambda task, function: started.append(task))
    stage_cluster.connect(Compute(train_workers=3))  # other stages may go on
    for refused in ({"train_workers": 3}, {"train_workers": 1, "train_gpus": True}):
        with pytest.raises(ConfigError, match=r"compute\.train_workers: .* has room for [02];"):
            training.run(gated_task(tmp_path, refused), lambda task, worker: None)
    assert not started


@pytest.mark.parametrize(
    ("cpus", "settings", "workers", "expected"),
    [(8.0, {}, 1, 8), (8.0, {}, 3, 2), (8.0, {}, 16, 1), (8.0, {"threads": 5}, 3, 5), (0.0, {}, 2, 4)],
)
def test_a_training_worker_has_its_share_of_its_own_node(
    made_of, monkeypatch, cpus, settings, workers, expected
):
    import ray

    made_of({"CPU": 64.0}, {"CPU": cpus, "GPU": 8.0})
    here = SimpleNamespace(get_node_id=lambda: "node-1")
    monkeypatch.setattr(ray, "get_runtime_context", lambda: here)
    monkeypatch.setattr(stage_cluster, "usable_cpus", lambda: 8)
    assert stage_cluster.threads_here(Compute(**settings), workers) == expected


def test_a_cluster_that_was_refused_is_not_joined_by_the_next_call(monkeypatch):
    import ray

    joined = []
    monkeypatch.setattr(ray, "is_initialized", lambda: bool(joined))
    monkeypatch.setattr(ray, "init", lambda **given: joined.append(given))
    monkeypatch.setattr(ray, "shutdown", joined.clear)
    monkeypatch.setattr(stage_cluster, "check_actors", refuse)
    for _ in range(2):
        with pytest.raises(ConfigError, match="no GPU"):
            stage_cluster.connect(Compute())
    assert not joined


def refuse(compute):
    raise ConfigError("no GPU")


@pytest.mark.parametrize(
    ("compute", "processes", "expected"),
    [
        ({}, 1, 16),  # all of one node
        ({}, 2, 16),
        ({}, 8, 4),  # of 32 CPUs
        ({}, 99, 1),
        ({"threads": 3}, 8, 3),
    ],
)
def test_workers_share_the_cpus_of_all_nodes(made_of, compute, processes, expected):
    made_of({"CPU": 16.0}, {"CPU": 16.0}, {"GPU": 1.0})
    assert stage_cluster.threads(Compute(**compute), processes) == expected


def test_a_cluster_without_a_node_yet_gives_one_thread(made_of):
    made_of({})
    assert stage_cluster.threads(Compute(), 2) == 1


def test_the_driver_has_its_machine_or_what_its_container_is_limited_to(tmp_path, monkeypatch):
    monkeypatch.setattr(stage_cluster.os, "sched_getaffinity", lambda process: range(12))
    monkeypatch.setattr(stage_cluster, "CGROUP", tmp_path / "cpu.max")
    assert stage_cluster.threads(Compute()) == 12  # no control groups
    for limit, expected in (("max 100000", 12), ("350000 100000", 3), ("50000 100000", 1)):
        (tmp_path / "cpu.max").write_text(f"{limit}\n")
        assert stage_cluster.threads(Compute()) == expected
    assert stage_cluster.threads(Compute(cpus=2)) == 2
    assert stage_cluster.threads(Compute(cpus=2, threads=5)) == 5
