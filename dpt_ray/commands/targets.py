"""The nodes that a command makes, and the node that --until names."""

from __future__ import annotations

from dpt_ray.config import Config, ConfigError
from dpt_ray.engine.node import Node
from dpt_ray.pipeline.flow import flow
from dpt_ray.pipeline.lacking import remedy

# The nodes of the commands that make a part of a run.
TARGETS = {
    "index": ["index", "labels"],
    "pretrain": ["labels", "encoder"],
    "extract": ["labels", "features", "moments"],
    "fit-classifier": ["classifier"],
    "pseudo-label": ["pseudo_labels"],
    "probe": ["probe"],
    "ladder": ["ladder"],
    "train-diffusion": ["denoiser"],
    "generate": ["samples"],
    "retrain": ["retrained"],
    "sweep": ["sweep"],
    "measure": ["image_metrics"],
    "evaluate": ["evaluation"],
    "report": ["report"],
}


def until_node(config: Config, name: str) -> Node:
    """Return the node of a configuration that --until names.

    Raises ConfigError where there is none of this name: with the node of a command of this name or the
    setting that brings the node, and the names of all nodes.
    """
    nodes = flow(config)
    if name in nodes:
        return nodes[name]
    wanted = TARGETS.get(name, [name])[-1]
    hint = f"`dpt {name}` makes {wanted}: --until {wanted}" if wanted in nodes else remedy(config, wanted)
    raise ConfigError(
        f"--until: {name!r} is not a stage of this configuration; {hint and f'{hint}; '}its stages are "
        f"{', '.join(nodes)}"
    )
