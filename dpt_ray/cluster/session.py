"""The Ray cluster of a run: an existing one is joined, else one is started on this machine."""

from __future__ import annotations

import logging
import os
import time
from contextlib import suppress
from pathlib import Path

from rich.console import Console

from dpt_ray.cluster.ray_internals import native_output_hidden, quiet, set_switches
from dpt_ray.cluster.resources import check_actors, nodes
from dpt_ray.config import ConfigError
from dpt_ray.config.sections import Compute

# By default glibc returns large blocks to the kernel at once, and the next tensor page-faults them in again:
# 40% of the time of the autoencoder on a CPU. These settings keep the blocks, in one arena (only the main
# arena can keep them).
ALLOCATOR = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(8 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(16 << 30),
}

CGROUP = Path("/sys/fs/cgroup/cpu.max")  # quota and period of CPU time in microseconds


def connect(compute: Compute) -> float:
    """Join the cluster in RAY_ADDRESS or start a local one; return the seconds (0 if already joined).

    Token authentication is always on: a local start turns it on by default, `ray start` does not, and
    nodes in different modes refuse each other's connections.
    """
    set_switches()
    import ray

    if ray.is_initialized():
        return 0.0
    started = time.perf_counter()
    address = os.environ["RAY_ADDRESS"] if joins_another() else None
    local: dict[str, int | bool | None] = (
        {} if address else {"num_cpus": compute.cpus, "include_dashboard": False}
    )
    if not address:  # the nodes of a cluster get it from their `ray start`
        for name, value in ALLOCATOR.items():
            os.environ.setdefault(name, value)
    with native_output_hidden():
        # "local": without an address Ray would join a cluster that an earlier `ray start` left running.
        ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **local)
    quiet()
    try:
        check_actors(compute)
    except ConfigError:
        ray.shutdown()  # else the next call would take the refused cluster for one that fits
        raise
    if note := unused_gpus(compute, sum(node.get("GPU", 0.0) for node in nodes())):
        Console(stderr=True).print(note, highlight=False, soft_wrap=True)
    return time.perf_counter() - started


def startup_seconds(apart: float, elapsed: float) -> float:
    """Return the start-up time of work in another process, by the wall clocks of the two.

    It is `apart`, the difference of their times, which clocks that jump or differ make wrong: it is kept
    between 0 and `elapsed`, the seconds that the caller's monotonic clock has counted meanwhile.
    """
    return round(min(max(0.0, apart), elapsed), 3)


def joins_another() -> bool:
    """Return whether runs of this process join a cluster that was there before."""
    return bool(os.environ.get("RAY_ADDRESS"))


def readers(compute: Compute) -> int:
    """Return how many light tasks run at a time: by default one per actor, four per actor with a GPU.

    A ViT-B/4 consumes several hundred images per second on a GPU, and a core decodes about 200
    (benchmarks/decode.py).
    """
    return compute.readers or compute.actors * (4 if compute.actor_gpus else 1)


def threads(compute: Compute, processes: int | None = None) -> int:
    """Return the threads of each of `processes` concurrent workers, actors or tasks; None: of this process.

    By default the processes share the CPUs of the connected cluster, and none has more than its node;
    this process uses the whole machine. Nodes that may still join are not counted.
    """
    if compute.threads:
        return compute.threads
    if processes is None:
        return compute.cpus or usable_cpus()
    cpus = [int(node.get("CPU", 0)) for node in nodes()]
    return max(1, min(max(cpus, default=1), sum(cpus) // processes))


def threads_here(compute: Compute, processes: int) -> int:
    """Return the threads of each of `processes` training workers of the node that this worker is on.

    Asked in the worker: when a training begins, most of its nodes may not be there yet.
    """
    import ray

    here = ray.get_runtime_context().get_node_id()
    cpus = next(int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["NodeID"] == here)
    return compute.threads or max(1, (cpus or usable_cpus()) // processes)


def usable_cpus() -> int:
    """Return how many CPUs this process may use, including the limit of a container."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):  # no cgroup v2, or no limit ("max")
        quota, period = CGROUP.read_text().split()
        cpus = min(cpus, max(1, int(quota) // int(period)))
    return cpus


def alive_nodes(compute: Compute) -> int:
    """Join or start the cluster; return how many machines it has."""
    connect(compute)
    return len(nodes())


def unused_gpus(compute: Compute, gpus: float) -> str:
    """Return a note about GPUs of the cluster that the configuration leaves idle; "" if there are none."""
    settings = {
        # Training in the driver's process uses the driver's GPU.
        "compute.train_gpus=true": compute.train_gpus or not compute.train_workers,
        "compute.actor_gpus=1": compute.actor_gpus,
    }
    unset = [setting for setting, used in settings.items() if not used]
    if not gpus or not unset:
        return ""
    return f"note: the cluster has GPUs ({gpus:g}) that are not used; set {' '.join(unset)}"
