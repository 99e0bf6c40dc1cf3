"""probe: stage 1 by itself, the linear probe on validation and test images and the pseudo-labels it gives."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dpt_ray.cluster import session as cluster
from dpt_ray.data.rows import PSEUDO_LABELS, RealRows
from dpt_ray.data.units import read_index
from dpt_ray.engine.node import Task
from dpt_ray.learners.linear_classifier import Rows, logits
from dpt_ray.stages.classifier import accuracy, load_classifier

PROBE = "Linear probe on the labels (stage 1)"
RESULT = "probe.json"


def make(task: Task) -> dict[str, Any]:
    """Publishes `probe.json`; every number carries how many images it rests on."""
    import torch

    torch.set_num_threads(cluster.threads(task.compute))
    real = RealRows(task.inputs["index"], task.inputs["features"], ("validation", "test"))
    classifier = task.inputs["classifier"]
    result = {
        "n_labels": classifier.manifest["labelled"],
        "accuracy": [measure(PROBE, load_classifier(classifier), real, "labels only")],
        "gain": None,
        "pseudo_labels": _pseudo_labels(task),
    }
    task.out.write_json(RESULT, result)
    return {"rows": 1, "result": result}


def measure(name: str, W: np.ndarray, real: RealRows, note: str) -> dict[str, Any]:
    """The accuracy of a classifier on validation and test images."""
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


def _pseudo_labels(task: Task) -> dict[str, Any] | None:
    """Accuracy, and precision and recall by class, of the training images' pseudo-labels."""
    import torch

    from dpt_ray.evaluation.accuracy import per_class_quality

    index = task.inputs["index"]
    table = pq.read_table(
        task.inputs["pseudo_labels"].local_file(PSEUDO_LABELS), columns=["id", "split", "label"]
    )
    table = table.filter(pc.equal(table["split"], "train"))
    truth = read_index(index, ["id", "label"])
    true = truth["label"].take(pc.index_in(table["id"].combine_chunks(), truth["id"].combine_chunks()))
    known = pc.is_valid(true)
    if not pc.any(known).as_py():
        return None
    given = torch.from_numpy(table["label"].filter(known).to_numpy().astype(np.int64))
    labels = torch.from_numpy(true.filter(known).to_numpy().astype(np.int64))
    classes = index.read_json("classes.json")
    quality = per_class_quality(given, labels, len(classes))
    rows = [
        {"name": name, "precision": _finite(p), "recall": _finite(r), "count": count}
        for name, p, r, count in zip(
            classes, quality["precision"], quality["recall"], quality["pseudo_images"], strict=True
        )
    ]
    return {"accuracy": float((given == labels).double().mean()), "n": len(labels), "classes": rows}


def _finite(value: float) -> float | None:
    return None if math.isnan(value) else value
