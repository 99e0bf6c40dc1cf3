"""The accuracy of a linear classifier, as results hold it."""

from __future__ import annotations

import numpy as np

from dpt_ray.data.rows import RealRows, Rows
from dpt_ray.evaluation.records import AccuracyRow
from dpt_ray.learners.linear_classifier import accuracy, logits


def measure(method: str, W: np.ndarray, real: RealRows, note: str) -> AccuracyRow:
    """Return the accuracy of a method's classifier (C, dim) on validation and test images."""
    validation, test = real.validation, real.of_split("test")
    return {
        "method": method,
        "note": note,
        "validation": accuracy(W, validation),
        "n_validation": len(validation),
        "test": accuracy(W, test),
        "test_top5": _top5(W, test),
        "n_test": len(test),
    }


def _top5(W: np.ndarray, rows: Rows) -> float | None:
    """Return top-5 accuracy; None without rows, or with five classes or fewer."""
    import torch

    from dpt_ray.evaluation.accuracy import topk

    if not len(rows) or len(W) <= 5:
        return None
    return topk(torch.from_numpy(logits(rows.features, W)), torch.from_numpy(rows.labels), 5)
