"""The configuration with the setting of stage 3 that a sweep chose."""

from __future__ import annotations

from dpt_ray.config import Config
from dpt_ray.config.sections import Generate, Retrain
from dpt_ray.store.artifact import Artifact


def best_config(config: Config, sweep: Artifact) -> Config | None:
    """Return the run with the chosen setting and without a sweep; None where no images are generated.

    Its stage 3 is the classifier that the sweep chose, from the artifacts that are there already.
    """
    chosen = sweep.manifest["chosen"].get("generated")
    if chosen is None:
        return None
    keys = ("images_per_class", "real_weight", "l2", "min_confidence")
    found = {key: value for key, value in chosen.items() if key in keys}
    retrain = Retrain.model_validate(found)
    sampled = {other.name: other for other in (config.sweep.generate if config.sweep else ())}
    other = sampled.get(chosen.get("samples", ""))
    generate = config.generate.model_dump() | (other.changes if other else {})
    limit = {"max_iterations": (config.sweep or config.retrain_grid).max_iterations}
    changes = {
        "name": f"{config.name}-best",
        "sweep": None,
        "generate": Generate.model_validate(generate),
        "retrain": retrain.model_copy(update=limit),
    }
    return config.model_copy(update=changes)
