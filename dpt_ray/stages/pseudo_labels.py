"""pseudo-label: a label, a confidence and the five best classes for every image.

Confidences are those of the row-normalised features, at a temperature fitted on validation (Guo et al.
2017, arXiv 1706.04599); DPT's public code scores features that are not normalised, which leaves the
labels alone and saturates the probabilities.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy.special import softmax

from dpt_ray.cluster import session as cluster
from dpt_ray.data.rows import PSEUDO_LABELS, RealRows
from dpt_ray.engine.node import Task
from dpt_ray.learners.linear_classifier import logits, row_normalise
from dpt_ray.store.artifact import Artifact

TOP = 5


def make(task: Task) -> dict[str, Any]:
    """Publishes one Parquet table with a row for each image whose features are known."""
    features, index = task.inputs["features"], task.inputs["index"]
    from dpt_ray.stages.classifier import load_classifier

    W = load_classifier(task.inputs["classifier"])
    real = RealRows(index, features, ("validation",))
    calibration = _calibrate(W, real)
    started = time.perf_counter()
    cluster.connect(task.compute)
    import ray.data

    shards = [shard for shard in features.listed_shards() if shard["rows"]]
    done = task.out.shards()
    missing = [shard for shard in shards if shard["shard"] not in done]
    score = ScoreShard(features, task.out, W, calibration["temperature"], real.classes)
    facts: dict[str, Any] = {"startup_seconds": 0.0, "peak_memory_bytes": 0}
    if missing:
        rows = ray.data.from_items([{"shard": s["shard"], "file": s["file"]} for s in missing])
        results = rows.map(score, **cluster.tasks(task.compute)).iter_rows()
        facts = cluster.follow(results, len(missing), task.progress, started)
    _merge(task.out, shards)
    rows_in_all = sum(shard["rows"] for shard in shards)
    return {**facts, "rows": rows_in_all, "calibration": calibration}


class ScoreShard:
    """Labels one feature shard."""

    def __init__(
        self, features: Artifact, out: Artifact, W: np.ndarray, temperature: float, classes: list[str]
    ) -> None:
        self.features, self.out, self.W = features, out, W
        self.temperature, self.classes = temperature, np.array(classes)

    @cluster.naming_shard
    def __call__(self, shard: dict[str, Any]) -> dict[str, Any]:
        """Publishes the shard's pseudo-labels."""
        started = time.perf_counter()
        table = pq.read_table(self.features.local_file(shard["file"]))
        raw = np.stack(table["feature"].to_numpy())
        probs = softmax(logits(row_normalise(raw), self.W) / self.temperature, axis=1)
        best = np.argsort(-probs, axis=1, kind="stable")[:, :TOP]
        scores = np.take_along_axis(probs, best, axis=1)
        labelled = pa.table(
            {
                "id": table["id"],
                "split": pa.array([shard["shard"].rsplit("-", 1)[0]] * len(best)),
                "label": pa.array(best[:, 0].astype(np.int32)),
                "class_name": pa.array(self.classes[best[:, 0]]),
                "confidence": pa.array(scores[:, 0]),
                "top5": pa.array(best.astype(np.int32).tolist(), pa.list_(pa.int32())),
                "top5_confidence": pa.array(scores.tolist(), pa.list_(pa.float32())),
            }
        )

        def write(path: Path) -> None:
            pq.write_table(labelled, path)

        self.out.publish_shard(shard["shard"], ".parquet", len(best), write)
        return {"seconds": time.perf_counter() - started, "peak_memory_bytes": cluster.peak_memory()}


def _calibrate(W: np.ndarray, real: RealRows) -> dict[str, Any]:
    """The temperature fitted on validation, and the calibration error of the same images before and after."""
    import torch

    from dpt_ray.evaluation.calibration import (
        expected_calibration_error,
        fit_temperature,
        reliability_bins,
    )

    validation = real.validation
    if not len(validation):
        return {"temperature": 1.0, "n": 0}
    decisions = torch.from_numpy(logits(validation.features, W))
    labels = torch.from_numpy(validation.labels)
    temperature = fit_temperature(decisions, labels)
    facts: dict[str, Any] = {"temperature": temperature, "n": len(validation)}
    for when, at in (("before", 1.0), ("after", temperature)):
        probs = (decisions / at).softmax(1)
        bins = reliability_bins(probs, labels)
        filled = zip(bins.confidence.tolist(), bins.accuracy.tolist(), bins.counts.tolist(), strict=True)
        facts[f"ece_{when}"] = expected_calibration_error(probs, labels)
        facts[f"bins_{when}"] = [row for row in filled if row[2]]
    return facts


def _merge(out: Artifact, shards: list[dict[str, Any]]) -> None:
    """One table in shard order, read and written a shard at a time."""
    published = out.shards()
    with out.writing(PSEUDO_LABELS) as path:
        writer: pq.ParquetWriter | None = None
        for shard in shards:
            table = pq.read_table(out.local_file(published[shard["shard"]]["file"]))
            writer = writer or pq.ParquetWriter(path, table.schema)
            writer.write_table(table)
        if writer:
            writer.close()
