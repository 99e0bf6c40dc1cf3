"""fit-classifier: the linear classifier of stage 1 (labelled rows) and of stage 3 (and more rows)."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dpt_ray.cluster import session as cluster
from dpt_ray.data.rows import ImageRows, RealRows
from dpt_ray.engine.node import Task
from dpt_ray.learners.linear_classifier import Rows, logits
from dpt_ray.store.artifact import Artifact

if TYPE_CHECKING:
    from dpt_ray.learners.linear_probe import Fit

WEIGHTS = "model.safetensors"


def make(task: Task) -> dict[str, Any]:
    """Fits and publishes a classifier folder; with `generated` features it is stage 3."""
    import torch

    torch.set_num_threads(cluster.threads(task.compute))
    real = RealRows(task.inputs["index"], task.inputs["features"], ("validation",), task.inputs["labels"])
    labelled = real.labelled(task.inputs["labels"])
    settings = task.settings
    more, real_weight = None, 1.0
    if "generated" in task.inputs:
        more = ImageRows(task.inputs["generated"]).first(settings["images_per_class"])
        real_weight = settings["real_weight"]
    found = fit_rows(labelled, more, real_weight, len(real.classes), settings)
    facts = describe(found, real, len(labelled), len(more) if more else 0)
    facts["unreadable_labels"] = task.inputs["labels"].manifest["rows"] - len(labelled)
    if facts["unreadable_labels"]:
        logging.getLogger("dpt_ray").warning(
            "%s: %d labelled images cannot be read and are left out",
            task.node.name,
            facts["unreadable_labels"],
        )
    save_classifier(task.out, "", found, real.classes, facts)
    return facts


def fit_rows(
    labelled: Rows,
    more: Rows | None,
    real_weight: float | str,
    num_classes: int,
    settings: Any,
) -> Fit:
    """The classifier of labelled rows (weight `real_weight`) and further rows (weight 1).

    "balanced" gives the labelled rows together the weight of the others: n_more / n_labelled.
    """
    from dpt_ray.learners.linear_probe import fit

    blocks = [labelled]
    if more is not None:
        weight = len(more) / len(labelled) if real_weight == "balanced" else float(real_weight)
        blocks = [replace(labelled, weight=weight), more]
    return fit(blocks, num_classes, l2=settings["l2"], max_iterations=settings.get("max_iterations"))


def describe(found: Fit, real: RealRows, n_labelled: int, n_more: int) -> dict[str, Any]:
    """What is known of a fit without looking at the test images."""
    validation = real.validation
    return {
        "rows": n_labelled + n_more,
        "labelled": n_labelled,
        "objective": found.objective,
        "iterations": found.iterations,
        "n_validation": len(validation),
        "validation_top1": accuracy(found.weights, validation),
    }


def accuracy(W: np.ndarray, rows: Rows) -> float | None:
    """The share of rows whose largest decision value is that of their label; None without rows."""
    if not len(rows):
        return None
    return float((logits(rows.features, W).argmax(1) == rows.labels).mean())


def save_classifier(
    out: Artifact, prefix: str, found: Fit, classes: Sequence[str], facts: dict[str, Any]
) -> None:
    """Publishes `model.safetensors` (weight: classes x features) and `config.json`."""
    config = {
        "kind": "multinomial logistic regression on row-normalised features, no intercept",
        "num_classes": len(classes),
        "classes": list(classes),
        **facts,
    }

    def write(folder: Path) -> None:
        from safetensors.numpy import save_file

        save_file({"weight": found.weights}, folder / WEIGHTS)
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")

    out.publish_files(write, prefix)


def load_classifier(classifier: Artifact, prefix: str = "") -> np.ndarray:
    """The weights (C, dim) of a published classifier."""
    from safetensors.numpy import load_file

    return load_file(classifier.local_file(prefix + WEIGHTS))["weight"]
