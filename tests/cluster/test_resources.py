"""Whether a run fits the nodes that a cluster has, and those that its autoscaler may add."""

import re

import pytest

from dpt_ray.cluster import resources
from dpt_ray.cluster.autoscaler import Autoscaler, NodeType
from dpt_ray.config import ConfigError
from dpt_ray.config.sections import Compute


@pytest.fixture
def adding(monkeypatch):
    """Lets the cluster have an autoscaler of such worker types, or one that is not known here."""

    def tell(*types, most=9):
        found = Autoscaler(tuple(NodeType(*kind) for kind in types), most) if types else None
        monkeypatch.setattr(resources, "autoscaler", lambda: found)

    return tell


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
        ({"train_workers": 2, "train_gpus": True}, False),  # a worker on a GPU asks for no CPU
        ({"train_workers": 3, "train_gpus": True}, "3 training workers need one GPU each, .* room for 2"),
    ],
)
def test_training_workers_are_counted_by_what_each_node_has_room_for(made_of, compute, refused):
    made_of({}, {"CPU": 1.5, "GPU": 2.0}, {"CPU": 3.0})
    if not refused:
        resources.check_training(Compute(**compute))
        return
    with pytest.raises(ConfigError, match=refused):
        resources.check_training(Compute(**compute))


@pytest.mark.parametrize(
    ("compute", "refused"),
    [
        ({"actor_cpus": 2.0}, False),
        ({"actor_cpus": 3.0}, "an actor needs 3 CPU on one node, .* have 2 CPU and 2 GPU at most; lower"),
        ({"actor_gpus": 2.0}, False),
        ({"actor_cpus": 2.0, "actor_gpus": 1.0}, "an actor needs 2 CPU and 1 GPU on one node"),
        ({"train_workers": 9, "train_gpus": True}, False),
    ],
)
def test_an_actor_has_to_fit_on_one_node(made_of, compute, refused):
    made_of({"CPU": 1.0, "GPU": 2.0}, {"CPU": 2.0})
    if not refused:
        resources.check_actors(Compute(**compute))
        return
    with pytest.raises(ConfigError, match=refused):
        resources.check_actors(Compute(**compute))


def test_readers_beside_actors_ask_for_a_quarter_of_the_memory_of_a_cpu(made_of):
    made_of({"CPU": 4.0, "memory": 8e9}, {"CPU": 2.0, "memory": 12e9, "GPU": 2.0}, {"memory": 9e9})
    assert resources.beside_actors() == {"num_cpus": 0, "memory": 500_000_000}
    made_of({"CPU": 4.0})  # `ray start --memory=0`
    assert resources.beside_actors() == {"num_cpus": 0}
    made_of()
    assert resources.beside_actors() == {"num_cpus": 0, "memory": 512 << 20}


def test_a_fit_asks_for_its_memory_and_never_for_more_than_a_node_with_its_gpu_has(made_of, caplog):
    made_of({"CPU": 8.0, "memory": 64e9}, {"CPU": 4.0, "GPU": 1.0, "memory": 16e9})
    gpu = Compute(actor_gpus=1.0)
    assert resources.memory_of_fit(gpu, 4 << 30, "sweep") == (4 + 3) << 30  # features, and CUDA's libraries
    assert resources.memory_of_fit(Compute(), 30 << 30, "sweep") == (30 + 1) << 30
    assert not caplog.records
    assert resources.memory_of_fit(gpu, 30 << 30, "sweep") == 16 * 10**9
    assert re.fullmatch(
        "sweep: a process needs about 33.0 GiB, .* 1 GPU has 14.9 GiB: .*", caplog.messages[0]
    )
    made_of({"CPU": 4.0, "GPU": 1.0})  # a node that does not say how much memory it has
    assert resources.memory_of_fit(gpu, 30 << 30, "sweep") == 0
    assert len(caplog.records) == 1


def test_a_fit_asks_for_what_a_node_has_that_may_be_added(made_of, adding):
    made_of(HEAD | {"memory": 9e9})
    adding(("gpu", {"CPU": 8.0, "GPU": 1.0, "memory": 50e9}, 4))
    wanted = Compute(actor_gpus=1.0, autoscaling=True)
    assert resources.memory_of_fit(wanted, 20 << 30, "sweep") == 23 << 30


def test_readers_stay_off_a_head_that_is_for_drivers_only(made_of):
    made_of(HEAD | {"memory": 9e9}, {"CPU": 1.0, "memory": 4e9})
    found = resources.beside_actors()
    assert found == {"num_cpus": 0, "memory": 10**9, "label_selector": {"ray.io/node-id": "!node-0"}}
    made_of(HEAD | {"CPU": 2.0}, {"CPU": 1.0})
    assert "label_selector" not in resources.beside_actors()


CPUS, GPUS = ("cpus", {"CPU": 4.0}, 2), ("gpus", {"CPU": 2.0, "GPU": 1.0}, 4)
HEAD = {resources.HEAD: 1.0}


@pytest.mark.parametrize(
    ("compute", "refused"),
    [
        ({"actor_cpus": 4.0}, False),
        ({"actor_cpus": 2.0, "actor_gpus": 1.0}, False),
        ({"actor_cpus": 4.0, "actor_gpus": 1.0}, "an actor needs 4 CPU and 1 GPU on one node"),
        (
            {"actor_gpus": 2.0},
            r"have 0 CPU and 0 GPU at most \(its autoscaler may add: cpus \(4 CPU; at most 2\), "
            r"gpus \(2 CPU, 1 GPU; at most 4\)\); lower .*, or give the cluster a node type that has them$",
        ),
    ],
)
def test_an_actor_has_to_fit_on_a_node_that_may_be_added(made_of, adding, compute, refused):
    made_of(HEAD)
    adding(CPUS, GPUS)
    if not refused:
        resources.check_actors(Compute(autoscaling=True, **compute))
        return
    with pytest.raises(ConfigError, match=refused):
        resources.check_actors(Compute(autoscaling=True, **compute))


@pytest.mark.parametrize(
    ("compute", "most", "room"),
    [
        ({"train_gpus": True}, 9, 4),
        ({"train_gpus": True}, 3, 3),  # fewer nodes than the types allow, taken together
        ({}, 9, 16),  # 2 nodes of 4 CPUs and 4 of 2
        ({}, 3, 10),
    ],
)
def test_training_workers_have_to_fit_on_the_nodes_that_may_be_added(made_of, adding, compute, most, room):
    made_of(HEAD, {"CPU": 2.0, "GPU": 1.0})  # one of the workers is there
    adding(CPUS, GPUS, most=most)
    resources.check_training(Compute(autoscaling=True, train_workers=room, **compute))
    with pytest.raises(ConfigError, match=f"room for {room} .its autoscaler may add: cpus .* raise max_wo"):
        resources.check_training(Compute(autoscaling=True, train_workers=room + 1, **compute))


def test_an_elastic_training_may_not_ask_an_autoscaler_for_more_workers_than_it_adds(made_of, adding):
    made_of(HEAD)
    adding(CPUS, GPUS)
    elastic = {"autoscaling": True, "train_gpus": True, "min_train_workers": 2}
    resources.check_training(Compute(train_workers=4, **elastic))
    with pytest.raises(ConfigError, match=r"^compute\.train_workers: 5 training workers need one GPU each"):
        resources.check_training(Compute(train_workers=5, **elastic))


def test_what_is_not_known_is_refused_only_if_the_autoscaler_says_so(made_of, adding, monkeypatch):
    made_of(HEAD, {"CPU": 2.0})
    adding()
    asked, has_none = [], []

    def has_no_node_for(wanted):
        asked.append(wanted)
        return bool(has_none)

    monkeypatch.setattr(resources, "has_no_node_for", has_no_node_for)
    resources.check_actors(Compute(autoscaling=True, actor_cpus=2.0))
    assert not asked  # there is a node
    compute = Compute(autoscaling=True, actors=7, actor_gpus=4.0, train_workers=9, train_gpus=True)
    resources.check_actors(compute)
    resources.check_training(compute)
    assert asked == [{"CPU": 0.5, "GPU": 4.0}, {"GPU": 1.0}]
    has_none.append(True)
    with pytest.raises(
        ConfigError, match=r"0\.5 CPU and 4 GPU are needed on one node, .* none of its node ty"
    ):
        resources.check_actors(compute)
    with pytest.raises(ConfigError, match="1 GPU are needed on one node"):
        resources.check_training(compute)
