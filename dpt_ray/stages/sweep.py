"""sweep: stage 3 and its controls over images per class, real weight and lambda, chosen on validation.

With the controls also the probe of stage 1 over lambda, so that what DPT is held against chooses too.

Trials only read features. Each publishes its classifier under its own settings, so a trial that is
started again, or a sweep that is resumed, finds what is done.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Collection, Mapping
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dpt_ray.cluster import session as cluster
from dpt_ray.config import ConfigError
from dpt_ray.data.rows import ImageRows, RealRows
from dpt_ray.data.units import read_index
from dpt_ray.engine.node import Node, Task
from dpt_ray.engine.progress import POLL, REMOTE_POLL, Reached, following
from dpt_ray.learners.linear_classifier import Rows, logits
from dpt_ray.stages.classifier import accuracy, fit_rows, save_classifier
from dpt_ray.store.artifact import Artifact

TRIALS = "trials.parquet"
Trial = dict[str, Any]
# What is worth knowing of a trial besides where its file lies.
KNOWN = (
    *("method", "images_per_class", "real_weight", "l2"),
    *("validation_top1", "validation_nll", "objective", "iterations", "labelled"),
)


def make(task: Task) -> dict[str, Any]:
    """Publishes the table of trials and, for each method, the classifier that validation prefers."""
    from dpt_ray.learners.linear_probe import Fit

    check_choice(task, task.inputs["index"])
    real = RealRows(task.inputs["index"], task.inputs["features"], ("validation",))
    trials = grid(task.settings, task.inputs, choosing=bool(len(real.validation)))
    done = task.out.shards()
    missing = [trial for trial in trials if trial_key(trial) not in done]
    facts: dict[str, Any] = {"startup_seconds": 0.0}
    if missing:
        facts = _run(task, missing, len(trials))
    published = task.out.shards()
    results = [published[trial_key(trial)] for trial in trials]
    chosen = {}
    for method in dict.fromkeys(trial["method"] for trial in trials):
        best = choose([result for result in results if result["method"] == method])
        chosen[method] = best
        found = Fit(_weights(task.out, best), best["objective"], 0.0, best["iterations"])
        save_classifier(task.out, f"{method}/", found, real.classes, {key: best[key] for key in KNOWN})
    rows = [{key: result[key] for key in KNOWN} for result in results]
    for row in rows:
        row["real_weight"] = str(row["real_weight"])  # a column has one type
    with task.out.writing(TRIALS) as path:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return {
        **facts,
        "rows": len(trials),
        "trials": results,
        "chosen": chosen,
        "n_validation": len(real.validation),
    }


def check_choice(task: Task | Node, index: Artifact) -> None:
    """Raises ConfigError where a method has several settings, and no image to choose among them on."""
    trials = grid(task.settings, task.inputs, choosing=False)
    several = max(Counter(trial["method"] for trial in trials).values())
    table = read_index(index, ["split", "label"])
    known = pc.and_(pc.equal(table["split"], "validation"), pc.is_valid(table["label"]))
    if several > 1 and not pc.any(known).as_py():
        raise ConfigError(
            f"sweep: there are no labelled validation images to choose among {several} settings on; set "
            "data.validation to how many to draw from the labelled training images, or remove the sweep "
            "section"
        )


def grid(settings: Mapping[str, Any], inputs: Collection[str], *, choosing: bool) -> list[Trial]:
    """Every trial of every method; the probe and self-training have no images per class.

    Without validation images the probe has no trials: its one setting is stage 1's.
    """
    trials: list[Trial] = [
        {"method": "probe", "images_per_class": None, "real_weight": 1.0, "l2": l2}
        for l2 in (settings.get("probe_l2", ()) if choosing else ())
    ]
    for method in ("generated", "augmented", "self_training"):
        if method not in inputs:
            continue
        counts = [None] if method == "self_training" else settings["images_per_class"]
        for count, weight, l2 in product(counts, settings["real_weight"], settings["l2"]):
            trials.append({"method": method, "images_per_class": count, "real_weight": weight, "l2": l2})
    return trials


def trial_key(trial: Trial) -> str:
    """The name of a trial's shard."""
    return "{method}-k{images_per_class}-w{real_weight}-l{l2:g}".format(**trial)


def choose(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The highest validation accuracy; ties (validation is small) go to the lower cross-entropy.

    Without validation images there is one setting only (see `check_choice`).
    """
    if results[0]["validation_top1"] is None:
        return results[0]
    return min(results, key=lambda result: (-result["validation_top1"], result["validation_nll"]))


def _run(task: Task, trials: list[Trial], total: int) -> dict[str, Any]:
    started = time.time()
    cluster.connect(task.compute)
    from ray import tune

    reader = Reader(dict(task.inputs))
    out, threads = task.out, cluster.threads(task.compute, task.compute.concurrent_trials)

    def trainable(config: dict[str, Any]) -> None:
        tune.report(run_trial(config["trial"], reader, out, threads))

    def done() -> Reached:
        return Reached(len(task.out.shards()))

    with (
        tempfile.TemporaryDirectory(prefix="dpt_ray-tune-") as scratch,
        following(task.progress, total, "settings", done, POLL if out.is_local else REMOTE_POLL),
    ):
        found = tune.Tuner(
            tune.with_resources(trainable, {"cpu": task.compute.actor_cpus}),
            param_space={"trial": tune.grid_search(trials)},
            tune_config=tune.TuneConfig(
                max_concurrent_trials=task.compute.concurrent_trials, reuse_actors=True
            ),
            run_config=tune.RunConfig(name=task.node.digest, storage_path=scratch, verbose=0),
        ).fit()
    if found.errors:
        raise RuntimeError(f"{len(found.errors)} trials failed") from found.errors[0]
    first = min(result.metrics["started"] for result in found if result.metrics)
    return {"startup_seconds": round(first - started, 3)}


class Reader:
    """The features a trial reads, once for each process."""

    def __init__(self, inputs: dict[str, Artifact]) -> None:
        self.inputs = inputs

    def read(self, trial: Trial) -> tuple[RealRows, Rows, Rows | None]:
        """(all real rows, the labelled ones, the further ones of the trial's method if it has any)."""
        self_training = trial["method"] == "self_training"
        splits = ("train", "validation") if self_training else ("validation",)
        real = _real(self.inputs["index"], self.inputs["features"], splits, self.inputs["labels"])
        labelled = real.labelled(self.inputs["labels"])
        if self_training:
            return real, labelled, real.pseudo_labelled(self.inputs["self_training"])
        if trial["method"] == "probe":
            return real, labelled, None
        images = _images(self.inputs[trial["method"]])
        return real, labelled, images.first(trial["images_per_class"])


@lru_cache(maxsize=1)
def _real(index: Artifact, features: Artifact, splits: tuple[str, ...], labels: Artifact) -> RealRows:
    return RealRows(index, features, splits, labels)


@lru_cache(maxsize=2)
def _images(features: Artifact) -> ImageRows:
    return ImageRows(features)


def run_trial(trial: Trial, reader: Reader, out: Artifact, threads: int) -> dict[str, Any]:
    """Fits one trial and publishes its classifier; returns what Tune shows."""
    import torch

    started = time.time()
    torch.set_num_threads(threads)
    real, labelled, more = reader.read(trial)
    found = fit_rows(labelled, more, trial["real_weight"], len(real.classes), trial)
    facts = {
        **trial,
        "validation_top1": accuracy(found.weights, real.validation),
        "validation_nll": _nll(found.weights, real.validation),
        "objective": found.objective,
        "iterations": found.iterations,
        "labelled": len(labelled),
    }

    def write(path: Path) -> None:
        from safetensors.numpy import save_file

        save_file({"weight": found.weights}, path)

    rows = len(labelled) + (len(more) if more else 0)
    out.publish_shard(trial_key(trial), ".safetensors", rows, write, **facts)
    return {"started": started, "validation_top1": facts["validation_top1"]}


def _nll(W: np.ndarray, rows: Rows) -> float | None:
    from scipy.special import log_softmax

    if not len(rows):
        return None
    scores = log_softmax(logits(rows.features, W).astype(np.float64), axis=1)
    return float(-scores[np.arange(len(rows)), rows.labels].mean())


def _weights(out: Artifact, result: dict[str, Any]) -> np.ndarray:
    from safetensors.numpy import load_file

    return load_file(out.local_file(result["file"]))["weight"]
