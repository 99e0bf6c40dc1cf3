"""What the autoscaler of the joined cluster may add, as far as it is known on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from dpt_ray.cluster.ray_internals import autoscaler_configuration, unserved_demand

LOOKED = 10.0  # seconds after which an autoscaler has seen new demand; it looks every 5


@dataclass(frozen=True)
class NodeType:
    """A kind of worker node: its resources ("CPU", "GPU", ...) and how many there may be at a time."""

    name: str
    resources: Mapping[str, float]
    most: int

    def __str__(self) -> str:
        has = ", ".join(
            f"{self.resources[kind]:g} {kind}" for kind in ("CPU", "GPU") if kind in self.resources
        )
        return f"{self.name} ({has or 'no CPU'}; at most {self.most})"


@dataclass(frozen=True)
class Autoscaler:
    """The worker types of an autoscaler, and how many workers it adds at most, all types together."""

    types: tuple[NodeType, ...]
    max_workers: int

    def room(self, per_node: Callable[[Mapping[str, float]], int]) -> int:
        """Return the sum of `per_node(resources)` over the workers that maximise it."""
        room, left = 0, self.max_workers
        for each, most in sorted(
            ((per_node(kind.resources), kind.most) for kind in self.types), reverse=True
        ):
            count = min(most, left)
            room, left = room + each * count, left - count
        return room

    def __str__(self) -> str:
        return ", ".join(map(str, self.types)) or "no worker"


def autoscaler() -> Autoscaler | None:
    """Return the autoscaler of the joined cluster, None where it does not run on this machine.

    Ray keeps its configuration on the head alone, in the file that `ray start --autoscaling-config` names;
    there is none under Kubernetes. A submitted job's driver runs on the head.
    """
    path = autoscaler_configuration()
    if path is None:
        return None
    import yaml

    config = yaml.safe_load(path.read_text())
    limit = int(config.get("max_workers", 0))
    types = {
        name: NodeType(name, kind.get("resources", {}), min(limit, int(kind.get("max_workers", limit))))
        for name, kind in config.get("available_node_types", {}).items()
        if name != config.get("head_node_type")
    }
    return Autoscaler(tuple(kind for kind in types.values() if kind.most), limit)


def has_no_node_for(wanted: Mapping[str, float]) -> bool:
    """Ask for an actor with these resources; return whether the autoscaler says that no node type has them.

    It works with an autoscaler on another machine, such as Kubernetes', if it is Ray's v2. Where nothing is
    said within LOOKED seconds, the answer is no.
    """
    import ray

    wanted = {kind: amount for kind, amount in wanted.items() if amount}

    class Asked:
        """Nothing is called of it."""

    remote = ray.remote(num_cpus=wanted.get("CPU", 0), num_gpus=wanted.get("GPU", 0))
    actor, end = remote(Asked).remote(), time.monotonic() + LOOKED
    try:
        while time.monotonic() < end:
            if wanted in unserved_demand():
                return True
            time.sleep(0.5)
        return False
    finally:
        ray.kill(actor)
