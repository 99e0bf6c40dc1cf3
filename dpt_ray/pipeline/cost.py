"""The cost of a run, computed before it starts: rows, bytes, floating-point operations, time.

A multiply-add counts as two operations. Costs without a formula are None.
"""

from __future__ import annotations

from collections.abc import Mapping

from dpt_ray.config import Config
from dpt_ray.config.sweep import set_name
from dpt_ray.config.training import NetworkTraining, SelfSupervised
from dpt_ray.data.class_ranges import made_per_class
from dpt_ray.pipeline.network_cost import (
    Cost,
    EncoderCost,
    autoencoder_flops,
    denoiser_flops,
    known_sum,
    latents,
    pixel_bytes,
    times,
)
from dpt_ray.pipeline.speed import FitShape, Rates
from dpt_ray.pipeline.stage_settings import sweep_settings
from dpt_ray.stages.inception_statistics import KEPT_FEATURES, PART
from dpt_ray.stages.sweep import grid

INCEPTION = 11.4e9  # at 299 pixels
# Passes over the rows of a fit: the mean by rows of the digits' 32 trials, which took 33 to 404 iterations.
FIT_PASSES = 150
# Of the ladder (benchmarks/ladder.py): passes of a rung's fits with all its penalties together, of which the
# large ones take few; products of the propagation, which waits for memory: an operation counts as four.
RUNG_PASSES, CG_ITERATIONS, SPARSE = 140, 60, 4
GENERATED_PASSES = RUNG_PASSES / 4  # of a fit on generated features, of which there is one for each penalty
INCEPTION_BYTES = 8 * (2048**2 + 2023**2)  # the two co-moments of a part, float64


def costs(config: Config, images: Mapping[str, int] | None, classes: int | None) -> dict[str, Cost]:
    """Return the cost of the stages that process images, by node name in the order of the run.

    `images` counts the images of each split; None where unknown, as `classes`. Sizes of generated images
    are those before compression, an upper bound.
    """
    everything, train = (sum(images.values()), images.get("train", 0)) if images else (None, None)
    each = made_per_class(config.generate.images_per_class, config.generate.indices_per_shard)
    generated = classes * each if classes else None
    features, found = EncoderCost.of(config), dict[str, Cost]()
    if config.pretrain and config.encoder.kind == "pretrain":
        found["encoder"] = _pretraining(config.pretrain, train, features.conv, _views(config.pretrain))
    found["features"] = features.cost(everything)
    if config.generates_images:
        found["moments"] = _moments(config, train)
    if config.trains_learner:
        found |= _learner("learner", config, images, features)
    if config.ladder:
        found |= _ladder(config, images, features.dim, classes)
    if config.generates_features:
        found |= _pilot(config, images, features.dim, classes)
    if config.generates_images:
        found |= _second_stage(config, train, generated, features)
    if not config.generates_images or config.diffusion.condition != "none":
        if config.generates_images:
            found["sample_features"] = features.cost(generated)
            for other in config.other_samples:
                found[f"sample_features:{other.name}"] = features.cost(generated)
            found["retrained"] = _retrained(config, classes, features.dim)
            if config.trains_learner:
                found |= _learner("retrained_learner", config, images, features)
        if config.evaluate.controls:
            for which in ("", *(f":{set_name('', seed)}" for seed in config.further_seeds)):
                found[f"augmented{which}"] = times(generated, pixel_bytes(config))
                found[f"augmented_features{which}"] = features.cost(generated)
        if sweep_settings(config):
            found["sweep"] = _sweep(config, images, classes, features.dim)
    if config.student:
        found |= _own("student", config.student, config, images)
    if config.generates_images:
        found |= _measuring(config, images, generated)
    return found


def _moments(config: Config, train: int | None) -> Cost:
    encode, _ = autoencoder_flops(config)
    channels, side = latents(config)
    variants = 2 if config.autoencoder.flips else 1
    moment_bytes = 2 * variants * 2 * channels * side**2  # float16; mean and logvar of each variant
    return times(train, moment_bytes, conv=variants * encode)


def _learner(
    name: str, config: Config, images: Mapping[str, int] | None, encoder: EncoderCost
) -> dict[str, Cost]:
    """Return the costs of training an encoder, and of its features of all images."""
    from dpt_ray.learners.encoder_learners import passes

    section, everything = config.semi_supervised, sum(images.values()) if images else None
    assert section is not None  # checked by Config
    forwards = passes(config.classifier.learner, section.unlabelled_ratio)
    seen = float(forwards * section.steps * section.batch_size)
    conv, transformer = (each and seen * each for each in (encoder.conv, encoder.transformer))
    trained = Cost(images.get("train", 0) if images else None, conv=conv, transformer=transformer)
    return {name: trained, f"{name}_features": encoder.cost(everything)}


def _pilot(
    config: Config, images: Mapping[str, int] | None, dim: int | None, classes: int | None
) -> dict[str, Cost]:
    """Return the costs of stages 2 and 3 on features."""
    from dpt_ray.learners.ladder import GENERATED_SHARES
    from dpt_ray.models.feature_denoiser import FeatureDenoiserConfig, flops

    feature, train = config.feature_diffusion, images.get("train", 0) if images else None
    names = ("feature_denoiser", "feature_samples", "generated_features")
    if dim is None or classes is None:
        return dict(zip(names, (Cost(train), Cost(), Cost()), strict=True))
    forward = flops(FeatureDenoiserConfig(dim, feature.width, feature.depth, classes))
    rows = classes * config.features_per_class
    passes = feature.nfe * (1 if feature.guidance == 1 else 2)
    fits = len(GENERATED_SHARES) if (images or {}).get("validation") else 1  # as `from_generated` chooses
    fit = fits * GENERATED_PASSES * 4.0 * rows * dim * classes
    return {
        "feature_denoiser": Cost(train, transformer=3.0 * forward * feature.steps * feature.batch_size),
        "feature_samples": times(rows, 4 * dim, transformer=passes * forward),
        "generated_features": Cost(rows, 4.0 * dim * classes, fit=fit),
    }


def _second_stage(
    config: Config, train: int | None, generated: int | None, encoder: EncoderCost
) -> dict[str, Cost]:
    """Return the costs of stage 2 on images; with `resample` of all attempts at each, the most it can be."""
    forward, found = denoiser_flops(config), {}
    _, decode = autoencoder_flops(config)
    if not config.diffusion.weights:
        # A backward pass costs two forward passes.
        batches = config.diffusion.steps * config.diffusion.batch_size
        found["denoiser"] = Cost(train, transformer=3 * forward * batches)
    others = {f"samples:{other.name}": other.changes for other in config.other_samples}
    for name, changes in {"samples": {}, **others}.items():
        sampled = config.generate.model_copy(update=changes)
        passes = sampled.nfe * (1 if sampled.guidance == 1 else 2)
        tries, judge = (how.attempts, encoder) if (how := sampled.resample) else (1, EncoderCost())
        conv, transformer = decode + (judge.conv or 0), passes * forward + (judge.transformer or 0)
        found[name] = times(generated, pixel_bytes(config), tries * conv, tries * transformer)
    return found


def _measuring(config: Config, images: Mapping[str, int] | None, generated: int | None) -> dict[str, Cost]:
    """Return the costs of the referee and of the metrics of generated images."""
    found: dict[str, Cost] = {}
    if referee := config.evaluate.referee:
        found |= _own("referee", referee, config, images)
        found["referee_sample_features"] = EncoderCost.small(referee, config).cost(generated)
    if config.evaluate.inception:
        measured = min(generated, config.evaluate.images or generated) if generated else None
        found["inception_samples"] = _inception(measured)
        found["inception_reference"] = _inception(images.get("test") if images else None)
    return found


def _own(
    name: str, section: NetworkTraining, config: Config, images: Mapping[str, int] | None
) -> dict[str, Cost]:
    """Return the costs of training a network on one view of each image, and of its features of all images."""
    network, train = EncoderCost.small(section, config), images.get("train", 0) if images else None
    features = network.cost(sum(images.values()) if images else None)
    return {name: _pretraining(section, train, network.conv, views=1), f"{name}_features": features}


def total(found: Mapping[str, Cost]) -> Cost:
    """Return the bytes and operations of all stages, as far as they are known."""
    return Cost(
        bytes=known_sum(*(cost.bytes for cost in found.values())),
        conv=known_sum(*(cost.conv for cost in found.values())),
        transformer=known_sum(*(cost.transformer for cost in found.values())),
        fit=known_sum(*(cost.fit for cost in found.values())),
    )


def total_seconds(found: Mapping[str, Cost], rates: Rates) -> float:
    """Return the total seconds of the stages whose operations are known."""
    return total(found).seconds(rates) or 0.0


def fit_shape(config: Config, images: Mapping[str, int] | None, classes: int | None) -> FitShape | None:
    """Return the shape of the largest fit of stages 1 and 3; None without any or where it is unknown."""
    dim = EncoderCost.of(config).dim
    trials = _trial_rows(config, images, classes)
    if config.ladder and images:
        trials.append(images.get("train", 0))
    if config.retrains and classes:
        trials.append(_retrained_rows(config, classes))
    if config.generates_features and classes:
        trials.append(classes * config.features_per_class)
    return FitShape(max(trials), dim, classes) if trials and dim and classes else None


def _retrained_rows(config: Config, classes: int) -> int:
    return classes * ((config.labels.per_class or 0) + config.retrain.images_per_class)


def _retrained(config: Config, classes: int | None, dim: int | None) -> Cost:
    """Return the cost of stage 3's one configured fit."""
    if not (classes and dim):
        return Cost()
    rows = _retrained_rows(config, classes)
    return Cost(rows, 4 * dim * classes, fit=FIT_PASSES * rows * 4.0 * dim * classes)


def _sweep(config: Config, images: Mapping[str, int] | None, classes: int | None, dim: int | None) -> Cost:
    """Return the cost of the sweep's fits; its rows are trials, its bytes their classifiers."""
    trials = _trial_rows(config, images, classes)
    if not (trials and classes and dim):
        return Cost()
    # A pass has the logits F W^T and the gradient R^T F of n rows: 2 n dim C operations each.
    flops = FIT_PASSES * sum(trials) * 4 * dim * classes
    return Cost(len(trials), len(trials) * 4 * dim * classes, fit=flops)


def _trial_rows(config: Config, images: Mapping[str, int] | None, classes: int | None) -> list[int]:
    """Return the number of rows of each trial's fit; labelled images that a file lists are left out."""
    settings = sweep_settings(config)
    if settings is None or not images or classes is None:
        return []
    inputs = ["sample_features"] if config.generates_images else []
    if config.evaluate.controls:
        inputs += ["augmented_features", "pseudo_labels"]
    labelled, added = classes * (config.labels.per_class or 0), []
    for trial in grid(settings, inputs, choosing=bool(images.get("validation"))):
        if trial["method"] == "self_training":
            added.append(images.get("train", 0))
        else:
            added.append(classes * (trial["images_per_class"] or 0))
    return [labelled + more for more in added]


def _inception(rows: int | None) -> Cost:
    if rows is None:
        return Cost()
    kept = min(rows, KEPT_FEATURES) * 4 * 2048
    return Cost(rows, -(-rows // PART) * INCEPTION_BYTES + kept, rows * INCEPTION)


def _ladder(
    config: Config, images: Mapping[str, int] | None, dim: int | None, classes: int | None
) -> dict[str, Cost]:
    """Return the costs of the graph and of the rungs."""
    from dpt_ray.learners.ladder import MOST_FOLDS, SHARES
    from dpt_ray.learners.self_training import ROUNDS

    assert config.ladder is not None
    wanted, n = config.ladder.rungs, (images or {}).get("train")
    if n is None or dim is None or classes is None:
        return {name: Cost(n) for name in (*(["graph"] if "propagation" in wanted else []), *wanted)}
    # Without validation images each fold of the labels is fitted with every setting, and the best once more.
    on_validation = config.ladder.choose_on == "validation" and (images or {}).get("validation")
    folds = min(MOST_FOLDS, config.labels.per_class or 1)
    passes = 1.0 if on_validation else folds * (folds > 1) + 1 / len(SHARES)
    fit = passes * RUNG_PASSES * 4.0 * n * dim * classes
    edges = 2 * n * config.ladder.neighbours
    spread = passes * CG_ITERATIONS * SPARSE * 2.0 * edges * classes
    found = {
        "graph": Cost(n, 8.0 * n * config.ladder.neighbours, transformer=2.0 * n**2 * dim),
        "tuned_probe": Cost(n),
        "self_training": Cost(n, fit=fit),
        "balanced_self_training": Cost(n, fit=fit),
        "balanced_rounds": Cost(n, fit=ROUNDS * fit),
        "propagation": Cost(n, fit=fit + spread),
    }
    shown = {*wanted, "graph"} if "propagation" in wanted else {*wanted}
    return {name: cost for name, cost in found.items() if name in shown}


def _views(section: SelfSupervised) -> float:
    """Return the encoder's passes, forward and backward, for each image."""
    if section.objective == "simclr":
        return 2
    from dpt_ray.learners.msn import passes

    return passes(masked=section.patch_size is not None)


def _pretraining(section: NetworkTraining, rows: int | None, forward: float | None, views: float) -> Cost:
    assert forward is not None  # known: the network was built here
    return Cost(rows, conv=3 * views * forward * section.steps * section.batch_size)
