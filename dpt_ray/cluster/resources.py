"""Whether a run fits the cluster: the nodes that are there, and those that an autoscaler may add."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from dpt_ray.cluster.autoscaler import Autoscaler, autoscaler, has_no_node_for
from dpt_ray.cluster.ray_internals import HEAD
from dpt_ray.config import ConfigError
from dpt_ray.config.sections import Compute

# A reading task may use this much of the CPUs and of the memory that a node has for one CPU.
READER_SHARE = 0.25
READER_MEMORY = 512 << 20  # bytes, while there is no node with CPUs yet
# What a process with torch takes before it reads anything: 0.8 GiB on a CPU; with CUDA's libraries assumed.
PROCESS, GPU_PROCESS = 1 << 30, 3 << 30


def nodes() -> list[dict[str, float]]:
    """Return the total resources of each live node."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def beside_actors() -> dict[str, Any]:
    """Return the resources of a reading task whose results go to actors: memory, and no CPU.

    Readers that asked for CPUs would wait for actors that hold all of them and wait for the readers: those
    of this run (ray #44687), or of two runs together. Actors ask for no memory. A head without CPUs is left
    to drivers.
    """
    workers = [node for node in nodes() if node.get("CPU")]
    each = [node["memory"] / node["CPU"] for node in workers if node.get("memory")]
    options: dict[str, Any] = {"num_cpus": 0}
    if each or not workers:  # else the nodes were started without any memory to ask for
        options["memory"] = int(READER_SHARE * min(each)) if each else READER_MEMORY
    if head := _head_without_cpus():
        options["label_selector"] = {"ray.io/node-id": f"!{head}"}
    return options


def memory_of_fit(compute: Compute, held: int, name: str) -> int:
    """Return the bytes of memory to ask for where an actor's CPUs and GPUs work on features of `held` bytes.

    Where every such node has less, this is all that one has, and a warning says so under the `name` of the
    stage: asked for more, Ray would wait for ever. 0 where no node says how much it has.
    """
    needed = held + (GPU_PROCESS if compute.actor_gpus else PROCESS)
    wanted = _wanted(compute)
    most = max(
        (node.get("memory", 0.0) for node in _shapes(*_cluster(compute)) if _fit(wanted, node)), default=0
    )
    if 0 < most < needed:
        logging.getLogger("dpt_ray").warning(
            "%s: a process needs about %.1f GiB, and a node with %s has %.1f GiB: it may be ended there; "
            "use nodes with more memory",
            name,
            needed / 2**30,
            _listed(wanted),
            most / 2**30,
        )
    return int(min(needed, most))


def _head_without_cpus() -> str | None:
    """Return the id of the head if it has no CPUs."""
    import ray

    heads = (node for node in ray.nodes() if node["Alive"] and HEAD in node["Resources"])
    return next((node["NodeID"] for node in heads if not node["Resources"].get("CPU")), None)


def check_actors(compute: Compute) -> None:
    """Raise ConfigError where no node has or may have the resources of an actor; Ray would wait silently."""
    have, adds = _cluster(compute)
    if compute.autoscaling and adds is None:
        _ask(_wanted(compute), have)
        return
    shapes = _shapes(have, adds)
    wanted = _wanted(compute)
    if not any(_fit(wanted, node) for node in shapes):
        raise ConfigError(
            f"compute: an actor needs {_listed(wanted)} on one node, and {_found(have, adds)}; "
            f"{_remedy(adds)}"
        )


def check_training(compute: Compute) -> None:
    """Raise ConfigError where there is no room for the workers; Ray Train would retry forever.

    A worker needs a GPU with `train_gpus`, else a CPU.
    """
    have, adds = _cluster(compute)
    least, key = compute.train_workers, "train_workers"
    # Ray Train asks an autoscaler for all workers of an elastic training at once, which adds none of more
    # than it may.
    if compute.min_train_workers and adds is None:
        least, key = compute.min_train_workers, "min_train_workers"
    kind = "GPU" if compute.train_gpus else "CPU"
    if compute.autoscaling and adds is None:
        _ask({kind: 1.0}, have)
        return

    def workers(node: Mapping[str, float]) -> int:
        return int(node.get(kind, 0))

    room = sum(map(workers, have)) + (adds.room(workers) if adds else 0)
    if room < least:
        raise ConfigError(
            f"compute.{key}: {least} training workers need one {kind} each, and the Ray cluster has room for "
            f"{room}{_may_add(adds)}; "
            + ("lower it, or raise max_workers of a node type" if adds else f"lower it, or {_ON_DEMAND}")
            + (", or compute.train_gpus=false to train without GPUs" if compute.train_gpus else "")
        )


_ON_DEMAND = "set compute.autoscaling if nodes are added on demand"


def _cluster(compute: Compute) -> tuple[list[dict[str, float]], Autoscaler | None]:
    """Return the nodes that are there, and the autoscaler; its workers that are there count as its own."""
    if not compute.autoscaling:
        return nodes(), None
    adds = autoscaler()
    return ([node for node in nodes() if HEAD in node] if adds else nodes()), adds


def _shapes(have: list[dict[str, float]], adds: Autoscaler | None) -> list[Mapping[str, float]]:
    return [*have, *(kind.resources for kind in adds.types)] if adds else [*have]


def _wanted(compute: Compute) -> dict[str, float]:
    return {"CPU": compute.actor_cpus, "GPU": compute.actor_gpus}


def _listed(wanted: Mapping[str, float]) -> str:
    return " and ".join(f"{amount:g} {kind}" for kind, amount in wanted.items() if amount)


def _ask(wanted: Mapping[str, float], have: list[dict[str, float]]) -> None:
    """Raise ConfigError where no node has `wanted` and the autoscaler, which is elsewhere, may add none."""
    if not any(_fit(wanted, node) for node in have) and has_no_node_for(wanted):
        raise ConfigError(
            f"compute: {_listed(wanted)} are needed on one node, and the cluster's autoscaler says that none "
            "of its node types has them; lower compute.actor_cpus / actor_gpus / train_gpus, or give the "
            "cluster such a node type"
        )


def _fit(wanted: Mapping[str, float], node: Mapping[str, float]) -> int:
    """Return how many times a node has the resources."""
    return int(min(node.get(kind, 0.0) / amount + 1e-9 for kind, amount in wanted.items() if amount))


def _found(have: list[dict[str, float]], adds: Autoscaler | None) -> str:
    most = (f"{max((node.get(kind, 0.0) for node in have), default=0):g} {kind}" for kind in ("CPU", "GPU"))
    return f"the nodes of the Ray cluster have {' and '.join(most)} at most{_may_add(adds)}"


def _may_add(adds: Autoscaler | None) -> str:
    return f" (its autoscaler may add: {adds})" if adds else ""


def _remedy(adds: Autoscaler | None) -> str:
    lower = "lower compute.actor_cpus / actor_gpus"
    return f"{lower}, or give the cluster a node type that has them" if adds else f"{lower}, or {_ON_DEMAND}"
