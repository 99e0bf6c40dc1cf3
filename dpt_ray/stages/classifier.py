"""fit-classifier, retrain: the linear classifier on labelled images, without and with generated images."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from dpt_ray.cluster.fits import run_fit
from dpt_ray.cluster.session import threads
from dpt_ray.config.hashing import Settings
from dpt_ray.config.sections import Classifier as ClassifierSettings
from dpt_ray.config.sections import Retrain
from dpt_ray.data.rows import ImageRows, RealRows, Rows, features_bytes
from dpt_ray.engine.node import RunsOn, Stage, Task, one_of, reads
from dpt_ray.learners.agreement import agreeing, warn_of_short_classes
from dpt_ray.learners.linear_classifier import accuracy, save_classifier
from dpt_ray.store.records import Facts

if TYPE_CHECKING:
    from dpt_ray.learners.linear_probe import Fit

LABELLED = {"index": one_of("index"), "features": one_of("features"), "labels": one_of("labels")}


class Classifier(Stage[ClassifierSettings]):
    """Stage 1: the linear probe, on the few labelled images."""

    artifact = "classifier"
    settings = ClassifierSettings
    inputs = reads(LABELLED)
    runs_on = RunsOn.FIT

    @classmethod
    def make(cls, task: Task[ClassifierSettings]) -> Facts:
        """Fit and publish a classifier's folder."""
        return run_fit(task, fit_classifier)


class Retrained(Stage[Retrain]):
    """Stage 3: the same regression on the labelled images and the first generated images of each class."""

    artifact = "classifier"
    settings = Retrain
    inputs = reads(
        {
            **LABELLED,
            "sample_features": one_of("features", hashed_as="generated"),
            "samples": one_of("samples", hashed=False),
            # With `min_confidence`: the classifier that decides, and the temperature of its confidences.
            "judge": one_of("classifier", "rung", optional=True),
            "judge_labels": one_of("pseudo_labels", "rung", optional=True),
        }
    )
    runs_on = RunsOn.FIT

    @classmethod
    def make(cls, task: Task[Retrain]) -> Facts:
        """Fit and publish a classifier's folder."""
        return run_fit(task, retrain, features_bytes(task.inputs["sample_features"]))


def fit_classifier(task: Task[ClassifierSettings]) -> Facts:
    """Publish the classifier of the labelled images."""
    from dpt_ray.learners.linear_probe import fit_stage

    real, labelled = _read(task)
    settings = task.settings
    found = fit_stage(labelled, None, 1.0, len(real.classes), settings.l2, settings.max_iterations)
    return _publish(task, found, real, len(labelled), 0)


def retrain(task: Task[Retrain]) -> Facts:
    """Publish the classifier of the labelled and the generated images."""
    from dpt_ray.learners.linear_probe import fit_stage

    real, labelled = _read(task)
    settings = task.settings
    generated = ImageRows(task.inputs["sample_features"], task.inputs["samples"])
    count = settings.images_per_class
    more = agreeing(generated, task.inputs, count, settings.min_confidence)
    if settings.min_confidence is not None:
        warn_of_short_classes(task.name, more, real.classes, count)
    found = fit_stage(
        labelled,
        more,
        settings.real_weight,
        len(real.classes),
        settings.l2,
        settings.max_iterations,
    )
    return _publish(task, found, real, len(labelled), len(more))


def _read(task: Task[Settings]) -> tuple[RealRows, Rows]:
    """Return the validation rows and the labelled rows."""
    import torch

    torch.set_num_threads(threads(task.compute))
    labels = task.inputs["labels"]
    real = RealRows(task.inputs["index"], task.inputs["features"], ("validation",), labels)
    return real, real.labelled(labels)


def _publish(task: Task[Settings], found: Fit, real: RealRows, n_labelled: int, n_more: int) -> Facts:
    """Publish the classifier; return its facts, none of which uses the test images."""
    unreadable = task.inputs["labels"].manifest["rows"] - n_labelled
    facts: Facts = {
        "rows": n_labelled + n_more,
        "labelled": n_labelled,
        "objective": found.objective,
        "iterations": found.iterations,
        "n_validation": len(real.validation),
        "validation_top1": accuracy(found.weights, real.validation),
        "unreadable_labels": unreadable,
    }
    if unreadable:
        logging.getLogger("dpt_ray").warning(
            "%s: %d labelled images cannot be read and are left out", task.name, unreadable
        )
    save_classifier(task.out, found.weights, real.classes, facts)
    return facts
