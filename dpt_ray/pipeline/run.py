"""A run: its flow carried out, what is missing made and what is there reused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial

from dpt_ray.config import Config, ConfigError
from dpt_ray.engine.execute import Outcome, execute
from dpt_ray.engine.node import Node, needed
from dpt_ray.engine.progress import Display
from dpt_ray.evaluation.inception_files import NOT_COMPUTED
from dpt_ray.models.precision import emulation_note
from dpt_ray.pipeline.cost import Cost, costs
from dpt_ray.pipeline.flow import flow
from dpt_ray.pipeline.output import open_store
from dpt_ray.pipeline.run_folder import PLANNED, link, node_references
from dpt_ray.stages.sweep import check_choice
from dpt_ray.store.artifact import Store

# What of the bytes that cost.py counts is written at the least: a PNG of a photograph has about
# half of its pixels' bytes.
SIZED = {"features": 1.0, "moments": 1.0, "samples": 0.5, "sample_features": 1.0}


def run(config: Config, display: Display, targets: Sequence[str] = ("report",)) -> tuple[Outcome, Store]:
    """Makes what is missing for the targets (names of nodes) and points the run's folder at it."""
    store = open_store(config)
    if note := emulation_note(config):
        display.console.print(note, highlight=False, soft_wrap=True)
    nodes = flow(config)
    for name in targets:
        if name not in nodes:
            why = f": {NOT_COMPUTED}" if name == "image_metrics" else ""
            raise ConfigError(f"this configuration has no {name.replace('_', ' ')} stage{why}")
        if nodes[name].missing:
            raise ConfigError(nodes[name].missing)
    wanted = [nodes[name] for name in targets]
    required, checks = needed(wanted), {}
    if nodes["labels"] in required:  # a bad label list is told before any work
        wanted = [nodes["labels"], *wanted]
    if "sweep" in nodes and nodes["sweep"] in required:  # and that there is nothing to choose on
        checks["index"] = partial(check_choice, nodes["sweep"])
    # From here on, all that this run will rest on is in use, however far it comes.
    store.run_folder(config.name).write_json(PLANNED, node_references(nodes))
    to_write = partial(_bytes_to_write, config, nodes, store)
    outcome = execute(wanted, store, config.compute, display, checks, to_write)
    link(config, nodes, store)
    return outcome, store


def _bytes_to_write(config: Config, nodes: Mapping[str, Node], store: Store, node: Node) -> float:
    """About how many bytes the node still writes: 0 where no formula is at hand or the images are unknown."""
    index = nodes["index"].artifact(store)
    if node.name not in SIZED or not index.published:
        return 0.0
    images = Counter[str]()
    for unit in index.manifest["units"]:
        images[unit["split"]] += unit["rows"]
    cost = costs(config, images, index.manifest["classes"]).get(node.name, Cost())
    there = sum(shard["bytes"] for shard in node.artifact(store).shards().values())
    return max(0.0, (cost.bytes or 0.0) * SIZED[node.name] - there)
