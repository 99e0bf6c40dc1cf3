"""evaluate: stage 3 and its controls on the test images; nothing is fitted or chosen on them.

Only this stage, the probe and the report's pictures read the true labels of the test images. Features,
pseudo-labels and Inception statistics are computed for them as for any image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np

from dpt_ray.cluster.session import threads
from dpt_ray.config.hashing import NotHashed, Settings
from dpt_ray.config.sections import Retrain
from dpt_ray.data.rows import RealRows
from dpt_ray.engine.node import Stage, Task, one_of, reads
from dpt_ray.evaluation.distances import Extractor, frechet_rows
from dpt_ray.evaluation.inception_files import NOT_COMPUTED
from dpt_ray.evaluation.records import (
    EVALUATION_FILE,
    EvaluationResult,
    Gain,
    MetricRow,
    MetricsResult,
    read_metrics,
    read_probe,
    write_result,
)
from dpt_ray.learners.linear_classifier import load_classifier
from dpt_ray.learners.measure import measure
from dpt_ray.store.artifact import Artifact
from dpt_ray.store.records import Facts

# The sweep's key of each chosen setting and its method, in the order of the rows.
CHOSEN = {
    "probe": "tuned_probe",
    "self_training": "self_training",
    "augmented": "augmented",
    "generated": "dpt",
}
# (encoder, its features of real images, its features of generated images) as inputs, and its description.
EXTRACTORS = (
    (
        *("referee", "referee_features", "referee_sample_features"),
        "the referee, a conv net trained on the training images' true labels",
    ),
    (
        *("encoder", "features", "sample_features"),
        "the run's own encoder, DPT's classifier is trained in these features",
    ),
)


class EvaluationSettings(Settings):
    """Stage 3's configured setting, shown in a note; the retrained classifier's identity contains it."""

    retrain: Annotated[Retrain | None, NotHashed] = None


class Evaluation(Stage[EvaluationSettings]):
    """`evaluation.json`; every number comes with its number of images."""

    artifact = "evaluation"
    settings = EvaluationSettings
    inputs = reads(
        {
            "index": one_of("index"),
            "features": one_of("features"),
            "classifier": one_of("classifier"),
            "probe": one_of("probe"),
            "retrained": one_of("classifier", optional=True),
            "sweep": one_of("sweep", optional=True),
            "sample_features": one_of("features", optional=True),
            "referee_features": one_of("features", optional=True),
            "referee_sample_features": one_of("features", optional=True),
            "image_metrics": one_of("image_metrics", optional=True),
            # Not hashed: the identities of the features contain those of their encoders.
            "encoder": one_of("encoder", hashed=False),
            "referee": one_of("encoder", hashed=False, optional=True),
            "samples": one_of("samples", hashed=False),
        }
    )

    @classmethod
    def version(cls, settings: EvaluationSettings) -> int:
        """Return 4; raised whenever the content of an evaluation changes."""
        return 4

    @classmethod
    def make(cls, task: Task[EvaluationSettings]) -> Facts:
        """Evaluate every classifier and measure the generated images."""
        import torch

        torch.set_num_threads(threads(task.compute))
        real = RealRows(task.inputs["index"], task.inputs["features"], ("validation", "test"))
        classifiers = _classifiers(task)
        probe = read_probe(task.inputs["probe"])
        others = [measure(found.method, found.weights, real, found.note) for found in classifiers]
        result: EvaluationResult = {
            **probe,
            "accuracy": [*probe["accuracy"], *others],
            "gain": _paired_gain(task.inputs["classifier"], classifiers, real),
            "frechet": _distances(task),
            "image_metrics": _image_metrics(task),
        }
        return write_result(task.out, EVALUATION_FILE, result, len(result["accuracy"]))


@dataclass(frozen=True)
class Measured:
    """A method's classifier weights (C, dim) and a note on its setting."""

    method: str
    weights: np.ndarray
    note: str


def _classifiers(task: Task[EvaluationSettings]) -> list[Measured]:
    """Return the classifiers of the controls, and of stage 3 as configured and as chosen."""
    retrain = task.settings.retrain
    if "retrained" not in task.inputs or retrain is None:
        return []
    chosen = _chosen(task.inputs["sweep"]) if "sweep" in task.inputs else []
    note = f"{retrain.images_per_class} images per class, real weight {retrain.real_weight}"
    paper = Measured("dpt_paper", load_classifier(task.inputs["retrained"]), note)
    return [*chosen[:-1], paper, *chosen[-1:]]


def _chosen(sweep: Artifact) -> list[Measured]:
    """Return the classifier of each method's best setting on validation."""
    found, trials = [], sweep.manifest["chosen"]
    for key, method in CHOSEN.items():
        if chosen := trials.get(key):
            count = chosen["images_per_class"]
            what = f"{count} images per class, " if count else ""
            what += "labels only" if key == "probe" else f"real weight {chosen['real_weight']}"
            note = f"{what}, l2 {chosen['l2']:g}"
            found.append(Measured(method, load_classifier(sweep, f"{key}/"), note))
    return found


def _paired_gain(probe: Artifact, classifiers: Sequence[Measured], real: RealRows) -> Gain | None:
    """Return DPT's gain over the probe on the same test images, with its paired standard error.

    Both have the setting chosen on validation, or the configured one where nothing was chosen.
    """
    test = real.of_split("test")
    named = {"probe": load_classifier(probe)} | {found.method: found.weights for found in classifiers}
    baseline = "tuned_probe" if "tuned_probe" in named else "probe"
    dpt = next((method for method in ("dpt", "dpt_paper") if method in named), None)
    if dpt is None or len(test) < 2:
        return None
    hits = [((test.features @ named[m].T).argmax(1) == test.labels).astype(float) for m in (baseline, dpt)]
    # Over the n test images the difference d_i in {-1, 0, 1} of the two hits has standard error
    # sd(d) / sqrt(n); it says nothing of other label draws or encoders.
    difference = hits[1] - hits[0]
    return {
        "baseline": baseline,
        "improved": dpt,
        "gain": float(difference.mean()),
        "stderr": float(difference.std(ddof=1) / math.sqrt(len(difference))),
        "kind": "paired standard error over test images",
    }


def _distances(task: Task[EvaluationSettings]) -> list[MetricRow]:
    """Return two rows for each measuring encoder: generated images, and real images as the floor."""
    rows = []
    inputs = task.inputs
    for encoder, features, sample_features, what in EXTRACTORS:
        if sample_features in inputs:
            extractor = Extractor(inputs[encoder], inputs[features], inputs[sample_features], what)
            rows += frechet_rows(inputs["index"], inputs["samples"], extractor)
    return rows


def _image_metrics(task: Task[EvaluationSettings]) -> MetricsResult:
    """Return FID and the other metrics, and why some are left out."""
    if "image_metrics" not in task.inputs:
        return {"rows": [], "left_out": [NOT_COMPUTED]}
    return read_metrics(task.inputs["image_metrics"])
