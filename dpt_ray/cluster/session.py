"""The Ray cluster a run uses: joined where there is one, else started on this machine."""

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

# glibc's allocator gives large blocks back to the kernel at once, and the next tensor faults its pages in
# anew: 40% of a pass of the autoencoder on a CPU. So it keeps them, in one arena: the others never do.
ALLOCATOR = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(8 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(16 << 30),
}

CGROUP = Path("/sys/fs/cgroup/cpu.max")  # how many microseconds of CPU time in how many

_REMEDY = "lower compute.actor_cpus / actor_gpus, or set compute.autoscaling if nodes are added on demand"


def connect(compute: Compute) -> float:
    """Joins the cluster in RAY_ADDRESS or starts a local one; the seconds it took (0: joined before).

    Authentication by token is always on: a local start would turn it on by itself and `ray start` would
    not, and a half-set mode ends in refused connections.
    """
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # Tune's own table beside the display's
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    import ray

    if ray.is_initialized():
        return 0.0
    started = time.perf_counter()
    address = os.environ.get("RAY_ADDRESS")
    local: dict[str, int | bool | None] = (
        {} if address else {"num_cpus": compute.cpus, "include_dashboard": False}
    )
    if not address:  # a cluster's nodes have it from their `ray start`
        for name, value in ALLOCATOR.items():
            os.environ.setdefault(name, value)
    with _native_output_hidden():
        # "local": without an address Ray would join whatever `ray start` has left on this machine.
        ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **local)
    logging.getLogger("ray").setLevel(logging.ERROR)
    _quiet_data()
    _check_resources(compute)
    if note := unused_gpus(compute, sum(node.get("GPU", 0.0) for node in _nodes())):
        Console(stderr=True).print(note, highlight=False, soft_wrap=True)
    return time.perf_counter() - started


def readers(compute: Compute) -> int:
    """Return how many light tasks run at a time: by default one for each actor, four where it has a GPU.

    A ViT-B/4 takes several hundred images a second on a GPU, and a core decodes two hundred
    (benchmarks/decode.py).
    """
    return compute.readers or compute.actors * (4 if compute.actor_gpus else 1)


def threads(compute: Compute, processes: int | None = None) -> int:
    """Return the threads of each of so many workers, actors or tasks at a time; without, of this process.

    By default they share the CPUs of all nodes of the connected cluster, and none has more than its node;
    this process has the machine. Nodes that are still to come are not counted.
    """
    if compute.threads:
        return compute.threads
    if processes is None:
        return compute.cpus or usable_cpus()
    cpus = [int(node.get("CPU", 0)) for node in _nodes()]
    return max(1, min(max(cpus, default=1), sum(cpus) // processes))


def usable_cpus() -> int:
    """Return how many CPUs this process may use, those that a container is limited to."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):  # no control group of version 2, or no limit ("max")
        quota, period = CGROUP.read_text().split()
        cpus = min(cpus, max(1, int(quota) // int(period)))
    return cpus


@contextmanager
def _native_output_hidden() -> Iterator[None]:
    """Keeps what Ray's C++ core writes to file descriptor 2 off the terminal; exceptions still come.

    It announces its own log level there, and complains of how Ray Data makes its actors (ray #53727).
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
    context.raise_original_map_exception = True  # else it is lost in Ray's own
    # Ray Data logs the traceback of an error that it raises as well.
    for name, level in (("data", logging.CRITICAL), ("train", logging.ERROR), ("tune", logging.ERROR)):
        logging.getLogger(f"ray.{name}").setLevel(level)


def check_training(compute: Compute) -> None:
    """Fails at once where Ray Train would start its workers over and over, without end or a word.

    A worker asks for a GPU or, without `train_gpus`, for a CPU. On a cluster that grows it waits.
    """
    least, key = compute.train_workers, "train_workers"
    if compute.min_train_workers:
        least, key = compute.min_train_workers, "min_train_workers"
    kind = "GPU" if compute.train_gpus else "CPU"
    room = sum(int(node.get(kind, 0)) for node in _nodes())
    if room < least and not compute.autoscaling:
        raise ConfigError(
            f"compute.{key}: {least} training workers need a {kind} each, the Ray cluster has room for "
            f"{room}; lower it, or set compute.autoscaling if nodes are added on demand"
        )


def _check_resources(compute: Compute) -> None:
    """Fails at once where Ray would wait silently for resources that no node has."""
    if compute.autoscaling:
        return
    wanted = {"CPU": compute.actor_cpus, "GPU": compute.actor_gpus}
    have = [{kind: node.get(kind, 0.0) for kind in wanted} for node in _nodes()]
    if not any(all(node[kind] >= amount for kind, amount in wanted.items()) for node in have):
        asked = " and ".join(f"{amount:g} {kind}" for kind, amount in wanted.items() if amount)
        most = " and ".join(f"{max((node[kind] for node in have), default=0):g} {kind}" for kind in wanted)
        raise ConfigError(
            f"compute: an actor needs {asked} on one node, the nodes of the Ray cluster have {most} at most; "
            f"{_REMEDY}"
        )
    # Readers must be able to run beside the actors, or the pipeline starves (ray #44687).
    needed, cpus = compute.actor_cpus + 0.25, sum(node["CPU"] for node in have)
    if cpus < needed:
        raise ConfigError(
            f"compute: an actor and a reader need {needed:g} CPU, the Ray cluster has {cpus:g}; {_REMEDY}"
        )


def alive_nodes(compute: Compute) -> int:
    """Join or start the cluster; return how many machines it has."""
    connect(compute)
    return len(_nodes())


def _nodes() -> list[dict[str, float]]:
    """What each live node has in all, used or not."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def unused_gpus(compute: Compute, gpus: float) -> str:
    """What to say of a cluster's GPUs that the configuration leaves idle, if there are any."""
    settings = {
        # In the driver's process a training takes what GPU that has.
        "compute.train_gpus=true": compute.train_gpus or not compute.train_workers,
        "compute.actor_gpus=1": compute.actor_gpus,
    }
    unset = [setting for setting, used in settings.items() if not used]
    if not gpus or not unset:
        return ""
    return f"note: the cluster has GPUs ({gpus:g}) that are not used; set {' '.join(unset)}"
