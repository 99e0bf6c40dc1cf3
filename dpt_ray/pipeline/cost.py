"""The cost of a run, computed before it starts: rows, bytes, floating-point operations, time.

A multiply-add counts as two operations. Costs without a formula are None.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dpt_ray.config import Config, ConfigError
from dpt_ray.config.sweep import set_name
from dpt_ray.config.training import NetworkTraining, SelfSupervised
from dpt_ray.data.class_ranges import made_per_class
from dpt_ray.pipeline.speed import FitShape, Rates
from dpt_ray.pipeline.stage_settings import sweep_settings
from dpt_ray.stages.inception_statistics import KEPT_FEATURES, PART
from dpt_ray.stages.sweep import grid

# One H200: the dense bfloat16 rate measured with an 8192 matrix product, and the range of the share that
# training code usually reaches (published anchors).
PEAK_FLOPS = 790e12
DATA_SHEET_TFLOPS = 989
LEAST_UTILISATION, UTILISATION = 0.2, 0.4

# By the prefix of the published file's name: operations per image at 224 pixels, and feature length.
MSN = {"vitb4": (0.896e12, 768), "vitl7": (0.723e12, 1024)}
# Stable Diffusion's autoencoder at 256 pixels; proportional to the pixels at other sizes.
KL_ENCODE, KL_DECODE, KL_CHANNELS, KL_FACTOR = 0.273e12, 0.622e12, 4, 8
INCEPTION = 11.4e9  # at 299 pixels
# Passes over the rows of a fit: the mean by rows of the digits' 32 trials, which took 33 to 404 iterations.
FIT_PASSES = 150
# Of the ladder (benchmarks/ladder.py): passes of a rung's fits with all its penalties together, of which the
# large ones take few; products of the propagation, which waits for memory: an operation counts as four.
RUNG_PASSES, CG_ITERATIONS, SPARSE = 140, 60, 4
GENERATED_PASSES = RUNG_PASSES / 4  # of a fit on generated features, of which there is one for each penalty
INCEPTION_BYTES = 8 * (2048**2 + 2023**2)  # the two co-moments of a part, float64


@dataclass(frozen=True)
class Cost:
    """The `rows` of an artifact, its `bytes` on disk and the floating-point operations to make it.

    Operations are split into convolutional networks, transformers, and the fits of the linear classifier
    (double precision, on CPUs), whose rates differ on a machine.
    """

    rows: int | None = None
    bytes: float | None = None
    conv: float | None = None
    transformer: float | None = None
    fit: float | None = None

    @property
    def flops(self) -> float | None:
        """Return all operations."""
        return _sum(self.conv, self.transformer, self.fit)

    @property
    def gpu_hours(self) -> float | None:
        """Return the hours of the networks on one H200 at `UTILISATION` of `PEAK_FLOPS`, the better end."""
        networks = _sum(self.conv, self.transformer)
        return None if networks is None else networks / (UTILISATION * PEAK_FLOPS) / 3600

    def seconds(self, rates: Rates) -> float | None:
        """Return the seconds on a machine with these rates, as far as these are known."""
        parts = ((self.conv, rates.conv), (self.transformer, rates.transformer), (self.fit, rates.fit))
        return _sum(*(flops / rate if rate and flops is not None else None for flops, rate in parts))


def costs(config: Config, images: Mapping[str, int] | None, classes: int | None) -> dict[str, Cost]:
    """Return the cost of the stages that process images, by node name in the order of the run.

    `images` counts the images of each split; None where unknown, as `classes`. Sizes of generated images
    are those before compression, an upper bound.
    """
    everything, train = (sum(images.values()), images.get("train", 0)) if images else (None, None)
    each = made_per_class(config.generate.images_per_class, config.generate.indices_per_shard)
    generated = classes * each if classes else None
    features, found = _Encoder.of(config), dict[str, Cost]()
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
        found |= _pilot(config, train, features.dim, classes)
    if config.generates_images:
        found |= _second_stage(config, train, generated, features)
    if not config.generates_images or config.diffusion.condition != "none":
        if config.generates_images:
            found["sample_features"] = features.cost(generated)
            for other in config.other_samples:
                found[f"sample_features:{other.name}"] = features.cost(generated)
            if config.trains_learner:
                found |= _learner("retrained_learner", config, images, features)
        if config.evaluate.controls:
            for which in ("", *(f":{set_name('', seed)}" for seed in config.further_seeds)):
                found[f"augmented{which}"] = _times(generated, _pixel_bytes(config))
                found[f"augmented_features{which}"] = features.cost(generated)
        if sweep_settings(config):
            found["sweep"] = _sweep(config, images, classes, features.dim)
    if config.student:
        found |= _own("student", config.student, config, images)
    if config.generates_images:
        found |= _measuring(config, images, generated)
    return found


def _moments(config: Config, train: int | None) -> Cost:
    encode, _ = _autoencoder_flops(config)
    channels, side = _latents(config)
    variants = 2 if config.autoencoder.flips else 1
    moment_bytes = 2 * variants * 2 * channels * side**2  # float16; mean and logvar of each variant
    return _times(train, moment_bytes, conv=variants * encode)


def _learner(
    name: str, config: Config, images: Mapping[str, int] | None, encoder: _Encoder
) -> dict[str, Cost]:
    """Return the costs of training an encoder, and of its features of all images."""
    from dpt_ray.learners.encoder_learners import passes

    section, everything = config.semi_supervised, sum(images.values()) if images else None
    assert section is not None  # checked by Config
    forwards = passes(config.classifier.learner, section.unlabelled_ratio)
    times = float(forwards * section.steps * section.batch_size)
    conv, transformer = (each and times * each for each in (encoder.conv, encoder.transformer))
    trained = Cost(images.get("train", 0) if images else None, conv=conv, transformer=transformer)
    return {name: trained, f"{name}_features": encoder.cost(everything)}


def _pilot(config: Config, train: int | None, dim: int | None, classes: int | None) -> dict[str, Cost]:
    """Return the costs of stages 2 and 3 on features."""
    from dpt_ray.learners.ladder import GENERATED_SHARES
    from dpt_ray.models.feature_denoiser import FeatureDenoiserConfig, flops

    feature = config.feature_diffusion
    names = ("feature_denoiser", "feature_samples", "generated_features")
    if dim is None or classes is None:
        return dict(zip(names, (Cost(train), Cost(), Cost()), strict=True))
    forward = flops(FeatureDenoiserConfig(dim, feature.width, feature.depth, classes))
    rows = classes * config.features_per_class
    passes = feature.nfe * (1 if feature.guidance == 1 else 2)
    fit = len(GENERATED_SHARES) * GENERATED_PASSES * 4.0 * rows * dim * classes
    return {
        "feature_denoiser": Cost(train, transformer=3.0 * forward * feature.steps * feature.batch_size),
        "feature_samples": _times(rows, 4 * dim, transformer=passes * forward),
        "generated_features": Cost(rows, 4.0 * dim * classes, fit=fit),
    }


def _second_stage(
    config: Config, train: int | None, generated: int | None, encoder: _Encoder
) -> dict[str, Cost]:
    """Return the costs of stage 2 on images; with `resample` of all attempts at each, the most it can be."""
    forward, found = _denoiser_flops(config), {}
    _, decode = _autoencoder_flops(config)
    if not config.diffusion.weights:
        # A backward pass costs two forward passes.
        batches = config.diffusion.steps * config.diffusion.batch_size
        found["denoiser"] = Cost(train, transformer=3 * forward * batches)
    others = {f"samples:{other.name}": other.changes for other in config.other_samples}
    for name, changes in {"samples": {}, **others}.items():
        sampled = config.generate.model_copy(update=changes)
        passes = sampled.nfe * (1 if sampled.guidance == 1 else 2)
        tries, judge = (how.attempts, encoder) if (how := sampled.resample) else (1, _Encoder())
        conv, transformer = decode + (judge.conv or 0), passes * forward + (judge.transformer or 0)
        found[name] = _times(generated, _pixel_bytes(config), tries * conv, tries * transformer)
    return found


def _measuring(config: Config, images: Mapping[str, int] | None, generated: int | None) -> dict[str, Cost]:
    """Return the costs of the referee and of the metrics of generated images."""
    found: dict[str, Cost] = {}
    if referee := config.evaluate.referee:
        found |= _own("referee", referee, config, images)
        found["referee_sample_features"] = _Encoder.small(referee, config).cost(generated)
    if config.evaluate.inception:
        measured = min(generated, config.evaluate.images or generated) if generated else None
        found["inception_samples"] = _inception(measured)
        found["inception_reference"] = _inception(images.get("test") if images else None)
    return found


def _own(
    name: str, section: NetworkTraining, config: Config, images: Mapping[str, int] | None
) -> dict[str, Cost]:
    """Return the costs of training a network on one view of each image, and of its features of all images."""
    network, train = _Encoder.small(section, config), images.get("train", 0) if images else None
    features = network.cost(sum(images.values()) if images else None)
    return {name: _pretraining(section, train, network.conv, views=1), f"{name}_features": features}


def _pixel_bytes(config: Config) -> int:
    return (1 if config.data.mode == "L" else 3) * config.data.image_size**2


def total(found: Mapping[str, Cost]) -> Cost:
    """Return the bytes and operations of all stages, as far as they are known."""
    return Cost(
        bytes=_sum(*(cost.bytes for cost in found.values())),
        conv=_sum(*(cost.conv for cost in found.values())),
        transformer=_sum(*(cost.transformer for cost in found.values())),
        fit=_sum(*(cost.fit for cost in found.values())),
    )


def total_seconds(found: Mapping[str, Cost], rates: Rates) -> float:
    """Return the total seconds of the stages whose operations are known."""
    return total(found).seconds(rates) or 0.0


def fit_shape(config: Config, images: Mapping[str, int] | None, classes: int | None) -> FitShape | None:
    """Return the shape of the largest fit of stages 1 and 3; None without any or where it is unknown."""
    dim = _Encoder.of(config).dim
    trials = _trial_rows(config, images, classes)
    if config.ladder and images:
        trials.append(images.get("train", 0))
    if config.generates_features and classes:
        trials.append(classes * config.features_per_class)
    return FitShape(max(trials), dim, classes) if trials and dim and classes else None


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


@dataclass(frozen=True)
class _Encoder:
    """The feature length of an encoder and its operations per image."""

    dim: int | None = None
    conv: float | None = None
    transformer: float | None = None

    def cost(self, rows: int | None) -> Cost:
        return _times(rows, self.dim and 4 * self.dim, self.conv, self.transformer)

    @classmethod
    def of(cls, config: Config) -> _Encoder:
        if config.encoder.kind == "pretrain":
            assert config.pretrain is not None  # checked by Config
            return cls.small(config.pretrain, config)
        if config.encoder.kind == "timm":
            return cls.timm(str(config.encoder.name), config.encoder.image_size)
        name = Path(config.encoder.weights or "").name
        flops, dim = next((MSN[key] for key in MSN if name.startswith(key)), (None, None))
        return cls(dim and dim * (config.encoder.blocks or 1), transformer=flops)

    @classmethod
    def small(cls, section: NetworkTraining, config: Config) -> _Encoder:
        import torch

        from dpt_ray.models.own_networks import own_network
        from dpt_ray.training.throughput import forward_flops

        channels, side = 1 if config.data.mode == "L" else 3, config.data.image_size
        network, spec = own_network(section, channels, side)
        # `Rates.conv` is measured with this network, also where it is a transformer.
        return cls(spec.dim, conv=forward_flops(network, torch.empty(1, channels, side, side)))

    @classmethod
    def timm(cls, name: str, image_size: int | None) -> _Encoder:
        import timm
        import torch

        from dpt_ray.training.throughput import forward_flops

        if not timm.is_model(name):  # reported by the flow
            return cls()
        with torch.device("meta"):
            network = timm.create_model(name, num_classes=0)
        channels, *sides = network.default_cfg["input_size"]
        image = torch.empty(1, channels, *([image_size] * 2 if image_size else sides))
        return cls(network.num_features, transformer=forward_flops(network, image))


def _sum(*values: float | None) -> float | None:
    """Return the sum of the known values, None where all are unknown."""
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _times(
    rows: int | None, bytes: float | None, conv: float | None = None, transformer: float | None = None
) -> Cost:
    """Return the cost of `rows` rows from the cost of one."""
    if rows is None:
        return Cost()
    each = (None if value is None else rows * value for value in (bytes, conv, transformer))
    return Cost(rows, *each)


def _autoencoder_flops(config: Config) -> tuple[float, float]:
    """Return the operations to encode and to decode one image."""
    if config.autoencoder.kind == "identity":
        return 0.0, 0.0
    share = (config.data.image_size / 256) ** 2
    return share * KL_ENCODE, share * KL_DECODE


def _latents(config: Config) -> tuple[int, int]:
    """Return the channels and the side of the latents."""
    if config.autoencoder.kind == "identity":
        return 1 if config.data.mode == "L" else 3, config.data.image_size
    return KL_CHANNELS, config.data.image_size // KL_FACTOR


def _denoiser_flops(config: Config) -> float:
    """Return the operations of one forward pass for one image."""
    from dpt_ray.models.uvit import UViTConfig, flops

    channels, side = _latents(config)
    model = config.diffusion.model.model_dump()
    if side < 1 or side % model["patch_size"]:
        raise ConfigError(
            f"diffusion.model.patch_size {model['patch_size']} must divide the side of the latents, {side} "
            f"for data.image_size {config.data.image_size}"
        )
    return flops(UViTConfig(side, in_channels=channels, num_classes=1, **model))
