"""The Ray cluster of a run: an existing one is joined, else one is started on this machine."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.console import Console

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

_REMEDY = "lower compute.actor_cpus / actor_gpus, or set compute.autoscaling if nodes are added on demand"


def connect(compute: Compute) -> float:
    """Join the cluster in RAY_ADDRESS or start a local one; return the seconds (0 if already joined).

    Token authentication is always on: a local start turns it on by default, `ray start` does not, and
    nodes in different modes refuse each other's connections.
    """
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # Tune would print a table of its own
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
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
    with _native_output_hidden():
        # "local": without an address Ray would join a cluster that an earlier `ray start` left running.
        ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **local)
    logging.getLogger("ray").setLevel(logging.ERROR)
    _quiet_data()
    _check_resources(compute)
    if note := unused_gpus(compute, sum(node.get("GPU", 0.0) for node in _nodes())):
        Console(stderr=True).print(note, highlight=False, soft_wrap=True)
    return time.perf_counter() - started


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
    cpus = [int(node.get("CPU", 0)) for node in _nodes()]
    return max(1, min(max(cpus, default=1), sum(cpus) // processes))


def usable_cpus() -> int:
    """Return how many CPUs this process may use, including the limit of a container."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):  # no cgroup v2, or no limit ("max")
        quota, period = CGROUP.read_text().split()
        cpus = min(cpus, max(1, int(quota) // int(period)))
    return cpus


@contextmanager
def _native_output_hidden() -> Iterator[None]:
    """Hide what Ray's C++ core writes to file descriptor 2; exceptions still propagate.

    It prints its log level there, and a warning about the actors of Ray Data (ray #53727).
    """
    sys.stderr.flush()
    saved = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)


def _quiet_data() -> None:
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True  # else Ray wraps it and the cause is lost
    # Ray Data logs the traceback of an error in addition to raising it.
    for name, level in (("data", logging.CRITICAL), ("train", logging.ERROR), ("tune", logging.ERROR)):
        logging.getLogger(f"ray.{name}").setLevel(level)


def check_training(compute: Compute) -> None:
    """Raise ConfigError where the cluster has no room for the workers; Ray Train would retry forever.

    A worker needs a GPU with `train_gpus`, else a CPU. An autoscaling cluster is not checked.
    """
    least, key = compute.train_workers, "train_workers"
    if compute.min_train_workers:
        least, key = compute.min_train_workers, "min_train_workers"
    kind = "GPU" if compute.train_gpus else "CPU"
    room = sum(int(node.get(kind, 0)) for node in _nodes())
    if room < least and not compute.autoscaling:
        raise ConfigError(
            f"compute.{key}: {least} training workers need one {kind} each, and the Ray cluster has room for "
            f"{room}; lower it, or set compute.autoscaling if nodes are added on demand"
        )


def _check_resources(compute: Compute) -> None:
    """Raise ConfigError where no node has the resources of an actor; Ray would wait silently."""
    if compute.autoscaling:
        return
    wanted = {"CPU": compute.actor_cpus, "GPU": compute.actor_gpus}
    have = [{kind: node.get(kind, 0.0) for kind in wanted} for node in _nodes()]
    if not any(all(node[kind] >= amount for kind, amount in wanted.items()) for node in have):
        asked = " and ".join(f"{amount:g} {kind}" for kind, amount in wanted.items() if amount)
        most = " and ".join(f"{max((node[kind] for node in have), default=0):g} {kind}" for kind in wanted)
        raise ConfigError(
            f"compute: an actor needs {asked} on one node, and the nodes of the Ray cluster have {most} at "
            f"most; {_REMEDY}"
        )
    # A reader needs room beside the actors, or the pipeline starves (ray #44687).
    needed, cpus = compute.actor_cpus + 0.25, sum(node["CPU"] for node in have)
    if cpus < needed:
        raise ConfigError(
            f"compute: an actor and a reader need {needed:g} CPU, and the Ray cluster has {cpus:g}; {_REMEDY}"
        )


def alive_nodes(compute: Compute) -> int:
    """Join or start the cluster; return how many machines it has."""
    connect(compute)
    return len(_nodes())


def _nodes() -> list[dict[str, float]]:
    """Return the total resources of each live node."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


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
