"""train-diffusion: stage 2, a class-conditional denoiser on moments joined by id with pseudo-labels."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import closing
from typing import TYPE_CHECKING, Annotated, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dpt_ray.cluster import training
from dpt_ray.config import ConfigError
from dpt_ray.config.hashing import NotHashed
from dpt_ray.config.sections import Diffusion, ResolvedPrecision, SampleSettings
from dpt_ray.data.moments import MomentsReader, read_moment_ids
from dpt_ray.data.rows import PSEUDO_LABELS_FILE, TrainingFeatures
from dpt_ray.data.units import read_index
from dpt_ray.engine.node import Node, RunsOn, Stage, Task, one_of, reads
from dpt_ray.evaluation.records import TRAINING_FRECHET_FILE
from dpt_ray.models.saved import check_heads, weight_file
from dpt_ray.store.artifact import Artifact
from dpt_ray.store.records import Facts

if TYPE_CHECKING:
    from torch import Tensor

    from dpt_ray.models.denoiser import Description
    from dpt_ray.models.uvit import UViT, UViTConfig
    from dpt_ray.training.workload import StepFn, Worker

INITIAL = "initial.safetensors"

# (step, EMA weights of the denoiser) -> numbers for the log
Look = Callable[[int, "Mapping[str, Tensor]"], dict[str, float]]


class DenoiserSettings(Diffusion):
    """The training; sampling and feature precision are those of previews and Frechet distances during it."""

    sampling: Annotated[SampleSettings | None, NotHashed] = None
    features_precision: Annotated[ResolvedPrecision | None, NotHashed] = None


DenoiserTask = Task[DenoiserSettings]


class Denoiser(Stage[DenoiserSettings]):
    """The EMA weights and what sampling needs to know."""

    artifact = "denoiser"
    settings = DenoiserSettings
    inputs = reads(
        {
            "index": one_of("index"),
            "moments": one_of("moments"),
            "autoencoder": one_of("autoencoder"),
            "pseudo_labels": one_of("pseudo_labels", "rung", hashed_as="labels", optional=True),
            "true_labels": one_of("index", hashed_as="labels", optional=True),
            "features": one_of("features", optional=True),  # with diffusion.alignment
            "watched_features": one_of("features", optional=True, hashed=False),
            "encoder": one_of("encoder", optional=True, hashed=False),
        }
    )
    runs_on = RunsOn.WORKERS

    @classmethod
    def make(cls, task: DenoiserTask) -> Facts:
        """Check patches, labels and initial weights, then train and publish."""
        _check_patches(task.settings, task.inputs["autoencoder"])
        labels, counts = _labels(task)
        if absent := [name for name, count in counts.items() if count == 0]:
            trusted = task.settings.min_confidence
            remedy = "" if trusted is None else f"lower min_confidence {trusted} or "
            raise ConfigError(
                f"diffusion: no training image has the pseudo-label {', '.join(absent[:5])} "
                f"({len(absent)} such classes); the denoiser cannot learn them: {remedy}give more labels"
            )
        if tensors := _initial_weights(task.settings, _network(task)):
            from dpt_ray.models.weights import save_weights

            with task.out.writing(INITIAL) as path:
                save_weights(tensors, path)
        facts = training.run(task, train)
        if task.out.exists(INITIAL):
            task.out.fs.rm_file(task.out.path(INITIAL))
        unlabelled = int((labels == len(counts)).sum()) if counts else len(labels)
        return {**facts, "rows": len(labels), "null_labels": unlabelled}


def check_network(node: Node, index: Artifact, autoencoder: Artifact) -> None:
    """Raise ConfigError where a denoiser fits neither the latents nor its initial weights.

    The run's stages before it take hours.
    """
    settings = cast(DenoiserSettings, node.settings)
    _check_patches(settings, autoencoder)
    _initial_weights(settings, _config(settings, index, autoencoder))


def _check_patches(settings: DenoiserSettings, autoencoder: Artifact) -> None:
    patch_size = settings.model.patch_size
    _, height, width = autoencoder.manifest["latent_shape"]
    if height % patch_size or width % patch_size:
        raise ConfigError(
            f"diffusion.model.patch_size: {patch_size} does not divide the side {height} of the latents; "
            "set a divisor"
        )


def _network(task: DenoiserTask) -> UViTConfig:
    return _config(task.settings, task.inputs["index"], task.inputs["autoencoder"])


def _config(settings: DenoiserSettings, index: Artifact, autoencoder: Artifact) -> UViTConfig:
    """Return the configuration of the network for these latents and classes."""
    from dpt_ray.models.uvit import UViTConfig

    channels, size, _ = autoencoder.manifest["latent_shape"]
    num_classes = index.manifest["classes"]
    return UViTConfig(size, in_channels=channels, num_classes=num_classes, **settings.model.model_dump())


def train(task: DenoiserTask, worker: Worker) -> None:
    """Train on one worker; publish the denoiser on rank 0."""
    with closing(MomentsReader(task.inputs["moments"])) as reader:
        _train(task, worker, reader)


def _train(task: DenoiserTask, worker: Worker, reader: MomentsReader) -> None:
    from dpt_ray.learners.alignment import AlignedDenoiser, denoiser_weights
    from dpt_ray.models.denoiser import save_denoiser
    from dpt_ray.models.uvit import flops
    from dpt_ray.training.workload import Workload

    settings, config = task.settings, _network(task)
    images = TrainingImages(task, reader)
    denoiser = _initial_denoiser(task, config)
    model = AlignedDenoiser(denoiser, images.features.dim) if images.features else denoiser
    looks = _looks(task, config, worker.device, images.features) if worker.rank == 0 else []

    def look(step: int, weights: Mapping[str, Tensor]) -> dict[str, float]:
        weights = denoiser_weights(weights) if images.features else weights
        found = [see(step, weights) for every, see in looks if step % every == 0]
        return {name: value for numbers in found for name, value in numbers.items()}

    intervals = [every for every in (settings.preview_every, settings.frechet_every) if every]
    workload = Workload(
        model,
        _step(task, config),
        images.load_batch,
        len(reader),
        gradient_accumulation=task.compute.gradient_accumulation,
        order=images.order,
        blocks=[*denoiser.blocks],
        # A backward pass costs two forward passes: the gradients of the weights and of the input.
        flops_per_image=3 * flops(config),
    )
    ema = training.fit(task, worker, workload, math.gcd(*intervals) or None, look)
    if ema is not None:
        kept = denoiser_weights(ema) if images.features else ema
        task.out.publish_files(lambda folder: save_denoiser(folder, kept, config, _description(task)))


class TrainingImages:
    """The training images as moments with their labels and, for the alignment, their features."""

    def __init__(self, task: DenoiserTask, reader: MomentsReader) -> None:
        from dpt_ray.training.order import ShardWindows

        settings = task.settings
        self._reader, (self._labels, _) = reader, _labels(task)
        self.features = _features(task, "features") if settings.alignment else None
        self.order: ShardWindows | None = None
        if settings.shuffle_shards:
            self.order = ShardWindows(
                settings.seed, settings.batch_size, reader.sizes, settings.shuffle_shards
            )
        else:
            _hold_all(reader)

    def load_batch(self, rows: np.ndarray, step: int) -> dict[str, Tensor]:
        """Return the moments, labels and features of the given rows."""
        import torch

        if self.order:
            self._reader.hold(self.order.shards(step))
        moments = torch.from_numpy(self._reader.rows(rows))
        batch = {
            "moments": moments if moments.shape[1] > 1 else moments[:, 0],
            "label": torch.from_numpy(self._labels[rows]),
        }
        if self.features:
            batch["features"] = torch.from_numpy(self.features.rows(rows))
        return batch


def _step(task: DenoiserTask, config: UViTConfig) -> StepFn:
    """Return the step function: the loss of a batch."""
    from dpt_ray.diffusion.schedules import SCHEDULES
    from dpt_ray.learners.denoise import denoise_step

    settings = task.settings
    return denoise_step(
        SCHEDULES[settings.schedule],
        settings.prediction,
        task.inputs["autoencoder"].manifest["scale"],
        config.num_classes,
        1.0 if settings.condition == "none" else settings.label_dropout,
        settings.min_snr_gamma,
        settings.alignment,
    )


def _description(task: DenoiserTask) -> Description:
    settings = task.settings
    return {
        "schedule": settings.schedule,
        "prediction": settings.prediction,
        "latent_scale": task.inputs["autoencoder"].manifest["scale"],
        "condition": settings.condition,
        "steps": settings.steps,
    }


def _initial_weights(settings: DenoiserSettings, config: UViTConfig) -> dict[str, Tensor]:
    """Return the weights of `diffusion.init_from`, checked against the network; none without it.

    For another number of classes the label embedding is re-initialised except for its null row. Raises
    ConfigError naming the keys that are missing, unexpected or of another shape.
    """
    if not (source := settings.init_from):
        return {}
    import torch

    from dpt_ray.models.published import LABEL_EMBEDDING, with_classes
    from dpt_ray.models.uvit import UViT
    from dpt_ray.models.weights import load_strict, load_weights

    try:
        file = weight_file(source)
        tensors = load_weights(file)
        if LABEL_EMBEDDING in tensors and len(tensors[LABEL_EMBEDDING]) != config.num_classes + 1:
            generator = torch.Generator().manual_seed(settings.seed)
            tensors = with_classes(tensors, config.num_classes, generator)
        load_strict(UViT(config), tensors, file)
        check_heads(file, config.heads)
    except ValueError as error:
        raise ConfigError(f"diffusion.init_from: {error}") from error
    return dict(tensors)


def _initial_denoiser(task: DenoiserTask, config: UViTConfig) -> UViT:
    """Return the initial network, the same on every worker."""
    import torch

    from dpt_ray.models.uvit import UViT
    from dpt_ray.models.weights import load_strict, load_weights

    torch.manual_seed(task.settings.seed)
    denoiser = UViT(config)
    if source := task.settings.init_from:
        load_strict(denoiser, load_weights(task.out.local_file(INITIAL)), source)
    denoiser.gradient_checkpointing = task.compute.gradient_checkpointing
    return denoiser


def _features(task: DenoiserTask, name: str) -> TrainingFeatures:
    return TrainingFeatures(task.inputs[name], read_moment_ids(task.inputs["moments"]))


def _looks(
    task: DenoiserTask, config: UViTConfig, device: str, features: TrainingFeatures | None
) -> list[tuple[int, Look]]:
    """Return the measurements made during training as (interval in steps, function) pairs."""
    from dpt_ray.learners.averaged_sampler import AveragedSampler
    from dpt_ray.learners.training_frechet import Extractor, TrainingFrechet
    from dpt_ray.report.preview import Preview

    settings, looks = task.settings, list[tuple[int, Look]]()
    if not settings.sampling:
        return looks
    index, out = task.inputs["index"], task.out
    conditional = settings.condition != "none"
    sampler = AveragedSampler(
        config,
        settings.schedule,
        settings.prediction,
        settings.sampling,
        task.inputs["autoencoder"].uri,
        device,
        task.compute.batch_size,
        conditional,
    )
    if settings.preview_every:
        classes = index.read_json("classes.json")
        looks.append((settings.preview_every, Preview(sampler, classes, out)))
    if settings.frechet_every and settings.features_precision:
        real = features or _features(task, "watched_features")
        encoder = Extractor(task.inputs["encoder"], settings.features_precision, device)
        frechet = TrainingFrechet(sampler, encoder, real, index.manifest["classes"])
        out.write_json(TRAINING_FRECHET_FILE, frechet.facts)
        looks.append((settings.frechet_every, frechet))
    return looks


def _hold_all(reader: MomentsReader) -> None:
    """Copy all moments to this node."""
    try:
        reader.hold(range(len(reader.sizes)))
        reader.wait()
    except ValueError as error:
        remedy = "or set diffusion.shuffle_shards, with which a node holds only part of the moments"
        raise ValueError(f"{error}, {remedy}") from error


def _labels(task: DenoiserTask) -> tuple[np.ndarray, dict[str, int]]:
    """Return the class id of each row of the moments, and the number of rows of each class.

    A pseudo-label below `min_confidence` becomes the null class: its image trains only the unconditional
    model.
    """
    settings = task.settings
    classes = task.inputs["index"].read_json("classes.json")
    ids = read_moment_ids(task.inputs["moments"])
    if settings.condition == "none":
        return np.zeros(len(ids), np.int64), {}
    if settings.condition == "true_labels":
        table = read_index(task.inputs["true_labels"], ["id", "label"])
    else:
        file = task.inputs["pseudo_labels"].local_file(PSEUDO_LABELS_FILE)
        table = pq.read_table(file, columns=["id", "label", "confidence"])
        if (least := settings.min_confidence) is not None:
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
