"""init: a starting configuration for the user's images, from an inspection of images and labels."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow.compute as pc
import yaml

from dpt_ray.commands.inspection import Found, look
from dpt_ray.commands.recipe import (
    AVERAGE,
    DIM,
    LARGEST_IN_PIXELS,
    LEARNER_RATIO,
    NFE,
    START,
    Images,
    LatentRecipe,
    Recipe,
    Training,
    choose,
    latent_recipe,
    learner_training,
    lengths,
)
from dpt_ray.config import Config, ConfigError, load_config
from dpt_ray.config.sections import Denoiser
from dpt_ray.config.semi_supervised import LearnerName
from dpt_ray.config.yaml_file import build
from dpt_ray.data.listing import canonical, open_root
from dpt_ray.engine.progress import duration
from dpt_ray.models.precision import resolve_precisions
from dpt_ray.pipeline.cost import costs
from dpt_ray.pipeline.speed import Rates, machine_rates, measure_view, training_threads

HELD_OUT = 1000  # maximum number of validation and of test images
MINUTES = 60.0  # default time for small images
UNIT_IMAGES = 1600  # larger images that an actor holds at once: 300 MB at 256 pixels
LARGE_VIEW = 224  # pixels of the views that a network of photographs trains on
NO_LABELS, CLASSES = "labels.csv", 10  # where nothing is labelled yet; the number is a guess

SMALL = """\
# Small images: an encoder trained on them and a denoiser on pixels (see configs/digits.yaml).
encoder: {{precision: auto}}
pretrain:
  network: {network}
  augmentation: {augmentation}
  steps: {encoding.steps}  # {encoder_epochs:.3g} epochs
  batch_size: {encoding.batch_size}
  contrast_group: {encoding.batch_size}
  learning_rate: {encoding.learning_rate:g}
  warmup_steps: {encoding.warmup_steps}
  lr_schedule: cosine
  ema_decay: {encoding.ema_decay}
  precision: auto
  width: {width}
  dim: {dim}
autoencoder: {{kind: identity, precision: auto}}
diffusion:
  model: {{{model}, modulation: true}}
  schedule: cosine
  prediction: v
  steps: {denoising.steps}  # {denoiser_epochs:.3g} epochs
  batch_size: {denoising.batch_size}
  learning_rate: {denoising.learning_rate:g}
  warmup_steps: {denoising.warmup_steps}
  ema_decay: {denoising.ema_decay}
  precision: auto
generate: {{images_per_class: {images_per_class}, nfe: {nfe}}}
retrain: {{images_per_class: {images_per_class}}}
evaluate: {{augmentation: {augmentation}}}
"""

LARGE = """\
# Larger images: published weights, fetched from the Hugging Face hub; files of your own are given as
# `weights` (the paper's: configs/imagenet256_base.yaml).
encoder: {encoder}
autoencoder: {{kind: kl, weights: "hf://stabilityai/sd-vae-ft-ema", precision: auto}}
diffusion:
  model: {{{model}}}
  steps: {denoising.steps}  # {epochs:.3g} epochs
  batch_size: {denoising.batch_size}
  learning_rate: {denoising.learning_rate:g}
  betas: [0.99, 0.99]
  warmup_steps: {denoising.warmup_steps}
  ema_decay: {denoising.ema_decay}
  precision: auto
  checkpoint_every: 2000
generate: {{images_per_class: 128, guidance: 1.4, indices_per_shard: {per_shard}}}
retrain: {{images_per_class: 128}}
"""

# Of larger images: DINO's features are good ones as they are; a masked autoencoder's are made to be trained.
DINO_WEIGHTS = "{kind: timm, name: vit_base_patch16_224.dino, precision: auto}"
MAE_WEIGHTS = "{kind: timm, name: vit_base_patch16_224.mae, precision: auto}"

LADDER = """\
# What the features give before an image is generated, in minutes: `dpt ladder` (docs/ladder.md).
ladder: {}
"""

LEARNER = """\
# Stages 1 and 3 train the encoder, too (docs/semi_supervised.md); `dpt ladder` tells what it is worth before.
classifier: {{learner: {learner}}}
ladder: {{}}
labels_from: learner
semi_supervised:
  steps: {training.steps}  # in each of the two stages; {epochs:.3g} epochs
  batch_size: {training.batch_size}
  group: {training.batch_size}
  unlabelled_ratio: {ratio}
{weight}  learning_rate: {training.learning_rate:g}
  warmup_steps: {training.warmup_steps}
  ema_decay: {training.ema_decay}
  threshold_momentum: {training.ema_decay}
  views: {views}
  precision: auto
"""

# A small network's first pseudo-labels are too weak for the published 5 (docs/semi_supervised.md).
SEMI_VIT_WEIGHT = "  unlabelled_weight: 1.0\n"

GPU = """\
# One GPU for training, one for the other models; without a GPU remove this section.
compute: {train_gpus: true, actor_gpus: 1}
"""


NO_GPU = """\
# This machine has no GPU. On one, or on a cluster with GPUs:
# compute: {train_gpus: true, actor_gpus: 1}
"""


def write_config(
    uri: str,
    labels: str | None,
    out: Path | None,
    minutes: float | None = None,
    learner: LearnerName = "linear",
) -> tuple[Path, Found, str]:
    """Write a configuration for the images at `uri`; return its path, what was found and the run's time.

    Without `labels` it names `NO_LABELS`, which need not exist for `dpt suggest`. The run takes at most
    `minutes` on this machine, if possible: by default `MINUTES` for small images and no limit for larger
    ones. A `learner` that trains the encoder has half of that time, in stages 1 and 3 together. Raises
    ConfigError where the file exists, or the images or the label list cannot be used.
    """
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", PurePosixPath(uri.rstrip("/")).stem).strip("-._") or "images"
    path = out or Path(f"{name}.yaml")
    kept = path.with_name(f"{path.stem}.kept.csv")
    for file in (path, kept):
        if file.exists():
            raise ConfigError(f"out: {str(file)!r} exists; remove it or name another file with --out")
    try:
        found = look(uri, labels)
    except Exception as error:  # each storage raises errors of its own
        raise ConfigError(f"init: {' '.join(str(error).split()) or type(error).__name__}") from error
    # Absolute, so that the configuration is the same run from any folder.
    listed = canonical(labels) if labels else NO_LABELS
    start = _data(name, canonical(uri), listed, found, Path(canonical(str(kept))))
    text, time = _fitted(start, found, minutes, learner)
    head = (
        f"# A starting point, written by `dpt init`: {found}.\n"
        f"# Command:  dpt run {path}\n"
        f"# Time:     {time}\n"
    )
    try:
        if labels and "keep_in_train" in start["data"]:
            kept.write_bytes(_content(labels))
        path.write_text(head + text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"out: {str(path)!r} cannot be written ({error.strerror})") from error
    load_config(path)
    return path, found, time


def _content(uri: str) -> bytes:
    fs, path = open_root(uri)
    return bytes(fs.cat_file(path))


def _data(name: str, uri: str, labels: str, found: Found, kept: Path) -> dict[str, Any]:
    """Return the sections of the configuration about images and labels."""
    small = found.side <= LARGEST_IN_PIXELS
    mode = found.mode if small else "RGB"  # published weights need colour images
    data: dict[str, Any] = {"source": found.source, "uri": uri, "mode": mode}
    data["image_size"] = found.side
    if found.named_by_list or found.gaps:
        data["classes"] = found.classes
    if held_out := _held_out(found):
        # A copy of the list: the split stays the same while the list of labels grows.
        data |= {**held_out, **({"keep_in_train": [str(kept)]} if found.labelled else {})}
    return {"name": name, "output": "outputs", "data": data, "labels": {"file": labels}}


def _fitted(
    start: dict[str, Any], found: Found, minutes: float | None, learner: LearnerName
) -> tuple[str, str]:
    """Return a configuration that fits the images and this machine as text, and the time of its run."""
    splits = Counter(found.index["split"].to_pylist())
    held_out = {key: start["data"].get(key, 0) for key in ("validation", "test")}
    for split, count in held_out.items():
        splits[split] += count
    splits["train"] -= sum(held_out.values())
    channels = 1 if start["data"]["mode"] == "L" else 3
    images = Images(
        splits["train"], found.index.num_rows, found.side, channels, len(found.classes) or CLASSES
    )
    text = yaml.safe_dump(start, sort_keys=False, allow_unicode=True)
    small = found.side <= LARGEST_IN_PIXELS
    asked = minutes or (MINUTES if small else None)
    seconds = 60 * asked if asked else None
    others = seconds if learner == "linear" or seconds is None else seconds / 2
    if small:
        assert others is not None
        recipe, rates = _small(text, images, others)
    else:
        recipe, rates = _large(text, images, others, DINO_WEIGHTS if learner == "linear" else MAE_WEIGHTS)
    text += recipe
    if learner != "linear":
        text += _learner(text, learner, images, rates, seconds)
    elif not found.warning:  # it needs a label of each class
        text += LADDER
    config = _parsed(text)
    spent = {name: cost.seconds(rates) or 0.0 for name, cost in costs(config, splits, images.classes).items()}
    return text, _time(spent, asked)


def _learner(text: str, learner: LearnerName, images: Images, rates: Rates, seconds: float | None) -> str:
    """Return the sections of a learner that trains the encoder, twice in half of `seconds`."""
    small = images.side <= LARGEST_IN_PIXELS
    views = ("small_images" if small else "photographs") if images.photographs else "digits"

    def sections(training: Training) -> str:
        epochs = training.steps * training.batch_size * LEARNER_RATIO / images.train
        return LEARNER.format(
            learner=learner,
            training=training,
            epochs=epochs,
            ratio=LEARNER_RATIO,
            weight=SEMI_VIT_WEIGHT if small and learner == "semi_vit" else "",
            views=views,
        )

    first = learner_training(images, None, 0.0)
    cost = costs(_parsed(text + sections(first)), {"train": images.train}, images.classes)["learner"]
    each = (cost.seconds(rates) or 0.0) / first.steps
    if rates.device == "cpu":  # a GPU trains while the cores draw
        drawn = first.batch_size * (1 + 2 * LEARNER_RATIO)
        each += drawn * measure_view(views, images.side if small else LARGE_VIEW)
    return sections(learner_training(images, seconds and seconds / 4, each))


def _time(spent: Mapping[str, float], minutes: float | None) -> str:
    """Return the time of a run on this machine as text."""
    total = START + sum(spent.values())
    most = sorted(spent, key=lambda name: -spent[name])[:3]
    parts = ", ".join(f"{name} {duration(spent[name])}" for name in most)
    text = f"about {duration(total)} on this machine, by steps measured here ({parts})"
    if minutes and total > 1.2 * 60 * minutes:
        return f"{text}: these images need more than the {minutes:g} minutes"
    return text


def _small(data: str, images: Images, seconds: float) -> tuple[str, Rates]:
    """Return the other sections for small images, and this machine's rates with their networks."""
    rates = _rates(data + _small_text(choose(images, seconds, AVERAGE), images))
    rough = choose(images, seconds, rates)
    rates = _rates(data + _small_text(rough, images))  # rates depend on the networks
    return _small_text(lengths(images, seconds, rates, rough.width, rough.denoiser), images), rates


def _small_text(recipe: Recipe, images: Images) -> str:
    encoding, denoising = recipe.encoding, recipe.denoising
    text = SMALL.format(
        encoding=encoding,
        encoder_epochs=encoding.steps * encoding.batch_size / images.train,
        network=images.network,
        augmentation="photographs" if images.photographs else "digits",
        width=recipe.width,
        dim=DIM,
        model=_shape(recipe.denoiser),
        denoising=denoising,
        denoiser_epochs=denoising.steps * denoising.batch_size / images.train,
        images_per_class=recipe.images_per_class,
        nfe=NFE,
    )
    return text + GPU if has_gpu() else text


def _large(data: str, images: Images, seconds: float | None, encoder: str) -> tuple[str, Rates]:
    """Return the other sections for larger images, and this machine's rates with their networks."""
    rates = _rates(data + _large_text(latent_recipe(images, None, AVERAGE), images, encoder))
    return _large_text(latent_recipe(images, seconds, rates), images, encoder), rates


def _large_text(recipe: LatentRecipe, images: Images, encoder: str) -> str:
    training = recipe.denoising
    epochs = training.steps * training.batch_size / images.train
    shape = _shape(recipe.denoiser)
    per_shard = max(1, min(16, UNIT_IMAGES // images.classes))
    text = LARGE.format(encoder=encoder, model=shape, denoising=training, epochs=epochs, per_shard=per_shard)
    return text + (GPU if has_gpu() else NO_GPU)


def _shape(model: Denoiser) -> str:
    return ", ".join(f"{key}: {getattr(model, key)}" for key in ("patch_size", "dim", "depth", "heads"))


def _rates(text: str) -> Rates:
    config = resolve_precisions(_parsed(text))
    return machine_rates(config, training_threads(config))


def _parsed(text: str) -> Config:
    return build(Config, yaml.safe_load(text), "init")


def has_gpu(devices: Path = Path("/dev")) -> bool:
    """Return whether this machine has an NVIDIA GPU, by device files: importing torch takes seconds."""
    return any(devices.glob("nvidia[0-9]*"))


def _held_out(found: Found) -> dict[str, int]:
    """Return how many images to draw for each missing split: a tenth of those with known labels."""
    splits = set(pc.unique(found.index["split"]).to_pylist())
    train = found.index.filter(pc.equal(found.index["split"], "train"))
    known = train.num_rows - train["label"].null_count
    count = 0 if found.named_by_list else min(HELD_OUT, (known - found.labelled) // 10)
    return {split: count for split in ("validation", "test") if split not in splits and count > 0}
