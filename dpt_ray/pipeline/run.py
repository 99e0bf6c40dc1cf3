"""Execute a run: make the missing nodes and reuse the published ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from dpt_ray.cluster.gauges import StageGauges
from dpt_ray.config import Config, ConfigError
from dpt_ray.engine.execute import Outcome, execute
from dpt_ray.engine.node import Node, needed
from dpt_ray.engine.progress import Display
from dpt_ray.engine.spending import Spending
from dpt_ray.evaluation.advice import advice
from dpt_ray.evaluation.records import read_ladder
from dpt_ray.models.precision import emulation_note
from dpt_ray.pipeline.cost import Cost, costs
from dpt_ray.pipeline.flow import flow
from dpt_ray.pipeline.lacking import OF_IMAGES, remedy
from dpt_ray.pipeline.output import check_shared, open_store
from dpt_ray.pipeline.run_folder import PLANNED, link, node_references
from dpt_ray.pipeline.time_left import TimeLeft
from dpt_ray.stages.rung import check_ladder
from dpt_ray.stages.sweep import check_choice
from dpt_ray.store.artifact import Artifact, Store

# The minimum share of the bytes in cost.py that is written: a PNG of a photograph has about half of the
# bytes of its pixels.
SIZED = {"features": 1.0, "moments": 1.0, "samples": 0.5, "sample_features": 1.0, "feature_samples": 1.0}


def run(
    config: Config,
    display: Display,
    targets: Sequence[str] = ("report",),
    check_index: Callable[[Artifact], None] | None = None,
) -> tuple[Outcome, Store]:
    """Make the missing nodes for `targets` (node names) and link the results in the run's folder.

    `check_index` is called with the index before any later stage starts.
    """
    store, display.watch = open_store(config), StageGauges(config.name)
    check_shared(config, store)
    if note := emulation_note(config):
        display.console.print(note, highlight=False, soft_wrap=True)
    nodes = flow(config)
    for name in targets:
        if name not in nodes:
            if name in OF_IMAGES and not config.generates_images and len(targets) > 1:
                continue  # `dpt extract`: features without moments
            hint = remedy(config, name)
            raise ConfigError(
                f"this configuration has no {name.replace('_', ' ')} stage{hint and f': {hint}'}"
            )
        if nodes[name].missing:
            raise ConfigError(nodes[name].missing)
    wanted = [nodes[name] for name in targets if name in nodes]
    required, checks = needed(wanted), {"index": check_index} if check_index else {}
    if nodes["labels"] in required:  # report a bad label list before any work
        wanted = [nodes["labels"], *wanted]
    if "sweep" in nodes and nodes["sweep"] in required:  # and missing validation images
        checks["index"] = partial(check_choice, nodes["sweep"])
    if config.ladder and {nodes[name] for name in config.ladder.rungs} & set(required):
        index = nodes["index"].artifact(store)
        checks["labels"] = partial(check_ladder, config.ladder.prior, index)
    if "pilot" in nodes:
        checks["pilot"] = partial(_tell_pilot, display)
    # From here on every artifact of this run counts as used, even if the run fails.
    folder = store.run_folder(config.name)
    folder.write_json(PLANNED, node_references(nodes))
    to_write = partial(_bytes_to_write, config, nodes, store)
    left = TimeLeft(config, nodes["index"], store)
    spending = Spending(folder, config.compute)
    outcome = execute(wanted, store, config.compute, display, checks, to_write, left, spending)
    link(config, nodes, store)
    return outcome, store


def _tell_pilot(display: Display, pilot: Artifact) -> None:
    """Print the recommendation on images before anything is spent on them; no gain on test."""
    if words := advice(read_ladder(pilot)["ladder"]):
        display.console.print(f"recommendation: {words}", highlight=False, soft_wrap=True)


def _bytes_to_write(config: Config, nodes: Mapping[str, Node], store: Store, node: Node) -> float:
    """Return the estimated bytes that the node still writes, 0 where they are unknown."""
    index = nodes["index"].artifact(store)
    share = SIZED.get(node.name.partition(":")[0])  # a further set of images is named after the first
    if share is None or not index.published:
        return 0.0
    images = Counter[str]()
    for unit in index.manifest["units"]:
        images[unit["split"]] += unit["rows"]
    cost = costs(config, images, index.manifest["classes"]).get(node.name, Cost())
    written = sum(shard["bytes"] for shard in node.artifact(store).shards().values())
    return max(0.0, (cost.bytes or 0.0) * share - written)
