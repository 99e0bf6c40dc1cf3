"""image-metrics: FID, sFID, Inception Score, KID, precision and recall of the generated images."""

from __future__ import annotations

from typing import Annotated

from dpt_ray.cluster.session import threads
from dpt_ray.config.hashing import HashedFile, NotHashed, Settings
from dpt_ray.config.sections import LabelChoice, Resize
from dpt_ray.engine.differences import content_digest
from dpt_ray.engine.node import Stage, Task, one_of, reads
from dpt_ray.evaluation.inception_files import WEIGHTS_SHA256
from dpt_ray.evaluation.merged import read_statistics
from dpt_ray.evaluation.records import METRICS_FILE, MetricsResult, write_result
from dpt_ray.store.artifact import local_copy
from dpt_ray.store.records import Facts


class MetricSettings(Settings):
    """The reference statistics. The rest decides how the inputs are made, and is only shown here."""

    reference: Annotated[str | None, HashedFile(key="evaluate.reference")] = None
    resize: Annotated[Resize, NotHashed]
    labels: Annotated[LabelChoice, NotHashed] = "balanced"


class ImageMetrics(Stage[MetricSettings]):
    """`image_metrics.json`: a row for each metric, and why some are left out."""

    artifact = "image_metrics"
    settings = MetricSettings
    inputs = reads(
        {
            "inception": one_of("inception"),
            "inception_samples": one_of("inception_statistics", hashed_as="generated"),
            "inception_reference": one_of("inception_statistics", hashed_as="real"),
        }
    )

    @classmethod
    def make(cls, task: Task[MetricSettings]) -> Facts:
        """Compute all metrics that the statistics and the reference allow."""
        import torch

        from dpt_ray.evaluation.image_metrics import NAME, UNIFORM_NAME, Reference, image_metrics

        torch.set_num_threads(threads(task.compute))
        generated = read_statistics(task.inputs["inception_samples"])
        assert generated is not None  # every class has a generated image
        reference = None
        if source := task.settings.reference:
            reference = Reference.load(local_copy(source), source.rpartition("/")[2])
        rows, left_out = image_metrics(
            generated,
            read_statistics(task.inputs["inception_reference"]),
            reference,
            extractor=_extractor(content_digest(task.inputs["inception"])),
            resize=task.settings.resize,
            name=UNIFORM_NAME if task.settings.labels == "uniform" else NAME,
        )
        result: MetricsResult = {"rows": rows, "left_out": left_out}
        return write_result(task.out, METRICS_FILE, result, len(rows))


def _extractor(sha256: str) -> str:
    known = "FID's published weights" if sha256 == WEIGHTS_SHA256 else "not FID's published weights"
    return f"Inception-v3 {sha256[:8]} ({known})"
