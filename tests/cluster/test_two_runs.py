"""Two runs at once on a cluster that has not the room for both."""

import os
import subprocess
import sys

import pytest

from tests.helpers.cluster import SCRATCH, free_ports, ray_start
from tests.helpers.processes import kill_session
from tests.helpers.tiny_run import TINY, TinyRun

PASS = """
import time
from dpt_ray.cluster.units import run_actors
from dpt_ray.config.sections import Compute


def read(unit):
    time.sleep(0.2)
    return unit


class Sleep:
    def __call__(self, unit):
        time.sleep(0.2)
        return {"seconds": 0.2, "peak_memory_bytes": 1, "images": 1}


units, done = [{"shard": str(n)} for n in range(8)], []
compute = Compute(actors=2, actor_cpus=0.5)
run_actors(units, Sleep, lambda threads: {}, compute, lambda n, *more: done.append(n), 8, read=read)
assert done[-1] == 8
"""


@pytest.fixture
def one_cpu():
    """The address of a cluster of one CPU, which two actors of one run fill."""
    port, agent, client = free_ports(3)
    head = ray_start(
        *("--head", "--num-cpus=1", f"--port={port}", f"--temp-dir={SCRATCH}/one"),
        "--include-dashboard=false",
        *(f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}"),
    )
    yield f"127.0.0.1:{port}"
    kill_session(head)


def all_end(processes, seconds):
    """Waits until all have ended well."""
    try:
        for each in processes:
            _, error = each.communicate(timeout=seconds)
            assert each.returncode == 0, error
    finally:
        for each in processes:
            each.kill()


def test_the_actors_of_two_passes_do_not_take_the_room_of_both_passes_readers(one_cpu):
    environment = os.environ | {"RAY_ADDRESS": one_cpu}
    passes = [
        subprocess.Popen([sys.executable, "-c", PASS], env=environment, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    all_end(passes, 120)


def test_two_runs_finish_beside_each_other(cluster, finished, tmp_path):
    overrides = (*TINY, "compute.actors=4")  # as many as the cluster has room for
    one = TinyRun(tmp_path / "one", overrides)
    other = TinyRun(tmp_path / "other", (*overrides, "pretrain.seed=1"))
    started = [run.start("extract") for run in (one, other)]
    all_end(started, 400)
    for name in ("features", "moments"):
        assert one.payloads(name) == finished.payloads(name), name
