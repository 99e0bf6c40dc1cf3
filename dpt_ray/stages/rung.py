"""rung: a rung of the ladder of stage 1: a classifier, and its pseudo-label for every image."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dpt_ray.cluster.fits import run_fit
from dpt_ray.cluster.session import threads
from dpt_ray.config import ConfigError
from dpt_ray.config.hashing import HashedIfSet, Settings
from dpt_ray.config.ladder import ChooseOn, Prior, RungName
from dpt_ray.config.sections import Positive
from dpt_ray.data.graph import read_graph
from dpt_ray.data.rows import LABELS_FILE, PSEUDO_LABELS_FILE, RealRows, features_bytes
from dpt_ray.data.shards import read_feature_shard
from dpt_ray.engine.node import RunsOn, Stage, Task, one_of, reads
from dpt_ray.learners.linear_classifier import accuracy, negative_log_likelihood, save_classifier
from dpt_ray.learners.pseudo_table import calibrate, pseudo_label_table
from dpt_ray.store.artifact import Artifact
from dpt_ray.store.records import Facts

if TYPE_CHECKING:
    from scipy.sparse import csr_array

    from dpt_ray.learners.ladder import Images


class RungSettings(Settings):
    """The method, the l2 of the probe that it starts from, its prior, and what its setting is chosen on."""

    method: RungName
    probe_l2: Positive
    prior: Prior = "uniform"
    choose_on: Annotated[ChooseOn, HashedIfSet] = "validation"


class LadderRung(Stage[RungSettings]):
    """A classifier's folder and `pseudo_labels.parquet`, as those of the classifier and pseudo_labels."""

    artifact = "rung"
    settings = RungSettings
    inputs = reads(
        {
            "index": one_of("index"),
            "features": one_of("features"),
            "labels": one_of("labels"),
            "graph": one_of("graph", optional=True),  # of the method propagation
        }
    )

    runs_on = RunsOn.FIT

    @classmethod
    def version(cls, settings: RungSettings) -> int:
        """Return the version, higher where a mistake was mended.

        Propagation gave images that no label reaches the first class (2), and did not reach all that it
        could (3); the balance overflowed, and gave all images the first class; an estimated prior had
        classes with nothing.
        """
        version = {"propagation": 4, "balanced_rounds": 3}.get(settings.method, 2)
        return version + (settings.prior == "estimated")

    @classmethod
    def make(cls, task: Task[RungSettings]) -> Facts:
        """Fit, choose, calibrate and label. Raises ConfigError for a prior or graph that does not fit."""
        check_ladder(task.settings.prior, task.inputs["index"], task.inputs["labels"])
        return run_fit(task, fit_rung, _held(task.inputs))


def _held(inputs: Mapping[str, Artifact]) -> int:
    """Return the bytes that a rung holds: features, two sets of scores, the graph while it is made.

    docs/ladder.md names them.
    """
    features = inputs["features"]
    rows, classes = features.manifest["rows"], inputs["index"].manifest["classes"]
    written = sum(shard["bytes"] for shard in inputs["graph"].listed_shards()) if "graph" in inputs else 0
    # Of 8 bytes a neighbour in its files, 32 while it is made.
    return features_bytes(features) + 8 * rows * classes + 4 * written


def fit_rung(task: Task[RungSettings]) -> Facts:
    """Publish a rung."""
    import torch

    from dpt_ray.learners.ladder import Rung, climb

    torch.set_num_threads(threads(task.compute))
    settings, labels = task.settings, task.inputs["labels"]
    real = RealRows(task.inputs["index"], task.inputs["features"], ("train", "validation"), labels)
    rung = Rung(settings.method, settings.probe_l2, settings.prior)
    images = _images(task, real)
    judges = real.judges(settings.choose_on)
    chosen = climb(rung, images, judges, lambda a, b: task.progress(a, b, "passes"))
    if chosen.on == "none":
        logging.getLogger("dpt_ray").warning(
            "%s: no validation images to choose on, and a class with one label: nothing can be chosen "
            "or calibrated, the default setting %g is taken",
            task.name,
            chosen.setting,
        )
    calibration = calibrate(chosen.decisions, chosen.labels)
    facts: Facts = {
        "labelled": len(images.labels),
        "n_validation": len(real.validation),
        "validation_top1": accuracy(chosen.weights, real.validation),
        "validation_nll": negative_log_likelihood(chosen.weights, real.validation),
        "rung": {
            "method": settings.method,
            "setting": chosen.setting,
            "chosen_on": chosen.on,
            "top1": chosen.top1,
            "stderr": chosen.stderr,
            "n": len(chosen.labels),
        },
    }
    save_classifier(task.out, chosen.weights, real.classes, facts)
    rows = _label(task, chosen.weights, calibration["temperature"], real.classes)
    return {**facts, "rows": rows, "calibration": calibration}


def check_ladder(prior: Prior, index: Artifact, labels: Artifact) -> None:
    """Raise ConfigError, naming them, for classes without a label, and for a prior of another length."""
    classes = index.read_json("classes.json")
    if not isinstance(prior, str) and len(prior) != len(classes):
        raise ConfigError(
            f"ladder.prior: {len(prior)} shares, and there are {len(classes)} classes: give one for each, in "
            "the order of their names"
        )
    given = set(pq.read_table(labels.local_file(LABELS_FILE), columns=["label"])["label"].to_pylist())
    if lost := [name for label, name in enumerate(classes) if label not in given]:
        raise ConfigError(
            f"labels: no label of class {', '.join(lost[:5])} ({len(lost)} such classes), and the ladder "
            "needs one of each: label an image of it, or leave the ladder section out"
        )


def _images(task: Task[RungSettings], real: RealRows) -> Images:
    """Return the training images, in the order of the graph where there is one."""
    from dpt_ray.learners.ladder import Images

    labelled = real.labelled(task.inputs["labels"])
    train, S = np.flatnonzero(pc.equal(real.split, "train").to_numpy(zero_copy_only=False)), None
    if "graph" in task.inputs:
        train, S = _graph_of(task, real)
    elif task.settings.method == "propagation":
        raise TypeError(f"{task.name}: the method propagation needs the input graph")
    place = np.full(len(real.ids), -1)
    place[train] = np.arange(len(train))
    assert labelled.index is not None  # rows joined by id
    return Images(real.features, train, place[labelled.index], labelled.labels, len(real.classes), S)


def _graph_of(task: Task[RungSettings], real: RealRows) -> tuple[np.ndarray, csr_array]:
    """Return the rows of the graph's images, and S. Raises ConfigError for a graph of other features."""
    from dpt_ray.learners.propagation import affinity

    graph = task.inputs["graph"]
    made_of, wanted = graph.manifest["inputs"]["features"], task.node.references["features"]
    if made_of != wanted:
        raise ConfigError(
            f"graph: {graph.uri} is of {made_of}, and the features here are {wanted}, of another encoder or "
            "other images: make the graph of these"
        )
    ids, neighbours, cosines = read_graph(graph)
    return pc.index_in(ids, real.ids).to_numpy(), affinity(neighbours, cosines)


def _label(task: Task[RungSettings], W: np.ndarray, temperature: float, classes: list[str]) -> int:
    """Publish the pseudo-labels, a shard of features at a time; return their number."""
    features = task.inputs["features"]
    splits = {unit["shard"]: unit["split"] for unit in task.inputs["index"].manifest["units"]}
    rows = 0
    with task.out.writing(PSEUDO_LABELS_FILE) as path:
        writer: pq.ParquetWriter | None = None
        for shard in features.listed_shards():
            if shard["rows"]:
                ids, raw = read_feature_shard(features, shard)
                table = pseudo_label_table(ids, splits[shard["shard"]], raw, W, temperature, classes)
                writer = writer or pq.ParquetWriter(path, table.schema)
                writer.write_table(table)
                rows += table.num_rows
        if writer:
            writer.close()
    return rows
