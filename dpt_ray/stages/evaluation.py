"""evaluate: stage 3 and its controls on the test images, on which no stage fits or chooses anything.

Their true labels are used here, in probe and for the report's pictures; features, pseudo-labels and
Inception's statistics are made of them as of any image.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from dpt_ray.cluster import session as cluster
from dpt_ray.data.rows import RealRows
from dpt_ray.engine.node import Task
from dpt_ray.evaluation.distances import frechet_rows
from dpt_ray.evaluation.inception_files import NOT_COMPUTED
from dpt_ray.stages.classifier import load_classifier
from dpt_ray.stages.probe import PROBE, measure
from dpt_ray.store.artifact import Artifact

METHODS = {
    "probe": "Linear probe, l2 chosen on validation",
    "generated": "DPT, chosen on validation",
    "self_training": "Self-training on pseudo-labelled real images (control)",
    "augmented": "Augmented labelled images (control)",
}
PAPER = "DPT, the configured setting (stage 3)"
RESULT = "evaluation.json"


def make(task: Task) -> dict[str, Any]:
    """Publishes `evaluation.json`; every number carries how many images it rests on."""
    import torch

    torch.set_num_threads(cluster.threads(task.compute))
    real = RealRows(task.inputs["index"], task.inputs["features"], ("validation", "test"))
    classifiers = _classifiers(task)
    probe = task.inputs["probe"].manifest["result"]
    others = [measure(name, W, real, note) for name, W, note in classifiers]
    result = probe | {
        "accuracy": [*probe["accuracy"], *others],
        "gain": _paired_gain(task.inputs["classifier"], classifiers, real),
        "frechet": frechet_rows(task),
        "image_metrics": _image_metrics(task),
    }
    task.out.write_json(RESULT, result)
    return {"rows": len(result["accuracy"]), "result": result}


Classifier = tuple[str, np.ndarray, str]


def _classifiers(task: Task) -> list[Classifier]:
    """(name, weights, note): the controls, stage 3 as configured and as chosen."""
    if "retrained" not in task.inputs:
        return []
    chosen = _chosen(task.inputs["sweep"]) if "sweep" in task.inputs else []
    retrained = task.inputs["retrained"]
    settings = retrained.manifest["settings"]
    note = f"{settings['images_per_class']} images per class, real weight {settings['real_weight']}"
    paper = (PAPER, load_classifier(retrained), note)
    return [*chosen[:-1], paper, *chosen[-1:]]


def _chosen(sweep: Artifact) -> list[Classifier]:
    """The setting of each method that validation prefers."""
    found = []
    for method in ("probe", "self_training", "augmented", "generated"):
        if chosen := sweep.manifest["chosen"].get(method):
            count = chosen["images_per_class"]
            what = f"{count} images per class, " if count else ""
            what += "labels only" if method == "probe" else f"real weight {chosen['real_weight']}"
            note = f"{what}, l2 {chosen['l2']:g}"
            found.append((METHODS[method], load_classifier(sweep, f"{method}/"), note))
    return found


def _paired_gain(probe: Artifact, classifiers: list[Classifier], real: RealRows) -> dict[str, Any] | None:
    """DPT's gain over the probe on the same test images, with its paired standard error.

    Both are with the setting chosen on validation, or the configured one where nothing was chosen.

    Over the n test images the difference d_i in {-1, 0, 1} of the two hits has standard error
    sd(d) / sqrt(n); it says nothing of other label draws or encoders.
    """
    test = real.of_split("test")
    named = {PROBE: load_classifier(probe)} | {name: W for name, W, _ in classifiers}
    baseline = METHODS["probe"] if METHODS["probe"] in named else PROBE
    dpt = next((name for name in (METHODS["generated"], PAPER) if name in named), None)
    if dpt is None or len(test) < 2:
        return None
    weights = (named[baseline], named[dpt])
    hits = [((test.features @ W.T).argmax(1) == test.labels).astype(float) for W in weights]
    difference = hits[1] - hits[0]
    return {
        "baseline": baseline,
        "improved": dpt,
        "gain": float(difference.mean()),
        "stderr": float(difference.std(ddof=1) / math.sqrt(len(difference))),
        "kind": "paired standard error over test images",
    }


def _image_metrics(task: Task) -> dict[str, Any]:
    """Rows of FID and its like, and what is left out and why."""
    if "image_metrics" not in task.inputs:
        return {"rows": [], "left_out": [NOT_COMPUTED]}
    return task.inputs["image_metrics"].manifest["result"]
