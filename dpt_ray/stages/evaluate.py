"""evaluate: the only stage that looks at test labels, once for each classifier."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from dpt_ray.artifacts import Artifact
from dpt_ray.evaluation.inception_files import NOT_COMPUTED
from dpt_ray.learners.linear_classifier import Rows, logits
from dpt_ray.stages.distances import frechet_rows
from dpt_ray.stages.fit_classifier import accuracy, load_classifier
from dpt_ray.stages.node import Task
from dpt_ray.stages.rows import PSEUDO_LABELS, RealRows

METHODS = {
    "generated": "DPT, chosen on validation",
    "self_training": "Self-training on pseudo-labelled real images (control)",
    "augmented": "Augmented labelled images (control)",
}
PROBE = "Linear probe on the labels (stage 1)"
PAPER = "DPT, the configured setting (stage 3)"
RESULT = "evaluation.json"


def make(task: Task) -> dict[str, Any]:
    """Publishes `evaluation.json`; every number carries how many images it rests on."""
    import torch

    torch.set_num_threads(task.compute.threads)
    real = RealRows(task.inputs["index"], task.inputs["features"])
    classifiers = _classifiers(task)
    result = {
        "n_labels": task.inputs["classifier"].manifest["labelled"],
        "accuracy": [_measure(name, W, real, note) for name, W, note in classifiers],
        "gain": _paired_gain(classifiers, real),
        "pseudo_labels": _pseudo_labels(task, real),
        "frechet": frechet_rows(task),
        "image_metrics": _image_metrics(task),
    }
    task.out.write_json(RESULT, result)
    return {"rows": len(result["accuracy"]), "result": result}


Classifier = tuple[str, np.ndarray, str]


def _classifiers(task: Task) -> list[Classifier]:
    """(name, weights, note): the probe, the controls, stage 3 as configured and as chosen."""
    found: list[Classifier] = [(PROBE, load_classifier(task.inputs["classifier"]), "labels only")]
    if "retrained" not in task.inputs:
        return found
    chosen = _chosen(task.inputs["sweep"]) if "sweep" in task.inputs else []
    retrained = task.inputs["retrained"]
    settings = retrained.manifest["settings"]
    note = f"{settings['images_per_class']} images per class, real weight {settings['real_weight']}"
    paper = (PAPER, load_classifier(retrained), note)
    return [*found, *chosen[:-1], paper, *chosen[-1:]]


def _chosen(sweep: Artifact) -> list[Classifier]:
    """The setting of each method that validation prefers."""
    found = []
    for method in ("self_training", "augmented", "generated"):
        if chosen := sweep.manifest["chosen"].get(method):
            count = chosen["images_per_class"]
            what = f"{count} images per class, " if count else ""
            note = f"{what}real weight {chosen['real_weight']}, l2 {chosen['l2']:g}"
            found.append((METHODS[method], load_classifier(sweep, f"{method}/"), note))
    return found


def _measure(name: str, W: np.ndarray, real: RealRows, note: str) -> dict[str, Any]:
    validation, test = real.validation, real.of_split("test")
    return {
        "name": name,
        "note": note,
        "validation": accuracy(W, validation),
        "n_validation": len(validation),
        "test": accuracy(W, test),
        "test_top5": _top5(W, test),
        "n_test": len(test),
    }


def _top5(W: np.ndarray, rows: Rows) -> float | None:
    """Top-5 accuracy; None without rows, or with five classes or fewer."""
    import torch

    from dpt_ray.evaluation.accuracy import topk

    if not len(rows) or len(W) <= 5:
        return None
    return topk(torch.from_numpy(logits(rows.features, W)), torch.from_numpy(rows.labels), 5)


def _paired_gain(classifiers: list[Classifier], real: RealRows) -> dict[str, Any] | None:
    """DPT's gain over the probe on the same test images, with its paired standard error.

    DPT is the setting chosen on validation, or the configured one where nothing was chosen.

    Over the n test images the difference d_i in {-1, 0, 1} of the two hits has standard error
    sd(d) / sqrt(n); it says nothing of other label draws or encoders.
    """
    test = real.of_split("test")
    named = {name: W for name, W, _ in classifiers}
    dpt = next((name for name in (METHODS["generated"], PAPER) if name in named), None)
    if dpt is None or len(test) < 2:
        return None
    hits = [((test.features @ named[name].T).argmax(1) == test.labels).astype(float) for name in (PROBE, dpt)]
    difference = hits[1] - hits[0]
    return {
        "baseline": PROBE,
        "improved": dpt,
        "gain": float(difference.mean()),
        "stderr": float(difference.std(ddof=1) / math.sqrt(len(difference))),
        "kind": "paired standard error over test images",
    }


def _pseudo_labels(task: Task, real: RealRows) -> dict[str, Any] | None:
    """Accuracy, and precision and recall by class, of the training images' pseudo-labels."""
    import torch

    from dpt_ray.evaluation.accuracy import per_class_quality

    truth = real.of_split("train")
    if not len(truth):
        return None
    table = pq.read_table(task.inputs["pseudo_labels"].local_file(PSEUDO_LABELS))
    predicted = dict(zip(table["id"].to_pylist(), table["label"].to_pylist(), strict=True))
    train = [
        (predicted[identifier], label)
        for identifier, split, label in zip(
            real.ids.to_pylist(), real.split.to_pylist(), real.label.to_pylist(), strict=True
        )
        if split == "train" and label is not None
    ]
    given = torch.tensor([p for p, _ in train])
    labels = torch.tensor([label for _, label in train])
    quality = per_class_quality(given, labels, len(real.classes))
    rows = [
        {"name": name, "precision": _finite(p), "recall": _finite(r), "count": count}
        for name, p, r, count in zip(
            real.classes, quality["precision"], quality["recall"], quality["pseudo_images"], strict=True
        )
    ]
    return {"accuracy": float((given == labels).double().mean()), "n": len(labels), "classes": rows}


def _image_metrics(task: Task) -> dict[str, Any]:
    """Rows of FID and its like, and what is left out and why."""
    if "image_metrics" not in task.inputs:
        return {"rows": [], "left_out": [NOT_COMPUTED]}
    return task.inputs["image_metrics"].manifest["result"]


def _finite(value: float) -> float | None:
    return None if math.isnan(value) else value
