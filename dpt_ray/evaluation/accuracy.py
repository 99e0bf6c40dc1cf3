"""Top-k accuracy with its standard error, and pseudo-label quality per class."""

from __future__ import annotations

import torch
from torch import Tensor


def topk(logits: Tensor, labels: Tensor, k: int) -> float:
    """Return the fraction of rows whose label is among the k largest logits.

    `logits` (n, C) may be probabilities too; `labels` (n,) are integers in [0, C).
    """
    check_scores(logits, labels)
    classes = logits.shape[1]
    if not 1 <= k <= classes:
        raise ValueError(f"k {k} is not between 1 and the {classes} classes; lower k")
    hits = (logits.topk(k, dim=1).indices == labels[:, None]).any(dim=1)
    return float(hits.double().mean())


def per_class_quality(pseudo_labels: Tensor, labels: Tensor, classes: int) -> dict[str, list]:
    """Return columns `class`, `images`, `pseudo_images`, `precision`, `recall`, one row per class.

    `pseudo_labels` and true `labels` (n,) are of the same images. Precision is NaN, and not 0, for a
    class that is never predicted, as is recall for one without images.
    """
    check_labels(labels, classes, "labels")
    check_labels(pseudo_labels, classes, "pseudo_labels")
    if pseudo_labels.shape != labels.shape:
        raise ValueError(f"{len(pseudo_labels)} pseudo_labels, {len(labels)} labels; join by id")
    images = torch.bincount(labels, minlength=classes)
    predicted = torch.bincount(pseudo_labels, minlength=classes)
    correct = torch.bincount(labels[pseudo_labels == labels], minlength=classes).double()
    return {
        "class": list(range(classes)),
        "images": images.tolist(),
        "pseudo_images": predicted.tolist(),
        "precision": (correct / predicted).tolist(),
        "recall": (correct / images).tolist(),
    }


def check_scores(scores: Tensor, labels: Tensor) -> None:
    """Raise ValueError unless `scores` (n, C) are finite, n >= 1 and `labels` (n,) lie in [0, C)."""
    if scores.ndim != 2 or labels.shape != scores.shape[:1] or len(scores) == 0:
        raise ValueError(
            f"scores {tuple(scores.shape)} and labels {tuple(labels.shape)} do not fit; "
            "pass (n, classes) and (n,) with n >= 1"
        )
    if not scores.isfinite().all():
        row = int(scores.isfinite().all(dim=1).byte().argmin())
        raise ValueError(
            f"scores row {row} is not finite: its features or the classifier's weights are not; "
            "compute the features with precision=float32"
        )
    check_labels(labels, scores.shape[1], "labels")


def check_labels(labels: Tensor, classes: int, name: str) -> None:
    """Raise ValueError unless `labels` (n,) are integers in [0, classes)."""
    if labels.ndim != 1 or labels.dtype.is_floating_point:
        raise ValueError(f"{name} are {tuple(labels.shape)} {labels.dtype}; pass integers (n,)")
    if len(labels) and not (int(labels.min()) >= 0 and int(labels.max()) < classes):
        raise ValueError(
            f"{name} range over [{int(labels.min())}, {int(labels.max())}], outside [0, {classes}); "
            "leave unlabelled rows out"
        )
