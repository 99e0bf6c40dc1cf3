"""How units stream through an actor, on a real cluster."""

import threading

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


@pytest.mark.parametrize(
    ("settings", "readers"),
    [({"actors": 3}, 3), ({"actors": 2, "actor_gpus": 1.0}, 8), ({"actors": 2, "readers": 5}, 5)],
)
def test_readers_are_as_many_as_the_setting_or_the_actors_ask_for(settings, readers):
    assert stage_cluster.readers(Compute(**settings)) == readers


@pytest.fixture
def made_of(monkeypatch):
    """Lets Ray tell of a cluster of such nodes, and of one that is gone."""
    import ray

    def tell(*nodes):
        known = [{"Alive": True, "Resources": node} for node in nodes]
        gone = {"Alive": False, "Resources": {"CPU": 99.0, "GPU": 99.0}}
        monkeypatch.setattr(ray, "nodes", lambda: [*known, gone])

    return tell


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
    ("compute", "refused"),
    [
        ({"train_workers": 4}, False),
        (
            {"train_workers": 5},
            r"^compute\.train_workers: 5 training workers need one CPU each.* room for 4; low",
        ),
        ({"train_workers": 9, "min_train_workers": 4}, False),
        ({"train_workers": 9, "min_train_workers": 5}, r"^compute\.min_train_workers: 5 training workers"),
        ({"train_workers": 5, "autoscaling": True}, False),
        ({"train_workers": 2, "train_gpus": True}, False),  # a worker on a GPU asks for no CPU
        ({"train_workers": 3, "train_gpus": True}, "3 training workers need one GPU each, .* room for 2"),
    ],
)
def test_training_workers_are_counted_by_what_each_node_has_room_for(made_of, compute, refused):
    made_of({}, {"CPU": 1.5, "GPU": 2.0}, {"CPU": 3.0})
    if not refused:
        stage_cluster.check_training(Compute(**compute))
        return
    with pytest.raises(ConfigError, match=refused):
        stage_cluster.check_training(Compute(**compute))


@pytest.mark.parametrize(
    ("compute", "refused"),
    [
        ({"actor_cpus": 2.0}, False),
        ({"actor_cpus": 3.0}, "an actor needs 3 CPU on one node, .* have 2 CPU and 2 GPU at most; lower"),
        ({"actor_cpus": 3.0, "autoscaling": True}, False),
        ({"actor_gpus": 2.0}, False),
        ({"actor_cpus": 2.0, "actor_gpus": 1.0}, "an actor needs 2 CPU and 1 GPU on one node"),
        ({"train_workers": 9, "train_gpus": True}, False),
    ],
)
def test_an_actor_has_to_fit_on_one_node(made_of, compute, refused):
    made_of({"CPU": 1.0, "GPU": 2.0}, {"CPU": 2.0})
    if not refused:
        stage_cluster._check_resources(Compute(**compute))
        return
    with pytest.raises(ConfigError, match=refused):
        stage_cluster._check_resources(Compute(**compute))


def test_a_reader_has_to_fit_beside_the_actor(made_of):
    made_of({"CPU": 1.0})
    stage_cluster._check_resources(Compute(actor_cpus=0.75))
    with pytest.raises(
        ConfigError, match=r"an actor and a reader need 1\.25 CPU, and the Ray cluster has 1;"
    ):
        stage_cluster._check_resources(Compute(actor_cpus=1.0))


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
