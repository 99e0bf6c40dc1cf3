"""The accuracy of a linear classifier and the gain of one over another, as results hold them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dpt_ray.data.rows import RealRows, Rows
from dpt_ray.evaluation.methods import BALANCED
from dpt_ray.evaluation.paired import binomial_stderr
from dpt_ray.evaluation.records import (
    AccuracyRow,
    Difference,
    LabelQuality,
    LadderRow,
    ValidationDifference,
)
from dpt_ray.learners.linear_classifier import accuracy, logits


@dataclass(frozen=True)
class Classified:
    """A linear classifier (C, dim) and the real images, in the features that it is for."""

    weights: np.ndarray
    real: RealRows

    def hits(self, split: str) -> np.ndarray:
        """Return 1.0 for each image of a split (n,) whose largest decision is its label, else 0.0."""
        rows = self.real.of_split(split)
        return (logits(rows.features, self.weights).argmax(axis=1) == rows.labels).astype(np.float64)


def measure(method: str, found: Classified, note: str) -> AccuracyRow:
    """Return the accuracy of a method's classifier on validation and test images."""
    validation, test = found.real.validation, found.real.of_split("test")
    return {
        "method": method,
        "note": note,
        "validation": accuracy(found.weights, validation),
        "n_validation": len(validation),
        "test": accuracy(found.weights, test),
        "test_top5": _top5(found.weights, test),
        "n_test": len(test),
    }


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
    """A method of the ladder: its classifier, how it was chosen, and what it took.

    `score` is its accuracy on the `n` images that it was `chosen_on`, `labels` how good its pseudo-labels
    are.
    """

    method: str
    classified: Classified
    chosen_on: str
    score: float | None
    n: int
    seconds: float
    labels: LabelQuality | None = None


def ladder_rows(climbers: Sequence[Climber]) -> list[LadderRow]:
    """Return a row for each method; the gains are over `probe` and `balanced_self_training` among them."""
    found = {climber.method: climber.classified.hits("test") for climber in climbers}
    before = {climber.method: climber.classified.hits("validation") for climber in climbers}

    def over(method: str, other: str, of: Mapping[str, np.ndarray] = found) -> Difference | None:
        if method == other or other not in of:
            return None
        return paired_difference(of[method], of[other])

    def on_validation(method: str) -> ValidationDifference | None:
        difference = over(method, BALANCED, before)
        return ValidationDifference(**difference, n=len(before[method])) if difference else None

    return [
        {
            "method": climber.method,
            "chosen_on": climber.chosen_on,
            "score": climber.score,
            "score_stderr": _binomial(climber.score, climber.n),
            "n": climber.n,
            "test": float(found[climber.method].mean()) if len(found[climber.method]) else None,
            "over_probe": over(climber.method, "probe"),
            "over_balanced": over(climber.method, BALANCED),
            "over_balanced_validation": on_validation(climber.method),
            "seconds": climber.seconds,
            "labels": climber.labels,
        }
        for climber in climbers
    ]


def _binomial(score: float | None, n: int) -> float | None:
    return None if score is None or not n else binomial_stderr(score, n)


def _top5(W: np.ndarray, rows: Rows) -> float | None:
    """Return top-5 accuracy; None without rows, or with five classes or fewer."""
    import torch

    from dpt_ray.evaluation.accuracy import topk

    if not len(rows) or len(W) <= 5:
        return None
    return topk(torch.from_numpy(logits(rows.features, W)), torch.from_numpy(rows.labels), 5)
