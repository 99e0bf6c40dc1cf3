"""sweep: stage 3 and its controls over images per class, real weight and lambda, chosen on validation.

With the controls the probe of stage 1 is swept over lambda too, so that the baseline is also tuned.

A setting is judged by its mean over the seeds that images are made with; the classifier of the first one is
published as the best.

Trials only read features. Each publishes its classifier under the name of its settings, so a restarted
trial or a resumed sweep finds what is done.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Annotated, NotRequired, TypedDict, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field

from dpt_ray.cluster.trials import run_trials
from dpt_ray.config import ConfigError
from dpt_ray.config.hashing import HashedIfSet, NotHashed
from dpt_ray.config.sections import Positive
from dpt_ray.config.sweep import Sweep as SweepSection
from dpt_ray.config.sweep import set_name
from dpt_ray.config.values import Seed
from dpt_ray.data.rows import ImageRows, RealRows, Rows, features_bytes
from dpt_ray.data.units import read_index
from dpt_ray.engine.differences import same_in
from dpt_ray.engine.node import Node, RunsOn, Stage, Task, one_of, reads
from dpt_ray.evaluation.swept import SETTING, best, by_setting
from dpt_ray.learners.agreement import agreeing
from dpt_ray.learners.linear_classifier import (
    accuracy,
    load_weights,
    negative_log_likelihood,
    save_classifier,
    save_weights,
)
from dpt_ray.store.artifact import Artifact
from dpt_ray.store.records import Facts, Shard, TrialShard

TRIALS = "trials.parquet"
KEPT = 2  # sets of images whose features a process keeps
# Methods that add images: the inputs with the features and with the classes of these images.
IMAGES = {
    "generated": ("sample_features", "samples"),
    "augmented": ("augmented_features", "augmented"),
}
# The settings and results of a trial, without the fields of its shard.
KNOWN = (
    *(*SETTING, "seed"),
    *("validation_top1", "validation_nll", "objective", "iterations", "labelled"),
)


class SweepSettings(SweepSection):
    """The grid of stage 3 and, with the controls, of the probe's penalty.

    `further_seeds` are those besides `generate.seed`; the inputs made with them are hashed.
    """

    probe_l2: Annotated[
        Annotated[tuple[Positive, ...], Field(strict=False, min_length=1)] | None, HashedIfSet
    ] = None
    further_seeds: Annotated[tuple[Seed, ...], NotHashed] = ()


class Trial(TypedDict):
    """A setting of a method with a seed; the probe and self-training have no images per class.

    `min_confidence` and `samples` are of generated images alone: left out where all of them are used, and
    where they are those of the run's `generate` section and not another set. `seed` is left out where it is
    the first one, `generate.seed`.
    """

    method: str
    images_per_class: int | None
    real_weight: float | str
    l2: float
    min_confidence: NotRequired[float]
    samples: NotRequired[str]
    seed: NotRequired[int]


class Sweep(Stage[SweepSettings]):
    """The table of trials, and for each method its best classifier on validation."""

    artifact = "sweep"
    settings = SweepSettings
    inputs = reads(
        {
            "index": one_of("index"),
            "features": one_of("features"),
            "labels": one_of("labels"),
            # None where no images are generated; then the controls are all there is.
            # Of further sets of images, made otherwise or with another seed, there may be several.
            "sample_features": one_of("features", hashed_as="generated", optional=True, several=True),
            "augmented_features": one_of("features", hashed_as="augmented", optional=True, several=True),
            "pseudo_labels": one_of("pseudo_labels", "rung", hashed_as="self_training", optional=True),
            "samples": one_of("samples", hashed=False, optional=True, several=True),
            "augmented": one_of("augmented", hashed=False, optional=True, several=True),
            # With `min_confidence`: the classifier that decides, and the temperature of its confidences.
            "judge": one_of("classifier", "rung", optional=True),
            "judge_labels": one_of("pseudo_labels", "rung", optional=True),
        }
    )
    runs_on = RunsOn.TRIALS

    @classmethod
    def make(cls, task: Task[SweepSettings]) -> Facts:
        """Run the missing trials and choose the best of each method."""
        check_choice(task, task.inputs["index"])
        real = RealRows(task.inputs["index"], task.inputs["features"], ("validation",))
        trials = grid(task.settings, task.inputs, choosing=bool(len(real.validation)))
        startup = _run(task, trials)
        published = cast(dict[str, TrialShard], task.out.shards())
        results = [published[trial_key(trial)] for trial in trials]
        chosen = {}
        for method in dict.fromkeys(trial["method"] for trial in trials):
            found = best(result for result in results if result["method"] == method).first
            chosen[method] = found
            weights = load_weights(task.out.local_file(found["file"]))
            save_classifier(task.out, weights, real.classes, _known(found), f"{method}/")
        _write_table(task.out, results)
        if len(real.validation):
            _write_hparams(task.out, results)
        return {
            "startup_seconds": startup,
            "rows": len(trials),
            "trials": results,
            "chosen": chosen,
            "n_validation": len(real.validation),
        }


def check_choice(task: Task[SweepSettings] | Node, index: Artifact) -> None:
    """Raise ConfigError where a method has several trials but there are no labelled validation images."""
    trials = grid(cast(SweepSettings, task.settings), task.inputs, choosing=False)
    several = max(Counter(trial["method"] for trial in trials).values())
    once = max(Counter(trial["method"] for trial in trials if "seed" not in trial).values())
    what = f"{several} settings" if several == once else f"{several} trials"
    table = read_index(index, ["split", "label"])
    known = pc.and_(pc.equal(table["split"], "validation"), pc.is_valid(table["label"]))
    if several > 1 and not pc.any(known).as_py():
        raise ConfigError(
            f"sweep: {what} but no labelled validation images to select with; set "
            "data.validation to how many to draw from the labelled training images, or remove the sweep "
            "section"
        )


def grid(settings: SweepSettings, inputs: Collection[str], *, choosing: bool) -> list[Trial]:
    """Return the trials of the methods whose inputs exist: all of their grids, or `settings.trials` of each.

    Settings are drawn, not seeds: each has all of them. `inputs` are names, those of further sets of images
    among them or not.

    Without validation images (`choosing` false) the probe has no trials: stage 1 has its one setting.
    """
    trials: list[Trial] = [
        {"method": "probe", "images_per_class": None, "real_weight": 1.0, "l2": l2}
        for l2 in (settings.probe_l2 or () if choosing else ())
    ]
    methods = {method: features for method, (features, _) in IMAGES.items()}
    for method, source in {**methods, "self_training": "pseudo_labels"}.items():
        if source not in inputs:
            continue
        counts = [None] if method == "self_training" else settings.images_per_class
        found: list[Trial] = [
            {"method": method, "images_per_class": count, "real_weight": weight, "l2": l2}
            for count, weight, l2 in product(counts, settings.real_weight, settings.l2)
        ]
        found = _of_each_set(found, settings) if method == "generated" else found
        found = _drawn(found, settings.trials)
        trials += found
        for seed in settings.further_seeds if method in IMAGES else ():
            trials += [cast(Trial, {**trial, "seed": seed}) for trial in found]
    return trials


def _drawn(trials: Sequence[Trial], count: int | None) -> list[Trial]:
    """Return `count` of a method's trials, in their order; a larger count adds to those of a smaller one."""
    places = np.random.default_rng(0).permutation(len(trials))[:count]
    return [trials[place] for place in sorted(places)]


def _of_each_set(trials: Sequence[Trial], settings: SweepSettings) -> list[Trial]:
    """Return trials on each set of generated images, with each filter; a set's follow each other."""
    found = []
    sets = ("", *(other.name for other in settings.generate))
    for which, least, trial in product(sets, settings.min_confidence, trials):
        one = trial.copy()
        if least is not None:
            one["min_confidence"] = least
        if which:
            one["samples"] = which
        found.append(one)
    return found


def trial_key(trial: Trial) -> str:
    """Return the name of a trial's shard."""
    name = "{method}-k{images_per_class}-w{real_weight}-l{l2:g}".format(**trial)
    name += f"-c{trial['min_confidence']:g}" if "min_confidence" in trial else ""
    return name + (f"-{images}" if (images := _images_of(trial)) else "")


def _images_of(trial: Trial) -> str:
    """Return the name of the set of images that a trial adds, "" for that of the run."""
    return set_name(trial.get("samples", ""), trial.get("seed"))


def _run(task: Task[SweepSettings], trials: Sequence[Trial]) -> float:
    """Run the trials that neither this nor another sweep has made; return the start-up time in seconds."""
    _take_over(task, trials)
    done = task.out.shards()
    missing = [trial for trial in trials if trial_key(trial) not in done]
    if not missing:
        return 0.0
    inputs, out, limit = dict(task.inputs), task.out, task.settings.max_iterations

    def run(trial: Trial, threads: int) -> dict[str, float | None]:
        return run_trial(trial, inputs, out, threads, limit)

    return run_trials(task, missing, run, len(trials), _held(inputs))


def _held(inputs: Mapping[str, Artifact]) -> int:
    """Return the bytes of features that a process of trials keeps (see `_real` and `_images`)."""
    names = ("sample_features", "augmented_features")
    sets = sorted(features_bytes(found) for key, found in inputs.items() if key.partition(":")[0] in names)
    return sum(sets[-KEPT:]) + (features_bytes(inputs["features"]) if "pseudo_labels" in inputs else 0)


def _take_over(task: Task[SweepSettings], trials: Sequence[Trial]) -> None:
    """Copy the missing trials that a finished sweep with another grid or fewer seeds has made."""
    node, done = task.node, task.out.shards()
    missing = {key: trial for trial in trials if (key := trial_key(trial)) not in done}
    for earlier in same_in(node, task.out.store, "max_iterations") if missing else ():
        manifest = earlier.manifest
        for shard in manifest["trials"]:
            trial = missing.get(shard["shard"])
            if trial is None or any(shard.get(key) != value for key, value in trial.items()):
                continue
            made_from = _made_from(trial)
            if all(_same(manifest["inputs"].get(name), node.references[name], trial) for name in made_from):
                _copy(shard, earlier, task.out)
                del missing[shard["shard"]]


def _same(before: str | None, now: str, trial: Trial) -> bool:
    """Return whether a trial has what it is made from in both: of images that grew it adds the first ones.

    A filter takes the first that pass, which more images may change.
    """
    if before is None or "min_confidence" in trial:
        return before == now
    return before.partition("@")[0] == now.partition("@")[0]


def _made_from(trial: Trial) -> list[str]:
    """Return the names, in the identity, of the inputs that a trial is made from."""
    names = ["index", "features", "labels"]
    if trial["method"] != "probe":  # the others' images are hashed under the names of the methods
        images = _images_of(trial)
        names.append(f"{trial['method']}:{images}" if images else trial["method"])
    return names + (["judge", "judge_labels"] if "min_confidence" in trial else [])


def _copy(shard: TrialShard, source: Artifact, out: Artifact) -> None:
    def write(path: Path) -> None:
        source.fs.get_file(source.path(shard["file"]), str(path))

    facts = {key: value for key, value in shard.items() if key not in Shard.__annotations__}
    out.publish_shard(shard["shard"], ".safetensors", shard["rows"], write, **facts)


def run_trial(
    trial: Trial,
    inputs: Mapping[str, Artifact],
    out: Artifact,
    threads: int,
    max_iterations: int | None = None,
) -> dict[str, float | None]:
    """Fit one trial and publish its classifier; return the metrics for Tune."""
    import torch

    from dpt_ray.learners.linear_probe import fit_stage

    torch.set_num_threads(threads)
    real, labelled, more = _read(trial, inputs)
    found = fit_stage(labelled, more, trial["real_weight"], len(real.classes), trial["l2"], max_iterations)
    top1 = accuracy(found.weights, real.validation)
    rows = len(labelled) + (len(more) if more else 0)

    def write(path: Path) -> None:
        save_weights(path, found.weights)

    out.publish_shard(
        trial_key(trial),
        ".safetensors",
        rows,
        write,
        **trial,
        validation_top1=top1,
        validation_nll=negative_log_likelihood(found.weights, real.validation),
        objective=found.objective,
        iterations=found.iterations,
        labelled=len(labelled),
    )
    return {"validation_top1": top1}


def _read(trial: Trial, inputs: Mapping[str, Artifact]) -> tuple[RealRows, Rows, Rows | None]:
    """Return the real rows, the labelled rows, and the rows that the method adds (None for the probe)."""
    self_training = trial["method"] == "self_training"
    splits = ("train", "validation") if self_training else ("validation",)
    real = _real(inputs["index"], inputs["features"], splits, inputs["labels"])
    labelled = real.labelled(inputs["labels"])
    if self_training:
        return real, labelled, real.pseudo_labelled(inputs["pseudo_labels"])
    if trial["images_per_class"] is None:
        return real, labelled, None
    which = f":{images}" if (images := _images_of(trial)) else ""
    features, images = (name + which for name in IMAGES[trial["method"]])
    rows = _images(inputs[features], inputs[images])
    return real, labelled, agreeing(rows, inputs, trial["images_per_class"], trial.get("min_confidence"))


# Cached: features are read once per process.
@lru_cache(maxsize=1)
def _real(index: Artifact, features: Artifact, splits: tuple[str, ...], labels: Artifact) -> RealRows:
    return RealRows(index, features, splits, labels)


@lru_cache(maxsize=KEPT)
def _images(features: Artifact, images: Artifact) -> ImageRows:
    return ImageRows(features, images)


def _known(result: TrialShard) -> dict[str, object]:
    return {key: value for key, value in result.items() if key in KNOWN}


def _write_table(out: Artifact, results: Sequence[TrialShard]) -> None:
    """Publish the settings and results of all trials as Parquet, with weights as text ("balanced")."""
    columns = [key for key in KNOWN if any(key in result for result in results)]
    rows = [
        {key: result.get(key) for key in columns} | {"real_weight": str(result["real_weight"])}
        for result in results
    ]
    with out.writing(TRIALS) as path:
        pq.write_table(pa.Table.from_pylist(rows), path)


def _write_hparams(out: Artifact, results: Sequence[TrialShard]) -> None:
    """Publish settings and results of all trials for TensorBoard's tab HPARAMS."""
    from tensorboardX import SummaryWriter

    def write(folder: Path) -> None:
        writer = SummaryWriter(str(folder), write_to_disk=True)
        for setting in by_setting(results):
            over_seeds = {"mean_top1": setting.top1, "mean_top1_stderr": setting.stderr}
            for result in setting.trials:
                known = _known(result)
                found = {name: known.pop(name) for name in ("validation_top1", "validation_nll")}
                found |= over_seeds if setting.stderr is not None else {}
                settings = {key: "none" if value is None else value for key, value in known.items()}
                writer.add_hparams(settings, found, name=result["shard"])
        writer.close()

    out.publish_files(write, "tensorboard/")
