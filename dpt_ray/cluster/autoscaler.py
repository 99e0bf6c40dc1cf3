"""What the autoscaler of the joined cluster may add, as far as it is known on this machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

PROCESSES = Path("/proc")


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
    import ray

    path = _configuration(ray.get_runtime_context().gcs_address)
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


def _configuration(gcs_address: str) -> Path | None:
    """Return the file that the autoscaler's process on this machine was started with."""
    for process in PROCESSES.glob("[0-9]*"):
        with suppress(OSError):  # it ended, or is another user's
            words = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
            options = dict(word.partition("=")[::2] for word in words if word.startswith("--"))
            if options.get("--gcs-address") == gcs_address and "--autoscaling-config" in options:
                path = Path(options["--autoscaling-config"]).expanduser()
                return path if path.exists() else None
    return None
