"""Execute a run: make the missing nodes and reuse the published ones."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from functools import partial

from dpt_ray.cluster.gauges import StageGauges
from dpt_ray.cluster.resources import check_training
from dpt_ray.cluster.session import connect
from dpt_ray.config import Config, ConfigError
from dpt_ray.config.sections import Compute
from dpt_ray.engine.errors import StageError
from dpt_ray.engine.execute import Check, Outcome, execute
from dpt_ray.engine.node import Node, RunsOn, needed
from dpt_ray.engine.progress import Display
from dpt_ray.engine.spending import Spending
from dpt_ray.evaluation.advice import advice
from dpt_ray.evaluation.records import read_ladder
from dpt_ray.models.precision import emulation_note
from dpt_ray.pipeline.cost import costs
from dpt_ray.pipeline.flow import flow
from dpt_ray.pipeline.lacking import OF_IMAGES, remedy, unused_note
from dpt_ray.pipeline.network_cost import Cost
from dpt_ray.pipeline.output import check_shared, open_store
from dpt_ray.pipeline.run_folder import PLANNED, link, node_references
from dpt_ray.pipeline.time_left import TimeLeft
from dpt_ray.stages.denoiser import Denoiser, check_network
from dpt_ray.stages.inception_statistics import check_drawn
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
    check_index: Check | None = None,
) -> tuple[Outcome, Store]:
    """Make the missing nodes for `targets` (node names) and link the results in the run's folder.

    `check_index` is called with the index before any later stage starts.
    """
    store, display.watch = open_store(config), StageGauges(config.name)
    check_shared(config, store)
    for note in filter(None, (emulation_note(config), unused_note(config) if "report" in targets else "")):
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
    required = needed(wanted)
    if nodes["labels"] in required:  # report a bad label list before any work
        wanted = [nodes["labels"], *wanted]
    checks = _checks(config, nodes, required, store)
    if check_index:
        checks["index"].append(check_index)
    if "pilot" in nodes:
        checks["pilot"].append(partial(_tell_pilot, display))
    to_write = partial(_bytes_to_write, config, nodes, store)
    left = TimeLeft(config, nodes["index"], store)
    folder = store.run_folder(config.name)
    try:
        # From here on every artifact of this run counts as used, even if the run fails.
        folder.write_json(PLANNED, node_references(nodes))
        spending = Spending(folder, config.compute)
        outcome = execute(wanted, store, config.compute, display, checks, to_write, left, spending)
        link(config, nodes, store)
    except ConfigError:
        raise
    except (OSError, ValueError) as error:  # a full disk, a folder of somebody else, a storage that is away
        raise StageError(f"output: {' '.join(str(error).split())}") from error
    return outcome, store


def _checks(
    config: Config, nodes: Mapping[str, Node], required: Sequence[Node], store: Store
) -> dict[str, list[Check]]:
    """Return the checks that are made as soon as what they read is published: hours of work follow."""
    checks = defaultdict[str, list[Check]](list)
    index = nodes["index"].artifact(store)
    if nodes.get("sweep") in required:  # missing validation images
        checks["index"].append(partial(check_choice, nodes["sweep"]))
    if nodes.get("inception_samples") in required:
        checks["index"].append(partial(check_drawn, nodes["inception_samples"]))
    if config.ladder and {nodes[name] for name in config.ladder.rungs} & set(required):
        checks["labels"].append(partial(check_ladder, config.ladder.prior, index))
    for node in required:
        if node.stage is Denoiser and not node.artifact(store).published:
            checks["autoencoder"].append(partial(check_network, node, index))
    if config.compute.train_workers and any(_trains(node, store) for node in required):
        first = "labels" if nodes["labels"] in required else "index"
        checks[first].append(partial(_check_training, config.compute))
    return checks


def _trains(node: Node, store: Store) -> bool:
    return node.stage.runs_on is RunsOn.WORKERS and not node.artifact(store).published


def _check_training(compute: Compute, made: Artifact) -> None:
    """Raise ConfigError for more training workers than there is room for, which hours of features precede."""
    connect(compute)
    check_training(compute)


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
