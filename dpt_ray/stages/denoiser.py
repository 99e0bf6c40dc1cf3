"""train-diffusion: stage 2, a class-conditional denoiser on moments joined with pseudo-labels by id."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dpt_ray.cluster import training
from dpt_ray.cluster.initial import INITIAL, publish_initial
from dpt_ray.config import ConfigError
from dpt_ray.config.sections import Denoiser
from dpt_ray.data.moments import MomentsReader, read_moment_ids
from dpt_ray.data.rows import PSEUDO_LABELS, TrainingFeatures
from dpt_ray.data.units import read_index
from dpt_ray.engine.node import Task
from dpt_ray.learners.preview import AveragedSampler, Preview
from dpt_ray.learners.training_frechet import TrainingFrechet
from dpt_ray.store.artifact import Artifact

if TYPE_CHECKING:
    from dpt_ray.training.workload import Worker

CONFIG = "config.json"
WEIGHTS = "model.safetensors"

# (step, averaged weights of the denoiser) -> numbers for the log
Look = Callable[[int, Mapping[str, Any]], dict[str, float]]


def make(task: Task) -> dict[str, Any]:
    """Trains and publishes the denoiser: EMA weights and what is needed to sample from them."""
    autoencoder, model = task.inputs["autoencoder"].manifest, Denoiser(**task.settings["model"])
    _, height, width = autoencoder["latent_shape"]
    if height % model.patch_size or width % model.patch_size:
        raise ConfigError(
            f"diffusion.model.patch_size: {model.patch_size} does not divide the latents' side {height}"
        )
    labels, counts = _labels(task)
    if absent := [name for name, count in counts.items() if count == 0]:
        trusted = task.settings["min_confidence"]
        remedy = (
            "give more labels" if trusted is None else f"lower min_confidence {trusted} or give more labels"
        )
        raise ConfigError(
            f"diffusion: no training image has the pseudo-label {', '.join(absent[:5])} "
            f"({len(absent)} such classes); the denoiser cannot learn them: {remedy}"
        )
    publish_initial(task, _network(task))
    facts = training.run(task, train)
    if task.out.exists(INITIAL):
        task.out.fs.rm_file(task.out.path(INITIAL))
    unlabelled = int((labels == len(counts)).sum()) if counts else len(labels)
    return facts | {"rows": len(labels), "null_labels": unlabelled}


def _network(task: Task) -> Any:
    """The configuration of the network, which fits the latents and the classes."""
    from dpt_ray.models.uvit import UViTConfig

    channels, size, _ = task.inputs["autoencoder"].manifest["latent_shape"]
    num_classes = task.inputs["index"].manifest["classes"]
    return UViTConfig(size, in_channels=channels, num_classes=num_classes, **task.settings["model"])


def train(task: Task, worker: Worker) -> None:
    """The training function of one worker."""
    with closing(MomentsReader(task.inputs["moments"])) as reader:
        _train(task, worker, reader)


def _train(task: Task, worker: Worker, reader: MomentsReader) -> None:
    import torch

    from dpt_ray.diffusion.schedules import SCHEDULES
    from dpt_ray.learners.alignment import AlignedDenoiser, denoiser_weights
    from dpt_ray.learners.denoise import denoise_step
    from dpt_ray.models.uvit import flops
    from dpt_ray.training.order import ShardWindows
    from dpt_ray.training.workload import Workload

    settings, config = task.settings, _network(task)
    autoencoder = task.inputs["autoencoder"].manifest
    labels, _ = _labels(task)
    alignment = settings["alignment"]
    features = _features(task) if alignment else None
    denoiser = _initial_denoiser(task, config)
    model = AlignedDenoiser(denoiser, features.dim) if features else denoiser
    dropout = 1.0 if settings["condition"] == "none" else settings["label_dropout"]
    step_fn = denoise_step(
        SCHEDULES[settings["schedule"]],
        settings["prediction"],
        autoencoder["scale"],
        config.num_classes,
        dropout,
        settings["min_snr_gamma"],
        alignment,
    )
    order = None
    if window := settings["shuffle_shards"]:
        order = ShardWindows(settings["seed"], settings["batch_size"], reader.sizes, window)
    else:
        _hold_all(reader)

    def load_batch(rows: np.ndarray, step: int) -> dict[str, torch.Tensor]:
        if order:
            reader.hold(order.shards(step))
        moments = torch.from_numpy(reader.rows(rows))
        moments = moments if moments.shape[1] > 1 else moments[:, 0]
        batch = {"moments": moments, "label": torch.from_numpy(labels[rows])}
        return batch | {"features": torch.from_numpy(features.rows(rows))} if features else batch

    looks = _looks(task, config, worker.device, features) if worker.rank == 0 else []

    def look(step: int, weights: Mapping[str, Any]) -> dict[str, float]:
        weights = denoiser_weights(weights) if features else weights
        found = [see(step, weights) for every, see in looks if step % every == 0]
        return {name: value for numbers in found for name, value in numbers.items()}

    intervals = [every for every in (settings["preview_every"], settings["frechet_every"]) if every]
    workload = Workload(
        model,
        step_fn,
        load_batch,
        len(reader),
        gradient_accumulation=task.compute.gradient_accumulation,
        order=order,
        blocks=[*denoiser.blocks],
        # The backward pass costs two forward passes: a gradient by the weights and one by the input.
        flops_per_image=3 * flops(config),
    )
    ema = training.fit(task, worker, workload, math.gcd(*intervals) or None, look)
    if ema is not None:
        kept = denoiser_weights(ema) if features else ema
        task.out.publish_files(lambda folder: save_denoiser(folder, kept, config, task, autoencoder["scale"]))


def _initial_denoiser(task: Task, config: Any) -> Any:
    """The network before its first step: the same on every worker."""
    import torch

    from dpt_ray.models.uvit import UViT
    from dpt_ray.models.weights import load_strict, load_weights

    torch.manual_seed(task.settings["seed"])
    denoiser = UViT(config)
    if source := task.settings["init_from"]:
        load_strict(denoiser, load_weights(task.out.local_file(INITIAL)), source)
    denoiser.gradient_checkpointing = task.compute.gradient_checkpointing
    return denoiser


def _features(task: Task) -> TrainingFeatures:
    return TrainingFeatures(task.inputs["features"], read_moment_ids(task.inputs["moments"]))


def _looks(task: Task, config: Any, device: str, features: TrainingFeatures | None) -> list[tuple[int, Look]]:
    """What is looked at while the denoiser trains, and every how many steps."""
    previews, distances = task.settings["preview_every"], task.settings["frechet_every"]
    if not previews and not distances:
        return []
    sampler = AveragedSampler(task, config, device)
    looks: list[tuple[int, Look]] = [(previews, Preview(task, sampler))] if previews else []
    if distances:
        real = features or _features(task)
        looks.append((distances, TrainingFrechet(task, sampler, real, device)))
    return looks


def _hold_all(reader: MomentsReader) -> None:
    """Waits until all moments are on this node."""
    try:
        reader.hold(range(len(reader.sizes)))
        reader.wait()
    except ValueError as error:
        remedy = "or set diffusion.shuffle_shards: then a node holds a part of the moments"
        raise ValueError(f"{error}, {remedy}") from error


def _labels(task: Task) -> tuple[np.ndarray, dict[str, int]]:
    """The class id of each row of the moments, and how many rows each class has.

    A pseudo-label with less than `min_confidence` becomes the null class: its image teaches what images
    are like, not what a class is.
    """
    classes = task.inputs["index"].read_json("classes.json")
    ids = read_moment_ids(task.inputs["moments"])
    if task.settings["condition"] == "none":
        return np.zeros(len(ids), np.int64), {}
    source = task.inputs["labels"]
    if task.settings["condition"] == "true_labels":
        table = read_index(source, ["id", "label"])
    else:
        table = pq.read_table(source.local_file(PSEUDO_LABELS), columns=["id", "label", "confidence"])
        if (least := task.settings["min_confidence"]) is not None:
            null = pa.scalar(len(classes), table["label"].type)
            trusted = pc.greater_equal(table["confidence"], least)
            table = table.set_column(1, "label", pc.if_else(trusted, table["label"], null))
    labels = table["label"].take(pc.index_in(ids, table["id"].combine_chunks()))
    if labels.null_count:
        lost = ids.filter(pc.is_null(labels).combine_chunks())[0].as_py()
        raise ConfigError(f"diffusion: {labels.null_count} images have no label, the first is {lost}")
    values = labels.cast(pa.int64()).to_numpy()
    counts = np.bincount(values, minlength=len(classes) + 1)[: len(classes)]
    return values, dict(zip(classes, counts.tolist(), strict=True))


def load_denoiser(folder: str) -> tuple[Any, dict[str, Any]]:
    """The network of a denoiser's folder, local or a URI, on the CPU, and its `config.json`."""
    from dpt_ray.models.uvit import UViT, UViTConfig
    from dpt_ray.models.weights import load_strict, load_weights

    config = Artifact(folder).read_json(CONFIG)
    model = UViT(UViTConfig(**config["model"]))
    weights = f"{folder}/{WEIGHTS}"
    load_strict(model, load_weights(weights), weights)
    return model.eval().requires_grad_(False), config


def save_denoiser(folder: Path, ema: Mapping[str, Any], config: Any, task: Task, scale: float) -> None:
    """Writes a denoiser's weights and what is needed to sample from them."""
    from safetensors.torch import save_file

    settings = task.settings
    description = {
        "model": asdict(config),
        "schedule": settings["schedule"],
        "prediction": settings["prediction"],
        "latent_scale": scale,
        "condition": settings["condition"],
        "steps": settings.get("steps"),  # of an imported one they are not known
    }
    save_file({name: value.contiguous() for name, value in ema.items()}, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(description, indent=1) + "\n")
