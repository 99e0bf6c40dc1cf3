"""pretrain: an encoder from the run's own images, and the referee that only measures.

The encoder (objective "simclr") sees the training images without labels. The referee ("supervised")
sees their true labels; nothing but the evaluation ever reads its features.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from dpt_ray.config import ConfigError
from dpt_ray.data.crops import Crop
from dpt_ray.data.units import iterate_pixels, read_index
from dpt_ray.stages import training
from dpt_ray.stages.node import Task

IN_MEMORY = 4 << 30  # bytes of decoded training images; more of them want a published encoder


def make(task: Task) -> dict[str, Any]:
    """Trains and publishes an encoder folder."""
    index = task.inputs["index"]
    size = int(task.settings["image_size"])
    channels = 1 if index.manifest["mode"] == "L" else 3
    rows = sum(unit["rows"] for unit in index.manifest["units"] if unit["split"] == "train")
    if rows * channels * size**2 > IN_MEMORY:
        raise ConfigError(
            f"pretrain: {rows} images of {size} pixels do not fit into memory; use encoder.kind msn "
            "or timm with published weights, or a smaller data.image_size"
        )
    facts = training.run(task, train)
    return facts | {"rows": rows, "crop": asdict(_crop(task))}


def train(task: Task, worker: training.Worker) -> None:
    """The training function of one worker."""
    import torch

    from dpt_ray.learners.simclr import ProjectedEncoder, simclr_step
    from dpt_ray.learners.supervised import LabelledEncoder, supervised_step
    from dpt_ray.models.conv import SmallConvNet
    from dpt_ray.models.encoder import conv_encoder, save_encoder
    from dpt_ray.training.throughput import forward_flops

    settings = task.settings
    index = task.inputs["index"]
    images, labels = _load(task)
    dim, strength = settings["dim"], settings["augment_strength"]
    generator = torch.Generator().manual_seed(settings["seed"])
    network = SmallConvNet(images.shape[1], settings["width"], dim, generator)
    model: torch.nn.Module
    unit = None
    if settings["objective"] == "simclr":
        model, unit = ProjectedEncoder(network, dim, generator), settings["contrast_group"]
        step_fn, views = simclr_step(settings["temperature"], settings["contrast_group"], strength), 2
    else:
        model = LabelledEncoder(network, dim, index.manifest["classes"], generator)
        step_fn, views = supervised_step(strength), 1

    def load_batch(rows: np.ndarray, step: int) -> dict[str, torch.Tensor]:
        batch = {"image": images[rows]}
        return batch | {"label": labels[rows]} if settings["objective"] == "supervised" else batch

    # The backward pass costs two forward passes: a gradient by the weights and one by the input.
    flops = 3 * views * forward_flops(model, images[:1])
    ema = training.fit(
        task, worker, model, step_fn, load_batch, len(images), unit=unit, flops_per_image=flops
    )
    if ema is not None:
        model.load_state_dict(ema)
        encoder = conv_encoder(network, _crop(task))
        task.out.publish_files(lambda folder: save_encoder(folder, encoder))


def _load(task: Task) -> tuple[Any, Any]:
    """Network pixels (n, C, H, W) in [-1, 1] of the training images, and labels (-1: unknown)."""
    import torch

    index = task.inputs["index"]
    parts = list(iterate_pixels(index, _crop(task), index.manifest["mode"], "train"))
    pixels = torch.from_numpy(np.concatenate([pixels for _, pixels in parts]))
    table = read_index(index, ["id", "label"])
    known = dict(zip(table["id"].to_pylist(), table["label"].to_pylist(), strict=True))
    labels = [known[identifier] for ids, _ in parts for identifier in ids]
    images = (pixels.permute(0, 3, 1, 2).float() / 127.5 - 1).contiguous()
    if task.settings["objective"] == "supervised" and None in labels:
        raise ConfigError("evaluate.referee: the training images have no true labels; remove the section")
    return images, torch.tensor([-1 if label is None else label for label in labels])


def _crop(task: Task) -> Crop:
    return Crop("adm", int(task.settings["image_size"]))
