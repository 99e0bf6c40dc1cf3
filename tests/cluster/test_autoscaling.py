"""Nodes that are added on demand, by Ray's own autoscaler on this machine."""

import json
import time

import pytest

from tests.helpers.autoscaling import autoscaling_cluster

NODES = 2


@pytest.fixture(scope="module")
def autoscaling():
    with autoscaling_cluster({"CPU": 2, "GPU": 1}, most=NODES, idle_minutes=0.4) as cluster:
        yield cluster


SAMPLING = """
import json, os, sys, time
from dpt_ray.cluster.session import connect
from dpt_ray.cluster.units import stream_units
from dpt_ray.config.sections import Compute

compute, met, nodes = Compute(**json.loads(sys.argv[1])), sys.argv[2], int(sys.argv[3])
connect(compute)
import ray


class Meet:
    # Each unit takes until there was one on every node.

    def __call__(self, unit):
        node, end = ray.get_runtime_context().get_node_id(), time.monotonic() + 120
        open(os.path.join(met, node), "w").close()
        while len(os.listdir(met)) < nodes and time.monotonic() < end:
            time.sleep(0.1)
        return unit | {"node": node}


units = [{"shard": n} for n in range(6)]
print(json.dumps(list(stream_units(units, lambda unit: unit, Meet, {}, compute))))
"""


def test_a_pool_asks_for_all_its_nodes_at_once_works_on_all_and_lets_them_go(autoscaling, tmp_path):
    compute = {"actors": 3, "actor_gpus": 1, "autoscaling": True}
    done = autoscaling.drive(SAMPLING, json.dumps(compute), str(tmp_path), str(NODES))
    assert done.returncode == 0, done.stderr
    # The autoscaler's messages may come before and after.
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("[{")))
    assert sorted(row["shard"] for row in found) == list(range(6))
    assert len({row["node"] for row in found}) == NODES
    assert autoscaling.decisions()[0] == f"Adding {NODES} node(s) of type gpu."  # in one request
    end = time.monotonic() + 120
    while not [line for line in autoscaling.decisions() if line.startswith("Removing")]:
        assert time.monotonic() < end, "no idle node left"
        time.sleep(1)


CHECKS = """
import json, sys
from dpt_ray.cluster.resources import check_training
from dpt_ray.cluster.session import connect
from dpt_ray.config import ConfigError
from dpt_ray.config.sections import Compute

compute = Compute(autoscaling=True, **json.loads(sys.argv[1]))
try:
    connect(compute)
    check_training(compute)
except ConfigError as error:
    sys.exit(f"error: {error}")
"""


@pytest.mark.parametrize(
    ("compute", "refused"),
    [
        ({"actor_gpus": 4}, "compute: an actor needs 0.5 CPU and 4 GPU on one node"),
        ({"train_workers": 3, "train_gpus": True}, "compute.train_workers: 3 training workers need one GPU"),
    ],
)
def test_what_no_node_can_serve_is_refused_with_what_may_be_added(autoscaling, compute, refused):
    done = autoscaling.drive(CHECKS, json.dumps(compute))
    assert done.returncode == 1
    said = done.stderr.splitlines()[-1]
    assert said.startswith(f"error: {refused}")
    assert "its autoscaler may add: gpu (2 CPU, 1 GPU; at most 2)" in said


def test_an_autoscaler_that_is_not_on_the_drivers_machine_is_asked(autoscaling):
    elsewhere = "from dpt_ray.cluster import resources; resources.autoscaler = lambda: None\n"
    done = autoscaling.drive(elsewhere + CHECKS, json.dumps({"actor_gpus": 4}))
    assert done.returncode == 1
    said = done.stderr.splitlines()[-1]
    assert said.startswith("error: compute: 0.5 CPU and 4 GPU are needed on one node, and the cluster's auto")
    done = autoscaling.drive(elsewhere + CHECKS, json.dumps({"actor_gpus": 1}))
    assert done.returncode == 0, done.stderr
