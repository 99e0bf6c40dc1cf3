"""evaluate: stage 3 and its controls on the test images; nothing is fitted or chosen on them.

Only this stage, the probe and the report's pictures read the true labels of the test images. Features,
pseudo-labels and Inception statistics are computed for them as for any image.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Annotated

import numpy as np

from dpt_ray.cluster.session import threads
from dpt_ray.config.hashing import NotHashed, Settings
from dpt_ray.config.ladder import RUNGS
from dpt_ray.config.sections import Retrain
from dpt_ray.data.rows import RealRows
from dpt_ray.engine.node import Stage, Task, one_of, reads
from dpt_ray.evaluation.distances import Extractor, frechet_rows
from dpt_ray.evaluation.inception_files import NOT_COMPUTED
from dpt_ray.evaluation.methods import BALANCED, ON_GENERATED_IMAGES
from dpt_ray.evaluation.records import (
    EVALUATION_FILE,
    EvaluationResult,
    Gain,
    LadderRow,
    MetricRow,
    MetricsResult,
    StudentResult,
    read_ladder,
    read_metrics,
    read_probe,
    write_result,
)
from dpt_ray.evaluation.swept import by_setting
from dpt_ray.learners.agreement import images_of_trial, images_text
from dpt_ray.learners.label_quality import quality, read_given
from dpt_ray.learners.linear_classifier import CONFIG, HEAD, load_classifier
from dpt_ray.learners.measure import Classified, Climber, ladder_rows, measure, paired_difference
from dpt_ray.store.artifact import Artifact
from dpt_ray.store.records import Facts

# The sweep's key of each chosen setting and its method, in the order of the rows.
CHOSEN = {
    "probe": "tuned_probe",
    "self_training": "self_training",
    "augmented": "augmented",
    "generated": "dpt",
}
# The node of a method that trains its encoder; its features and classifier have the node's name before them.
LEARNERS = {
    "semi_supervised": "learner",
    "semi_supervised_dpt": "retrained_learner",
    "student": "student",
}
# Stages 2 and 3 take these besides the last one, stage 1's learner those.
STAGES = {
    **dict.fromkeys(ON_GENERATED_IMAGES, ("moments", "denoiser", "samples")),
    "semi_supervised": ("learner_labels",),
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
            "ladder": one_of("ladder", optional=True),  # or the pilot, which has its rows too
            **{name: one_of("rung", optional=True) for name in RUNGS},
            # Of what trains its encoder; what is not hashed is for its seconds and its settings.
            **{f"{name}_features": one_of("features", optional=True) for name in LEARNERS.values()},
            **{f"{name}_classifier": one_of("classifier", optional=True) for name in LEARNERS.values()},
            **{name: one_of("encoder", optional=True, hashed=False) for name in LEARNERS.values()},
            "labels": one_of("labels", hashed=False),
            "learner_labels": one_of("pseudo_labels", optional=True, hashed=False),
            "generated_features": one_of("classifier", optional=True),
            # Not hashed: the identities of the features contain those of their encoders.
            "encoder": one_of("encoder", hashed=False),
            "referee": one_of("encoder", hashed=False, optional=True),
            "samples": one_of("samples", hashed=False, optional=True, several=True),
            # For what stage 2 took.
            "moments": one_of("moments", hashed=False, optional=True),
            "denoiser": one_of("denoiser", hashed=False, optional=True),
        }
    )

    @classmethod
    def version(cls, settings: EvaluationSettings) -> int:
        """Return 5; raised whenever the content of an evaluation changes."""
        return 5

    @classmethod
    def make(cls, task: Task[EvaluationSettings]) -> Facts:
        """Evaluate every classifier and measure the generated images."""
        import torch

        torch.set_num_threads(threads(task.compute))
        real = RealRows(task.inputs["index"], task.inputs["features"], ("validation", "test"))
        classifiers = _classifiers(task)
        ladder = read_ladder(task.inputs["ladder"]) if "ladder" in task.inputs else None
        first = ladder or read_probe(task.inputs["probe"])
        learned = _learned(task, real)
        weights = _stage_1(task) | {found.method: found.weights for found in classifiers}
        methods = {method: Classified(W, real) for method, W in weights.items()} | learned
        notes = {found.method: found.note for found in classifiers} | {
            method: _trained(task, method) for method in learned
        }
        gains = {method: _paired_gains(method, methods) for method in _improved(methods)}
        headline: dict[str, Gain] = next(iter(gains.values()), {})
        baselines = ("semi_supervised", "tuned_probe", "probe")
        result: EvaluationResult = {
            "n_labels": first["n_labels"],
            "accuracy": [
                *first["accuracy"],
                *(measure(method, methods[method], note) for method, note in notes.items()),
            ],
            "gain": next((headline[name] for name in baselines if name in headline), None),
            "pseudo_labels": first["pseudo_labels"],
            "frechet": _distances(task),
            "image_metrics": _image_metrics(task),
        }
        if ladder:
            result["ladder"] = [*ladder["ladder"], *_last_rows(task, methods)]
        if ladder or learned:
            compared = ("probe", *RUNGS, "semi_supervised", "generated_features")
            result["gains"] = [found[name] for found in gains.values() for name in compared if name in found]
        if "student" in methods:
            result["student"] = _student(task, methods)
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
    chosen = _chosen(task.inputs["sweep"], swept_methods(task.inputs)) if "sweep" in task.inputs else []
    if "retrained" not in task.inputs or retrain is None:
        return chosen
    images = f"{retrain.images_per_class} images per class{images_text(retrain.min_confidence)}"
    note = f"{images}, real weight {retrain.real_weight}"
    paper = Measured("dpt_paper", load_classifier(task.inputs["retrained"]), note)
    return [*chosen[:-1], paper, *chosen[-1:]]


def swept_methods(inputs: Collection[str]) -> dict[str, str]:
    """Return the methods of the sweep's keys by the names of the evaluation's inputs.

    With a ladder some are rungs of it, which are left out, or compared with them.
    """
    if not any(rung in inputs for rung in RUNGS):
        return CHOSEN
    methods = CHOSEN | {"self_training": "same_labels"}
    return {key: method for key, method in methods.items() if method not in inputs}


def _chosen(sweep: Artifact, methods: Mapping[str, str]) -> list[Measured]:
    """Return the classifier of each method's best setting on validation, that of the first seed."""
    found, trials = [], sweep.manifest["chosen"]
    seeds = {setting.first["shard"]: len(setting.trials) for setting in by_setting(sweep.manifest["trials"])}
    for key, method in methods.items():
        if chosen := trials.get(key):
            count = chosen["images_per_class"]
            passing = images_of_trial(chosen)
            what = f"{count} images per class{passing}, " if count else ""
            what += "labels only" if key == "probe" else f"real weight {chosen['real_weight']}"
            several = seeds.get(chosen["shard"], 1)
            which = f", the first of {several} seeds" if several > 1 else ""
            note = f"{what}, l2 {chosen['l2']:g}{which}"
            found.append(Measured(method, load_classifier(sweep, f"{key}/"), note))
    return found


def _stage_1(task: Task[EvaluationSettings]) -> dict[str, np.ndarray]:
    """Return the classifiers (C, dim) of the probe, of the ladder's rungs and of the pilot by method."""
    rungs = [str(name) for name in (*RUNGS, "generated_features") if name in task.inputs]
    found = {name: load_classifier(task.inputs[name]) for name in rungs}
    return {"probe": load_classifier(task.inputs["classifier"]), **found}


def _learned(task: Task[EvaluationSettings], real: RealRows) -> dict[str, Classified]:
    """Return the classifiers of the learners by method, each with the real images in its own features."""
    found = {}
    for method, name in LEARNERS.items():
        if f"{name}_classifier" in task.inputs:
            rows = RealRows(task.inputs["index"], task.inputs[f"{name}_features"], ("validation", "test"))
            if not rows.ids.equals(real.ids):  # paired differences need the same images in the same order
                raise ValueError(f"{name}_features and features are of different images")
            found[method] = Classified(load_classifier(task.inputs[f"{name}_classifier"]), rows)
    return found


def _trained(task: Task[EvaluationSettings], method: str) -> str:
    """Return how a learner was trained."""
    facts = task.inputs[LEARNERS[method]].read_json(HEAD + CONFIG)
    return f"{facts['method']}, {facts['steps']} steps"


def _student(task: Task[EvaluationSettings], methods: Mapping[str, Classified]) -> StudentResult:
    """Return how the student compares with its teacher."""
    from dpt_ray.learners.distillation import parameters_and_flops
    from dpt_ray.models.encoder import load_encoder

    def size(method: str) -> tuple[int, int]:
        encoder = load_encoder(task.inputs[LEARNERS.get(method, "encoder")].uri)
        return parameters_and_flops(encoder, methods[method].weights)

    teacher = task.inputs["student"].read_json(HEAD + CONFIG)["teacher"]
    (few, less), (many, more) = size("student"), size(teacher)
    return {
        "teacher": teacher,
        "gain": paired_difference(methods["student"].hits("test"), methods[teacher].hits("test")),
        "parameters": few,
        "teacher_parameters": many,
        "flops": less,
        "teacher_flops": more,
    }


def _dpt(methods: Collection[str]) -> str | None:
    """Return DPT's form: with the setting chosen on validation, or as configured where nothing was chosen."""
    return next((method for method in ("dpt", "dpt_paper") if method in methods), None)


def _improved(methods: Collection[str]) -> list[str]:
    """Return the methods whose gains are of interest: what generates, and a learner; the headline's first."""
    order = ("semi_supervised_dpt", _dpt(methods), "generated_features", "semi_supervised")
    return [method for method in order if method and method in methods]


def _paired_gains(improved: str, methods: Mapping[str, Classified]) -> dict[str, Gain]:
    """Return a method's gain over each other method on the same test images, with its paired error."""
    gains = {}
    mine = methods[improved].hits("test")
    for method, classified in methods.items():
        found = paired_difference(mine, classified.hits("test"))
        if found and method not in (*ON_GENERATED_IMAGES, improved):
            gains[method] = Gain(
                baseline=method,
                improved=improved,
                **found,
                kind="paired standard error over test images",
            )
    return gains


def _last_rows(task: Task[EvaluationSettings], methods: Mapping[str, Classified]) -> list[LadderRow]:
    """Return the ladder's last rows, learners and DPT, whose seconds are those of stages 2 and 3."""
    dpt, climbers, inputs = _dpt(methods), [], task.inputs
    last = [name for name in ("semi_supervised", dpt, "semi_supervised_dpt") if name and name in methods]
    for method, classified in methods.items():
        if method in ("probe", BALANCED, *last):
            validation = classified.hits("validation")
            score = float(validation.mean()) if len(validation) else None
            chosen_on = "validation" if method == "dpt" and len(validation) else ""
            seconds = _seconds(task, method)
            labels = None
            if method == "semi_supervised":
                labels = quality(read_given(inputs["index"], inputs["labels"], inputs["learner_labels"]))
            climbers.append(Climber(method, classified, chosen_on, score, len(validation), seconds, labels))
    rows = {row["method"]: row for row in ladder_rows(climbers)}
    return [rows[method] for method in last]


def _seconds(task: Task[EvaluationSettings], method: str) -> float:
    """Return what a method's own stages took when they were made.

    DPT's setting was chosen by the sweep: its stages are those of every set of images.
    """
    own = {"dpt": ("sample_features", "sweep"), "dpt_paper": ("sample_features", "retrained")}
    if name := LEARNERS.get(method):
        own[method] = (name, f"{name}_features")
    names = (*STAGES.get(method, ()), *own.get(method, ()))
    every_set = method == "dpt"
    used = {key for key in task.inputs if (key.partition(":")[0] if every_set else key) in names}
    return sum(task.inputs[key].manifest["seconds"] for key in used)


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
