"""Which of a run's classifiers is used: the best on validation images among all methods, or a named one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from dpt_ray.config import Config, ConfigError
from dpt_ray.config.ladder import RUNGS
from dpt_ray.evaluation.methods import METHODS
from dpt_ray.pipeline.output import find_store
from dpt_ray.pipeline.run_folder import sets_made
from dpt_ray.store.artifact import Artifact

# The methods with a classifier: (node, folder in its artifact).
CLASSIFIERS = {
    "dpt": ("sweep", "generated/"),
    "semi_supervised_dpt": ("retrained_learner_classifier", ""),
    "semi_supervised": ("learner_classifier", ""),
    "dpt_paper": ("retrained", ""),
    "generated_features": ("generated_features", ""),
    "probe": ("classifier", ""),
    "tuned_probe": ("sweep", "probe/"),
    "self_training": ("sweep", "self_training/"),
    "augmented": ("sweep", "augmented/"),
    "student": ("student_classifier", ""),
}
# The pseudo-labels of a classifier that has them in an artifact of their own.
CALIBRATED = {"classifier": "pseudo_labels", "learner_classifier": "learner_labels"}
# The encoder of a classifier that has one of its own.
TRAINED_ENCODERS = {
    "learner_classifier": "learner",
    "retrained_learner_classifier": "retrained_learner",
    "student_classifier": "student",
}
# With a ladder, the sweep's self-training, from the labels of `labels_from`, has another name than the rung.
LADDER_CLASSIFIERS = CLASSIFIERS | {
    "self_training": ("self_training", ""),
    "same_labels": ("sweep", "self_training/"),
}


@dataclass(frozen=True)
class Choice:
    """A method's classifier with its results on `n_validation` images; one of `among` in the run.

    Its decisions divided by `temperature` are calibrated, where one was fitted. `encoder` is the node of the
    encoder whose features it classifies.
    """

    method: str
    artifact: Artifact
    prefix: str
    validation_top1: float | None
    validation_nll: float
    n_validation: int
    temperature: float = 1.0
    encoder: str = "encoder"
    among: int = 1

    def __str__(self) -> str:
        text = f"{self.method} ({METHODS[self.method].name})"
        if self.validation_top1 is None:
            return f"{text}; the run has no labelled validation images to select with"
        best = f", the best of {self.among} classifiers" if self.among > 1 else ""
        return f"{text}{best}: {self.validation_top1:.1%} right on {self.n_validation:,} validation images"


def best_classifier(
    config: Config, *nodes: str, method: str | None = None
) -> tuple[dict[str, Artifact], Choice]:
    """Return the published artifacts of a run, `nodes` among them, and its best classifier, or `method`'s.

    Validation is small, so ties occur; they go to the lower cross-entropy, where it is known. Raises
    ConfigError where no classifier is published, or none of that method.
    """
    others: list[str] = []
    for made in sets_made(config):
        found = _classifiers(made)
        others += [choice.method for choice in found if choice.method not in others]
        if method:
            found = [replace(choice, among=1) for choice in found if choice.method == method]
        if found and all(node in made for node in nodes):
            break
    else:
        where = f"in {find_store(config).uri}"
        if method and others:
            raise ConfigError(
                f"--method {method}: run {config.name} has no such classifier {where}; it has "
                f"{', '.join(others)}"
            )
        raise ConfigError(f"run {config.name} has no classifier {where}; run `dpt run CONFIG` first")
    # Where nothing was chosen on validation images: what was generated from, else the best of the ladder.
    ladder = made["best"].manifest["best"] if "best" in made else "probe"
    order = ["semi_supervised_dpt", "dpt", "dpt_paper", "semi_supervised", "generated_features", ladder]

    def rank(choice: Choice) -> tuple[float, float, int]:
        place = order.index(choice.method) if choice.method in order else len(order)
        return -(choice.validation_top1 or 0.0), choice.validation_nll, place

    return made, min(found, key=rank)


def _classifiers(made: Mapping[str, Artifact]) -> list[Choice]:
    """Return every classifier of a run with its validation results."""
    found = []
    rungs = {rung: (rung, "") for rung in RUNGS if rung in made}
    classifiers = LADDER_CLASSIFIERS | rungs if rungs else CLASSIFIERS
    for method, (node, prefix) in classifiers.items():
        if node not in made:
            continue
        manifest, nll = made[node].manifest, None
        if prefix:
            trial = manifest["chosen"].get(prefix.rstrip("/"))
            if trial is None:  # this sweep lacks the method
                continue
            top1, nll = trial["validation_top1"], trial["validation_nll"]
        else:
            top1, nll = manifest["validation_top1"], manifest.get("validation_nll")
        order = math.inf if nll is None else nll
        # Stage 1's classifiers have their temperature beside their pseudo-labels, a rung in its manifest.
        calibrated = made.get(CALIBRATED.get(node, node))
        facts = calibrated.manifest.get("calibration") if calibrated else None
        temperature = facts["temperature"] if facts else 1.0
        encoder = TRAINED_ENCODERS.get(node, "encoder")
        found.append(
            Choice(method, made[node], prefix, top1, order, manifest["n_validation"], temperature, encoder)
        )
    return [replace(choice, among=len(found)) for choice in found]
