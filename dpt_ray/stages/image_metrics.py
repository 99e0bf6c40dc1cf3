"""image-metrics: FID, sFID, Inception Score, KID, precision and recall of the generated images."""

from __future__ import annotations

from typing import Any

from dpt_ray.cluster import session as cluster
from dpt_ray.engine.node import Task
from dpt_ray.evaluation.inception_files import WEIGHTS_SHA256
from dpt_ray.stages.inception_statistics import read_statistics
from dpt_ray.store.artifact import local_copy

RESULT = "image_metrics.json"


def make(task: Task) -> dict[str, Any]:
    """Publishes `image_metrics.json`: rows (see `Metric`) and why others are left out."""
    import torch

    from dpt_ray.evaluation.image_metrics import Reference, image_metrics

    torch.set_num_threads(cluster.threads(task.compute))
    generated = read_statistics(task.inputs["generated"])
    assert generated is not None  # a class has one generated image at least
    reference = None
    if source := task.settings["reference"]:
        reference = Reference.load(local_copy(source), source.rpartition("/")[2])
    rows, left_out = image_metrics(
        generated,
        read_statistics(task.inputs["real"]),
        reference,
        extractor=_extractor(task.inputs["inception"].manifest["settings"]["sha256"]),
        resize=task.inputs["generated"].manifest["settings"]["resize"],
    )
    result = {"rows": rows, "left_out": left_out}
    task.out.write_json(RESULT, result)
    return {"rows": len(rows), "result": result}


def _extractor(sha256: str) -> str:
    known = "FID's published weights" if sha256 == WEIGHTS_SHA256 else "not FID's published weights"
    return f"Inception-v3 {sha256[:8]} ({known})"
