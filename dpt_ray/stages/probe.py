"""probe: stage 1 alone, the linear probe on validation and test images and its pseudo-labels."""

from __future__ import annotations

from dpt_ray.cluster.session import threads
from dpt_ray.data.rows import RealRows
from dpt_ray.engine.node import NoSettings, Stage, Task, one_of, reads
from dpt_ray.evaluation.records import PROBE_FILE, ProbeResult, write_result
from dpt_ray.learners.label_quality import quality_by_class, read_given
from dpt_ray.learners.linear_classifier import load_classifier
from dpt_ray.learners.measure import Classified, measure
from dpt_ray.store.records import Facts


class Probe(Stage[NoSettings]):
    """`probe.json`; every number comes with its number of images."""

    artifact = "probe"
    inputs = reads(
        {
            "index": one_of("index"),
            "features": one_of("features"),
            "classifier": one_of("classifier"),
            "pseudo_labels": one_of("pseudo_labels"),
            "labels": one_of("labels", hashed=False),  # the classifier's identity has them
        }
    )

    @classmethod
    def version(cls, settings: NoSettings) -> int:
        """Return 2; in version 1 the few labels were among the pseudo-labels that are judged."""
        return 2

    @classmethod
    def make(cls, task: Task[NoSettings]) -> Facts:
        """Evaluate the probe and, where true labels are known, its pseudo-labels."""
        import torch

        torch.set_num_threads(threads(task.compute))
        real = RealRows(task.inputs["index"], task.inputs["features"], ("validation", "test"))
        classifier = task.inputs["classifier"]
        given = read_given(task.inputs["index"], task.inputs["labels"], task.inputs["pseudo_labels"])
        probe = Classified(load_classifier(classifier), real)
        result: ProbeResult = {
            "n_labels": classifier.manifest["labelled"],
            "accuracy": [measure("probe", probe, "labels only")],
            "gain": None,
            "pseudo_labels": quality_by_class(given),
        }
        return write_result(task.out, PROBE_FILE, result, 1)
