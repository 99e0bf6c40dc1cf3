"""pretrain: an encoder trained on the run's own images, and the referee that only measures.

The encoder (objective "simclr" or "msn") is trained on the training images without labels. The referee
("supervised") is trained on their true labels; only the evaluation reads its features.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, cast

import numpy as np

from dpt_ray.cluster import training
from dpt_ray.config import ConfigError
from dpt_ray.config.training import Pretrain
from dpt_ray.config.values import Count
from dpt_ray.data.crops import Crop
from dpt_ray.data.pixels import check_fits, count_rows, load_pixels
from dpt_ray.data.units import read_index
from dpt_ray.engine.node import RunsOn, Stage, Task, one_of, reads
from dpt_ray.store.records import CropFields, Facts

if TYPE_CHECKING:
    import torch

    from dpt_ray.training.workload import Worker


class PretrainSettings(Pretrain):
    """The training, its objective and the side of the images."""

    objective: str
    image_size: Count


class PretrainedEncoder(Stage[PretrainSettings]):
    """A small convolutional encoder trained on the run's own images."""

    artifact = "encoder"
    settings = PretrainSettings
    inputs = reads({"index": one_of("index")})
    runs_on = RunsOn.WORKERS

    @classmethod
    def make(cls, task: Task[PretrainSettings]) -> Facts:
        """Train and publish an encoder's folder."""
        index = task.inputs["index"]
        rows = count_rows(index)
        check_fits(
            "pretrain",
            rows,
            task.settings.image_size,
            index.manifest["mode"],
            "use encoder.kind msn or timm with published weights, or a smaller data.image_size",
        )
        facts = training.run(task, train)
        return {**facts, "rows": rows, "crop": cast(CropFields, asdict(_crop(task)))}


def train(task: Task[PretrainSettings], worker: Worker) -> None:
    """Train on one worker; publish the encoder on rank 0."""
    import torch

    from dpt_ray.learners.objectives import OBJECTIVES
    from dpt_ray.models.encoder import Encoder, save_encoder
    from dpt_ray.models.own_networks import own_network
    from dpt_ray.training.random import StepRandom
    from dpt_ray.training.throughput import forward_flops
    from dpt_ray.training.workload import Batch, Workload

    settings = task.settings
    index = task.inputs["index"]
    pixels, labels = _load(task)
    generator = torch.Generator().manual_seed(settings.seed)
    network, spec = own_network(settings, pixels.shape[-1], settings.image_size, generator)
    classes = index.manifest["classes"]
    objective = OBJECTIVES[settings.objective](network, settings, classes, generator)

    def load_batch(rows: np.ndarray, step: int) -> Batch:
        batch = {"image": pixels[rows]}
        return batch | {"label": labels[rows]} if objective.labelled else batch

    def step_fn(model: torch.nn.Module, batch: Batch, random: StepRandom) -> torch.Tensor:
        # Bytes go to the device, a quarter of what floats would take.
        return objective.step_fn(model, batch | {"image": _to_network(batch["image"])}, random)

    # A backward pass costs two forward passes: the gradients of the weights and of the input.
    flops = 3 * objective.views * forward_flops(objective.model, _to_network(pixels[:1]))
    workload = Workload(
        objective.model,
        step_fn,
        load_batch,
        len(pixels),
        objective.unit,
        flops_per_image=flops,
        before_step=objective.before_step,
    )
    ema = training.fit(task, worker, workload)
    if ema is not None:
        objective.model.load_state_dict(ema)
        task.out.publish_files(lambda folder: save_encoder(folder, Encoder(network, spec)))


def _load(task: Task[PretrainSettings]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return pixels (n, H, W, C) uint8 and labels (-1: unknown) of the training images."""
    import torch

    index = task.inputs["index"]
    ids, pixels = load_pixels(index, _crop(task), index.manifest["mode"])
    table = read_index(index, ["id", "label"])
    known = dict(zip(table["id"].to_pylist(), table["label"].to_pylist(), strict=True))
    labels = [known[identifier] for identifier in ids]
    if task.settings.objective == "supervised" and None in labels:
        raise ConfigError("evaluate.referee: the training images have no true labels; remove the section")
    numbers = torch.tensor([-1 if label is None else label for label in labels])
    return torch.from_numpy(pixels), numbers


def _to_network(pixels: torch.Tensor) -> torch.Tensor:
    """Return network pixels (n, C, H, W) in [-1, 1]."""
    return (pixels.permute(0, 3, 1, 2).float() / 127.5 - 1).contiguous()


def _crop(task: Task[PretrainSettings]) -> Crop:
    return Crop("adm", task.settings.image_size)
