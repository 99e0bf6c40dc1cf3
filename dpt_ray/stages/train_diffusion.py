"""train-diffusion: stage 2, a class-conditional denoiser on moments joined with pseudo-labels by id."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dpt_ray.artifacts import Artifact
from dpt_ray.config import ConfigError
from dpt_ray.data.moments import MomentsReader, read_moment_ids
from dpt_ray.data.units import read_index
from dpt_ray.sections import Denoiser
from dpt_ray.stages import training
from dpt_ray.stages.initial import INITIAL, publish_initial
from dpt_ray.stages.node import Task
from dpt_ray.stages.preview import Preview
from dpt_ray.stages.rows import PSEUDO_LABELS

CONFIG = "config.json"
WEIGHTS = "model.safetensors"


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


def train(task: Task, worker: training.Worker) -> None:
    """The training function of one worker."""
    with closing(MomentsReader(task.inputs["moments"])) as reader:
        _train(task, worker, reader)


def _train(task: Task, worker: training.Worker, reader: MomentsReader) -> None:
    import torch

    from dpt_ray.diffusion.schedules import SCHEDULES
    from dpt_ray.learners.denoise import denoise_step
    from dpt_ray.models.uvit import UViT, flops
    from dpt_ray.models.weights import load_strict, load_weights
    from dpt_ray.training.order import ShardWindows

    settings, config = task.settings, _network(task)
    autoencoder = task.inputs["autoencoder"].manifest
    torch.manual_seed(settings["seed"])  # the initial weights: the same on every worker
    model = UViT(config)
    if settings["init_from"]:
        load_strict(model, load_weights(task.out.local_file(INITIAL)), settings["init_from"])
    model.gradient_checkpointing = task.compute.gradient_checkpointing
    dropout = 1.0 if settings["condition"] == "none" else settings["label_dropout"]
    step_fn = denoise_step(
        SCHEDULES[settings["schedule"]],
        settings["prediction"],
        autoencoder["scale"],
        config.num_classes,
        dropout,
        settings["min_snr_gamma"],
    )
    order = None
    if window := settings["shuffle_shards"]:
        order = ShardWindows(settings["seed"], settings["batch_size"], reader.sizes, window)
    else:
        _hold_all(reader)
    labels, _ = _labels(task)

    def load_batch(rows: np.ndarray, step: int) -> dict[str, torch.Tensor]:
        if order:
            reader.hold(order.shards(step))
        moments = torch.from_numpy(reader.rows(rows))
        moments = moments if moments.shape[1] > 1 else moments[:, 0]
        return {"moments": moments, "label": torch.from_numpy(labels[rows])}

    # The backward pass costs two forward passes: a gradient by the weights and one by the input.
    every = settings["preview_every"]
    preview = Preview(task, config, worker.device) if every and worker.rank == 0 else None
    ema = training.fit(
        task,
        worker,
        model,
        step_fn,
        load_batch,
        len(reader),
        flops_per_image=3 * flops(config),
        gradient_accumulation=task.compute.gradient_accumulation,
        watch_every=every,
        on_watch=preview.publish if preview else None,
        blocks=model.blocks,
        order=order,
    )
    if ema is not None:
        task.out.publish_files(lambda folder: save_denoiser(folder, ema, config, task, autoencoder["scale"]))


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


def save_denoiser(folder: Path, ema: dict[str, Any], config: Any, task: Task, scale: float) -> None:
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
