"""pseudo-label: a label, a confidence and the five best classes for every image.

Confidences come from row-normalised features at a temperature fitted on validation (Guo et al. 2017,
arXiv 1706.04599). DPT's public code scores unnormalised features, which gives the same labels and
saturated probabilities.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dpt_ray.cluster.units import Result, naming_shard, peak_memory, run_tasks
from dpt_ray.data.rows import PSEUDO_LABELS_FILE, RealRows, row_normalise
from dpt_ray.data.shards import read_feature_shard
from dpt_ray.engine.node import NoSettings, RunsOn, Stage, Task, one_of, reads
from dpt_ray.learners.linear_classifier import load_classifier, logits
from dpt_ray.store.artifact import Artifact
from dpt_ray.store.records import Calibration, Facts, Shard

TOP = 5


class Scored(TypedDict):
    """A work unit: a shard of features, whose images are of one split."""

    shard: str
    split: str
    features: Shard


class PseudoLabels(Stage[NoSettings]):
    """One Parquet table with a row for each image that has features."""

    artifact = "pseudo_labels"
    inputs = reads(
        {"index": one_of("index"), "features": one_of("features"), "classifier": one_of("classifier")}
    )
    runs_on = RunsOn.READERS

    @classmethod
    def make(cls, task: Task[NoSettings]) -> Facts:
        """Label shard by shard, then merge the shards into `pseudo_labels.parquet`."""
        features, index = task.inputs["features"], task.inputs["index"]
        W = load_classifier(task.inputs["classifier"])
        real = RealRows(index, features, ("validation",))
        calibration = _calibrate(W, real)
        shards = [shard for shard in features.listed_shards() if shard["rows"]]
        done = task.out.shards()
        splits = {unit["shard"]: unit["split"] for unit in index.manifest["units"]}
        missing: list[Scored] = [
            {"shard": shard["shard"], "split": splits[shard["shard"]], "features": shard}
            for shard in shards
            if shard["shard"] not in done
        ]
        facts: Facts = {"startup_seconds": 0.0, "peak_memory_bytes": 0}
        if missing:
            score = ScoreShard(features, task.out, W, calibration["temperature"], real.classes)
            images = sum(unit["features"]["rows"] for unit in missing)
            facts = run_tasks(missing, lambda threads: score, task.compute, task.progress, images)
        _merge(task.out, shards)
        return {**facts, "rows": sum(shard["rows"] for shard in shards), "calibration": calibration}


class ScoreShard:
    """Labels one shard of features."""

    def __init__(
        self, features: Artifact, out: Artifact, W: np.ndarray, temperature: float, classes: Sequence[str]
    ) -> None:
        self.features, self.out, self.W = features, out, W
        self.temperature, self.classes = temperature, np.array(classes)

    @naming_shard
    def __call__(self, unit: Scored) -> Result:
        """Publish the shard's pseudo-labels."""
        from scipy.special import softmax

        started = time.perf_counter()
        ids, raw = read_feature_shard(self.features, unit["features"])
        probs = softmax(logits(row_normalise(raw), self.W) / self.temperature, axis=1)
        best = np.argsort(-probs, axis=1, kind="stable")[:, :TOP]
        scores = np.take_along_axis(probs, best, axis=1)
        labelled = pa.table(
            {
                "id": ids,
                "split": pa.array([unit["split"]] * len(best)),
                "label": pa.array(best[:, 0].astype(np.int32)),
                "class_name": pa.array(self.classes[best[:, 0]]),
                "confidence": pa.array(scores[:, 0]),
                "top5": pa.array(best.astype(np.int32).tolist(), pa.list_(pa.int32())),
                "top5_confidence": pa.array(scores.tolist(), pa.list_(pa.float32())),
            }
        )

        def write(path: Path) -> None:
            pq.write_table(labelled, path)

        self.out.publish_shard(unit["shard"], ".parquet", len(best), write)
        return {
            "seconds": time.perf_counter() - started,
            "peak_memory_bytes": peak_memory(),
            "images": len(best),
        }


def _calibrate(W: np.ndarray, real: RealRows) -> Calibration:
    """Return the temperature fitted on validation, and the calibration error before and after it."""
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

    def quality(at: float) -> tuple[float, list[tuple[float, float, int]]]:
        probs = (decisions / at).softmax(1)
        bins = reliability_bins(probs, labels)
        filled = zip(bins.confidence.tolist(), bins.accuracy.tolist(), bins.counts.tolist(), strict=True)
        return expected_calibration_error(probs, labels), [row for row in filled if row[2]]

    ece_before, bins_before = quality(1.0)
    ece_after, bins_after = quality(temperature)
    return {
        "temperature": temperature,
        "n": len(validation),
        "ece_before": ece_before,
        "bins_before": bins_before,
        "ece_after": ece_after,
        "bins_after": bins_after,
    }


def _merge(out: Artifact, shards: Sequence[Shard]) -> None:
    """Concatenate the shards into one table, holding one shard at a time."""
    published = out.shards()
    with out.writing(PSEUDO_LABELS_FILE) as path:
        writer: pq.ParquetWriter | None = None
        for shard in shards:
            table = pq.read_table(out.local_file(published[shard["shard"]]["file"]))
            writer = writer or pq.ParquetWriter(path, table.schema)
            writer.write_table(table)
        if writer:
            writer.close()
