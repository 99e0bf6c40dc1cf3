"""ladder, pilot: the probe and the rungs of stage 1 on validation and test images, and what each took.

The pilot also has the classifier from generated features: what generation brings, before any image.
"""

from __future__ import annotations

from collections.abc import Mapping

from dpt_ray.cluster.session import threads
from dpt_ray.config.ladder import RUNGS
from dpt_ray.data.rows import RealRows
from dpt_ray.engine.node import NoSettings, Stage, Task, one_of, reads
from dpt_ray.evaluation.records import LADDER_FILE, AccuracyRow, LadderResult, read_probe, write_result
from dpt_ray.learners.label_quality import quality, read_given
from dpt_ray.learners.linear_classifier import load_classifier
from dpt_ray.learners.measure import Classified, Climber, ladder_rows, measure
from dpt_ray.store.artifact import Artifact
from dpt_ray.store.records import Facts

# What is made for one method alone, besides its classifier.
OWN = {"propagation": ("graph",), "generated_features": ("feature_denoiser", "feature_samples")}


class LadderResults(Stage[NoSettings]):
    """`ladder.json`; every number comes with its number of images."""

    artifact = "ladder"
    inputs = reads(
        {
            "index": one_of("index"),
            "features": one_of("features"),
            "probe": one_of("probe"),
            "classifier": one_of("classifier"),
            # The probe was made from it.
            "pseudo_labels": one_of("pseudo_labels", hashed=False),
            "graph": one_of("graph", optional=True, hashed=False),
            **{name: one_of("rung", optional=True) for name in RUNGS},
            # Of the pilot; the other two are for their seconds.
            "generated_features": one_of("classifier", optional=True),
            "labels": one_of("labels", hashed=False),  # the classifier's identity has them
            "feature_denoiser": one_of("feature_denoiser", optional=True, hashed=False),
            "feature_samples": one_of("feature_samples", optional=True, hashed=False),
        }
    )

    @classmethod
    def version(cls, settings: NoSettings) -> int:
        """Return 4; raised whenever the content of a ladder changes."""
        return 4

    @classmethod
    def make(cls, task: Task[NoSettings]) -> Facts:
        """Measure each rung."""
        import torch

        torch.set_num_threads(threads(task.compute))
        real = RealRows(task.inputs["index"], task.inputs["features"], ("validation", "test"))
        climbers = _climbers(task.inputs, real)
        probe = read_probe(task.inputs["probe"])
        rungs: list[AccuracyRow] = [
            measure(climber.method, climber.classified, _note(task.inputs[climber.method]))
            for climber in climbers[1:]
        ]
        result: LadderResult = {
            **probe,
            "accuracy": [*probe["accuracy"], *rungs],
            "ladder": ladder_rows(climbers),
        }
        return write_result(task.out, LADDER_FILE, result, len(climbers))


def _climbers(inputs: Mapping[str, Artifact], real: RealRows) -> list[Climber]:
    """Return the probe and the rungs, in their order."""
    index, few, labels = inputs["index"], inputs["labels"], inputs["pseudo_labels"]
    classifier = inputs["classifier"].manifest
    seconds = classifier["seconds"] + labels.manifest["seconds"]
    found = [
        Climber(
            "probe",
            Classified(load_classifier(inputs["classifier"]), real),
            "",
            classifier["validation_top1"],
            classifier["n_validation"],
            seconds,
            quality(read_given(index, few, labels)),
        )
    ]
    for name in (*RUNGS, "generated_features"):
        if name in inputs:
            manifest = inputs[name].manifest
            rung = manifest["rung"]
            seconds = sum(inputs[source].manifest["seconds"] for source in (*OWN.get(name, ()), name))
            labelled = quality(read_given(index, few, inputs[name])) if name in RUNGS else None
            classified = Classified(load_classifier(inputs[name]), real)
            found.append(
                Climber(name, classified, rung["chosen_on"], rung["top1"], rung["n"], seconds, labelled)
            )
    return found


def _note(rung: Artifact) -> str:
    """Return the rung's setting and what it was chosen on."""
    facts = rung.manifest["rung"]
    what = "l2" if facts["method"] == "tuned_probe" else "lambda x classes"
    how = {
        "validation": f"chosen on {facts['n']} validation images",
        "cross-validation": f"chosen by cross-validation over the {facts['n']} labels",
        "none": "the default, nothing to choose on",
    }
    return f"{what} {facts['setting']:g}, {how[facts['chosen_on']]}"
