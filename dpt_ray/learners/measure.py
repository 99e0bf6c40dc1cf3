"""The accuracy of a linear classifier and the gain of one over another, as results hold them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dpt_ray.data.rows import RealRows, Rows
from dpt_ray.evaluation.methods import BALANCED
from dpt_ray.evaluation.records import (
    AccuracyRow,
    Difference,
    LabelQuality,
    LadderRow,
    ValidationDifference,
)
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


def hits(W: np.ndarray, rows: Rows) -> np.ndarray:
    """Return 1.0 for each row (n,) whose largest decision value is that of its label, else 0.0."""
    return (logits(rows.features, W).argmax(axis=1) == rows.labels).astype(np.float64)


def paired_difference(improved: np.ndarray, baseline: np.ndarray) -> Difference | None:
    """Return the mean of hits (n,) minus others on the same images, and its error; None below 2 images."""
    if len(improved) < 2:
        return None
    # Over the n images the difference d_i in {-1, 0, 1} of the two hits has standard error
    # sd(d) / sqrt(n); it says nothing of other label draws or encoders.
    difference = improved - baseline
    stderr = float(difference.std(ddof=1) / math.sqrt(len(difference)))
    return {"gain": float(difference.mean()), "stderr": stderr}


@dataclass(frozen=True)
class Climber:
    """A method of the ladder: its classifier (C, dim), how it was chosen, and what it took.

    `score` is its accuracy on the `n` images that it was `chosen_on`, `labels` how good its pseudo-labels
    are.
    """

    method: str
    weights: np.ndarray
    chosen_on: str
    score: float | None
    n: int
    seconds: float
    labels: LabelQuality | None = None


def ladder_rows(climbers: Sequence[Climber], real: RealRows) -> list[LadderRow]:
    """Return a row for each method; the gains are over `probe` and `balanced_self_training` among them."""
    test, validation = real.of_split("test"), real.validation
    found = {climber.method: hits(climber.weights, test) for climber in climbers}
    before = {climber.method: hits(climber.weights, validation) for climber in climbers}

    def over(method: str, other: str, of: Mapping[str, np.ndarray] = found) -> Difference | None:
        if method == other or other not in of:
            return None
        return paired_difference(of[method], of[other])

    def on_validation(method: str) -> ValidationDifference | None:
        difference = over(method, BALANCED, before)
        return ValidationDifference(**difference, n=len(validation)) if difference else None

    return [
        {
            "method": climber.method,
            "chosen_on": climber.chosen_on,
            "score": climber.score,
            "score_stderr": _binomial(climber.score, climber.n),
            "n": climber.n,
            "test": float(found[climber.method].mean()) if len(test) else None,
            "over_probe": over(climber.method, "probe"),
            "over_balanced": over(climber.method, BALANCED),
            "over_balanced_validation": on_validation(climber.method),
            "seconds": climber.seconds,
            "labels": climber.labels,
        }
        for climber in climbers
    ]


def _binomial(score: float | None, n: int) -> float | None:
    return None if score is None or not n else math.sqrt(score * (1 - score) / n)


def _top5(W: np.ndarray, rows: Rows) -> float | None:
    """Return top-5 accuracy; None without rows, or with five classes or fewer."""
    import torch

    from dpt_ray.evaluation.accuracy import topk

    if not len(rows) or len(W) <= 5:
        return None
    return topk(torch.from_numpy(logits(rows.features, W)), torch.from_numpy(rows.labels), 5)
