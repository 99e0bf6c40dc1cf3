"""probe: stage 1 alone, the linear probe on validation and test images and its pseudo-labels."""

from __future__ import annotations

import math

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dpt_ray.cluster.session import threads
from dpt_ray.data.rows import PSEUDO_LABELS_FILE, RealRows
from dpt_ray.data.units import read_index
from dpt_ray.engine.node import NoSettings, Stage, Task, one_of, reads
from dpt_ray.evaluation.records import PROBE_FILE, ProbeResult, PseudoLabelQuality, write_result
from dpt_ray.learners.linear_classifier import load_classifier
from dpt_ray.learners.measure import measure
from dpt_ray.store.records import Facts


class Probe(Stage[NoSettings]):
    """`probe.json`; every number comes with its number of images."""

    artifact = "probe"
    inputs = reads(
        {
            "index": one_of("index"),
            "features": one_of("features"),
            "classifier": one_of("classifier"),
            "pseudo_labels": one_of("pseudo_labels"),
        }
    )

    @classmethod
    def make(cls, task: Task[NoSettings]) -> Facts:
        """Evaluate the probe and, where true labels are known, its pseudo-labels."""
        import torch

        torch.set_num_threads(threads(task.compute))
        real = RealRows(task.inputs["index"], task.inputs["features"], ("validation", "test"))
        classifier = task.inputs["classifier"]
        result: ProbeResult = {
            "n_labels": classifier.manifest["labelled"],
            "accuracy": [measure("probe", load_classifier(classifier), real, "labels only")],
            "gain": None,
            "pseudo_labels": _pseudo_labels(task),
        }
        return write_result(task.out, PROBE_FILE, result, 1)


def _pseudo_labels(task: Task[NoSettings]) -> PseudoLabelQuality | None:
    """Return accuracy, and precision and recall by class, of the training images' pseudo-labels."""
    import torch

    from dpt_ray.evaluation.accuracy import per_class_quality

    index = task.inputs["index"]
    file = task.inputs["pseudo_labels"].local_file(PSEUDO_LABELS_FILE)
    table = pq.read_table(file, columns=["id", "split", "label"])
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
    columns = (classes, quality["precision"], quality["recall"], quality["pseudo_images"])
    return {
        "accuracy": float((given == labels).double().mean()),
        "n": len(labels),
        "classes": [
            {"name": name, "precision": _finite(p), "recall": _finite(r), "count": count}
            for name, p, r, count in zip(*columns, strict=True)
        ],
    }


def _finite(value: float) -> float | None:
    return None if math.isnan(value) else value
