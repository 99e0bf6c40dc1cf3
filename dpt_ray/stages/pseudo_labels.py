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
import pyarrow.parquet as pq

from dpt_ray.cluster.units import Result, peak_memory, run_tasks, unit_call
from dpt_ray.data.rows import PSEUDO_LABELS_FILE, RealRows
from dpt_ray.data.shards import read_feature_shard
from dpt_ray.engine.node import NoSettings, RunsOn, Stage, Task, one_of, reads
from dpt_ray.learners.linear_classifier import load_classifier, logits
from dpt_ray.learners.pseudo_table import calibrate, pseudo_label_table
from dpt_ray.store.artifact import Artifact
from dpt_ray.store.records import Facts, Shard


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
        calibration = calibrate(logits(real.validation.features, W), real.validation.labels)
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
        self.temperature, self.classes = temperature, list(classes)

    @unit_call
    def __call__(self, unit: Scored) -> Result:
        """Publish the shard's pseudo-labels."""
        started = time.perf_counter()
        ids, raw = read_feature_shard(self.features, unit["features"])
        labelled = pseudo_label_table(ids, unit["split"], raw, self.W, self.temperature, self.classes)

        def write(path: Path) -> None:
            pq.write_table(labelled, path)

        self.out.publish_shard(unit["shard"], ".parquet", labelled.num_rows, write)
        return {
            "seconds": time.perf_counter() - started,
            "peak_memory_bytes": peak_memory(),
            "images": labelled.num_rows,
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
