"""Which generated images a classifier of stage 1 takes for what they were generated as.

Filtering synthetic training images by a classifier, and taking the next ones in place of those that do not
pass, is a step of several pipelines after DPT; the paper takes every image.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import numpy as np

from dpt_ray.data.rows import ImageRows, Rows
from dpt_ray.learners.linear_classifier import load_classifier, probabilities
from dpt_ray.store.artifact import Artifact
from dpt_ray.store.records import TrialShard


def agreeing(
    images: ImageRows, inputs: Mapping[str, Artifact], images_per_class: int, min_confidence: float | None
) -> Rows:
    """Return the first images of each class that pass, at most `images_per_class`; all pass at None.

    An image passes if the classifier `judge` among the inputs gives it its own class, with a confidence of
    `min_confidence` or more at the temperature of `judge_labels`.
    """
    if min_confidence is None:
        return images.first(images_per_class)
    W = load_classifier(inputs["judge"])
    temperature = inputs["judge_labels"].manifest["calibration"]["temperature"]
    passes = agree(images.features, images.label, W, temperature, min_confidence)
    return images.first(images_per_class, passes)


def agree(
    features: np.ndarray, labels: np.ndarray, W: np.ndarray, temperature: float, min_confidence: float
) -> np.ndarray:
    """Return which rows (n,) have their own label and at least this confidence.

    `features` (n, dim) are row-normalised, `labels` (n,) class ids and `W` (C, dim).
    """
    return agreed(probabilities(features, W, temperature), labels, min_confidence)


def agreed(p: np.ndarray, labels: np.ndarray, min_confidence: float) -> np.ndarray:
    """Return which rows of probabilities `p` (n, C) have their own label with at least this confidence."""
    # y = argmax p and max p >= c, with p = softmax(W f / T)
    own: np.ndarray = (p.argmax(axis=1) == labels) & (p.max(axis=1) >= min_confidence)
    return own


def images_text(min_confidence: float | None, samples: str = "") -> str:
    """Return what to say of a setting after its number of images, "" where all images pass.

    `samples` is what another set of images than the run's is sampled with.
    """
    which = f", {samples}" if samples else ""
    if min_confidence is None:
        return which
    return which + (f", confidence >= {min_confidence:g}" if min_confidence else ", agreed on")


def images_of_trial(trial: TrialShard) -> str:
    """Return what to say of a sweep's trial after its number of images."""
    return images_text(trial.get("min_confidence"), trial.get("samples", ""))


def warn_of_short_classes(name: str, rows: Rows, classes: list[str], images_per_class: int) -> None:
    """Warn where fewer images of a class pass the filter than are asked for."""
    counts = np.bincount(rows.labels, minlength=len(classes))
    short = int((counts < images_per_class).sum())
    if short:
        fewest = int(counts.argmin())
        logging.getLogger("dpt_ray").warning(
            "%s: %d of %d classes have fewer than %d generated images that pass (class %s: %d); raise "
            "generate.images_per_class, or lower min_confidence",
            name,
            short,
            len(classes),
            images_per_class,
            classes[fewest],
            counts[fewest],
        )
