"""The state of a run: which nodes are published, and why the others are not."""

from __future__ import annotations

from dataclasses import dataclass

from dpt_ray.config import Config
from dpt_ray.engine.differences import why_not_done
from dpt_ray.engine.node import Node, RunsOn
from dpt_ray.pipeline.flow import flow
from dpt_ray.pipeline.output import find_store
from dpt_ray.pipeline.run_folder import is_published
from dpt_ray.store.artifact import Artifact, Store
from dpt_ray.store.records import Manifest
from dpt_ray.training.log import read_log


@dataclass(frozen=True)
class Status:
    """The state of a node: its manifest where it is published, else how far it is and why it is not."""

    name: str
    artifact: str
    runs_on: str
    manifest: Manifest | None = None
    bytes: int = 0
    shards: int = 0
    step: int = 0
    loss: float | None = None
    why: str = ""

    @property
    def state(self) -> str:
        """Say what there is of the node."""
        if self.manifest:
            return "done"
        if self.step:
            return f"step {self.step:,}, loss {self.loss:.4g}"
        plural = "s" * (self.shards != 1)
        return f"{self.shards} shard{plural} done" if self.shards else "to do"


def status(config: Config) -> list[Status]:
    """Return the state of each node of a run."""
    store, nodes = find_store(config), flow(config)
    done = {name for name, node in nodes.items() if is_published(node, store)}
    return [_status(node, store, done) for node in nodes.values()]


def _status(node: Node, store: Store, done: set[str]) -> Status:
    runs_on = node.stage.runs_on.value
    waiting = [source.name for source in node.inputs.values() if source.name not in done]
    if node.missing:
        return Status(node.name, node.artifact_name, runs_on, why=node.unreadable or _waits(waiting))
    artifact, name = node.artifact(store), f"{node.artifact_name}/{node.reference}"
    if node.name in done:
        return Status(node.name, name, runs_on, artifact.manifest, _size(artifact))
    why = _waits(waiting) if waiting else why_not_done(node, store)
    last = (read_log(artifact) or [{}])[-1] if node.stage.runs_on is RunsOn.WORKERS else {}
    step, loss = int(last.get("step", 0)), last.get("loss")
    return Status(node.name, name, runs_on, shards=len(artifact.shards()), step=step, loss=loss, why=why)


def _waits(waiting: list[str]) -> str:
    return f"waits for {', '.join(waiting[:3])}{' ...' if len(waiting) > 3 else ''}"


def _size(artifact: Artifact) -> int:
    return int(artifact.fs.du(artifact.path("")))
