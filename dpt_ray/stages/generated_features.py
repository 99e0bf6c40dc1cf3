"""generated-features: stage 3 on generated features, the classifier of the few labels and of these."""

from __future__ import annotations

import logging
from typing import Annotated

from dpt_ray.cluster.fits import run_fit
from dpt_ray.cluster.session import threads
from dpt_ray.config.hashing import HashedIfSet, Settings
from dpt_ray.config.ladder import ChooseOn
from dpt_ray.config.sections import RealWeight
from dpt_ray.config.values import Count
from dpt_ray.data.rows import ImageRows, RealRows, features_bytes
from dpt_ray.engine.node import RunsOn, Stage, Task, one_of, reads
from dpt_ray.learners.linear_classifier import accuracy, negative_log_likelihood, save_classifier
from dpt_ray.learners.pseudo_table import calibrate
from dpt_ray.store.records import Facts


class FeatureRetrainSettings(Settings):
    """The first `images_per_class` features of each class, the weight of a labelled row, how to choose."""

    images_per_class: Count
    real_weight: RealWeight
    choose_on: Annotated[ChooseOn, HashedIfSet] = "validation"


class GeneratedFeatures(Stage[FeatureRetrainSettings]):
    """A classifier's folder; its manifest says how lambda was chosen, as that of a rung of the ladder."""

    artifact = "classifier"
    settings = FeatureRetrainSettings
    inputs = reads(
        {
            "index": one_of("index"),
            "features": one_of("features"),
            "labels": one_of("labels"),
            "feature_samples": one_of("feature_samples", hashed_as="generated"),
        }
    )

    runs_on = RunsOn.FIT

    @classmethod
    def make(cls, task: Task[FeatureRetrainSettings]) -> Facts:
        """Fit, choose lambda on validation where there is any, and publish."""
        held = features_bytes(task.inputs["features"], task.inputs["feature_samples"].manifest["rows"])
        return run_fit(task, fit_generated, held)


def fit_generated(task: Task[FeatureRetrainSettings]) -> Facts:
    """Publish the classifier of the labelled images and the generated features."""
    import torch

    from dpt_ray.learners.ladder import from_generated

    torch.set_num_threads(threads(task.compute))
    labels, samples = task.inputs["labels"], task.inputs["feature_samples"]
    real = RealRows(task.inputs["index"], task.inputs["features"], ("validation",), labels)
    labelled = real.labelled(labels)
    generated = ImageRows(samples, samples).first(task.settings.images_per_class)
    judges = real.judges(task.settings.choose_on)
    found = from_generated(labelled, generated, judges, len(real.classes), task.settings.real_weight)
    if found.on == "none":
        logging.getLogger("dpt_ray").warning(
            "%s: no validation images to choose on: the default lambda x classes %g is taken",
            task.name,
            found.setting,
        )
    facts: Facts = {
        "rows": len(labelled) + len(generated),
        "labelled": len(labelled),
        "n_validation": len(real.validation),
        "validation_top1": accuracy(found.weights, real.validation),
        "validation_nll": negative_log_likelihood(found.weights, real.validation),
        "rung": {
            "method": task.name,
            "setting": found.setting,
            "chosen_on": found.on,
            "top1": found.top1,
            "stderr": found.stderr,
            "n": len(found.labels),
        },
    }
    save_classifier(task.out, found.weights, real.classes, facts)
    return {**facts, "calibration": calibrate(found.decisions, found.labels)}
