"""How good the pseudo-labels of the training images are, where true labels are known."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dpt_ray.data.rows import LABELS_FILE, PSEUDO_LABELS_FILE
from dpt_ray.data.units import read_index
from dpt_ray.evaluation.records import LabelQuality, PseudoLabelQuality
from dpt_ray.store.artifact import Artifact


@dataclass(frozen=True)
class Given:
    """The pseudo-labels (n,) of the training images, confidences (n,), and true labels (n,), -1 unknown.

    The few labels that the classifier was fitted on count as unknown: what it says of them says nothing of
    the others.
    """

    labels: np.ndarray
    confidence: np.ndarray
    truth: np.ndarray
    classes: list[str]

    @property
    def known(self) -> np.ndarray:
        """Whether an image's true label is known (n,)."""
        return self.truth >= 0


def read_given(index: Artifact, labels: Artifact, source: Artifact) -> Given:
    """Return the training images' pseudo-labels in an artifact made from `labels`."""
    file = source.local_file(PSEUDO_LABELS_FILE)
    table = pq.read_table(file, columns=["id", "label", "confidence"], filters=[("split", "=", "train")])
    fitted = pq.read_table(labels.local_file(LABELS_FILE), columns=["id"])["id"].combine_chunks()
    truth = read_index(index, ["id", "label"])
    true = truth["label"].take(pc.index_in(table["id"].combine_chunks(), truth["id"].combine_chunks()))
    true = pc.if_else(pc.is_in(table["id"], value_set=fitted), -1, pc.fill_null(true, -1))
    return Given(
        table["label"].to_numpy().astype(np.int64),
        table["confidence"].to_numpy(),
        true.to_numpy().astype(np.int64),
        index.read_json("classes.json"),
    )


def quality(given: Given) -> LabelQuality | None:
    """Return accuracy, calibration and class shares; None without training images."""
    import torch

    from dpt_ray.evaluation.calibration import bins_of, calibration_error

    if not len(given.labels):
        return None
    shares = np.bincount(given.labels, minlength=len(given.classes)) / len(given.labels)
    known = given.known
    right = (given.labels == given.truth)[known]
    bins = bins_of(torch.from_numpy(given.confidence[known]), torch.from_numpy(right))
    return {
        "accuracy": float(right.mean()) if len(right) else None,
        "ece": calibration_error(bins) if len(right) else None,
        "n": len(right),
        "smallest": float(shares.min()),
        "largest": float(shares.max()),
    }


def quality_by_class(given: Given) -> PseudoLabelQuality | None:
    """Return accuracy, and precision and recall by class; None where no true label is known."""
    import torch

    from dpt_ray.evaluation.accuracy import per_class_quality

    known = given.known
    if not known.any():
        return None
    labels, truth = (torch.from_numpy(column[known]) for column in (given.labels, given.truth))
    found = per_class_quality(labels, truth, len(given.classes))
    columns = (given.classes, found["precision"], found["recall"], found["pseudo_images"])
    return {
        "accuracy": float((labels == truth).double().mean()),
        "n": len(truth),
        "classes": [
            {"name": name, "precision": _finite(p), "recall": _finite(r), "count": count}
            for name, p, r, count in zip(*columns, strict=True)
        ],
    }


def _finite(value: float) -> float | None:
    return None if math.isnan(value) else value
