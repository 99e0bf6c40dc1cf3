"""train-features: stage 2 on features, a class-conditional flow model of the training images' features.

It learns them as the classifiers see them, each row with mean 0 and norm 1, and standardised: each feature
minus its mean and divided by its standard deviation over the training images. Both are kept in the
artifact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dpt_ray.cluster import training
from dpt_ray.config import ConfigError
from dpt_ray.config.features import FeatureTraining
from dpt_ray.data.rows import CHUNK_ROWS, RealRows, Rows
from dpt_ray.engine.node import RunsOn, Stage, Task, one_of, reads
from dpt_ray.store.records import Facts

if TYPE_CHECKING:
    from torch import Tensor

    from dpt_ray.training.workload import Worker

TINY = 1e-6  # of rows of norm 1: a smaller deviation is rounding


class FeatureDenoiser(Stage[FeatureTraining]):
    """The EMA weights, the features' mean and deviation, and what sampling needs to know."""

    artifact = "feature_denoiser"
    settings = FeatureTraining
    inputs = reads(
        {
            "index": one_of("index"),
            "features": one_of("features"),
            "pseudo_labels": one_of("pseudo_labels", "rung", hashed_as="labels"),
        }
    )
    runs_on = RunsOn.WORKERS

    @classmethod
    def make(cls, task: Task[FeatureTraining]) -> Facts:
        """Check that every class has a pseudo-label, then train and publish."""
        rows, classes = read_training_rows(task)
        counts = np.bincount(rows.labels, minlength=len(classes))
        if absent := [name for name, count in zip(classes, counts, strict=True) if not count]:
            raise ConfigError(
                f"feature_diffusion: no training image has the pseudo-label {', '.join(absent[:5])} "
                f"({len(absent)} such classes); no features of them can be learnt: give more labels, or "
                "labels_from another rung"
            )
        facts = training.run(task, train)
        return {**facts, "rows": len(rows)}


def read_training_rows(task: Task[FeatureTraining]) -> tuple[Rows, list[str]]:
    """Return the row-normalised features of the training images with their pseudo-labels, and the classes.

    They take images x dim x 4 bytes of memory.
    """
    real = RealRows(task.inputs["index"], task.inputs["features"], ("train",))
    return real.pseudo_labelled(task.inputs["pseudo_labels"]), real.classes


def train(task: Task[FeatureTraining], worker: Worker) -> None:
    """Train on one worker; publish the feature denoiser on rank 0."""
    import torch

    from dpt_ray.diffusion.schedules import SCHEDULES
    from dpt_ray.learners.denoise import feature_step
    from dpt_ray.models import feature_denoiser as saved
    from dpt_ray.training.workload import Workload

    settings = task.settings
    rows, classes = read_training_rows(task)
    standard = Standard.of(rows)
    config = saved.FeatureDenoiserConfig(len(standard.mean), settings.width, settings.depth, len(classes))
    torch.manual_seed(settings.seed)  # the same network on every worker
    network = saved.FeatureDenoiser(config)

    def load_batch(chosen: np.ndarray, step: int) -> dict[str, Tensor]:
        return {
            "feature": torch.from_numpy(standard(_matrix(rows, chosen))),
            "label": torch.from_numpy(rows.labels[chosen]),
        }

    step_fn = feature_step(
        SCHEDULES[saved.SCHEDULE], saved.PREDICTION, config.num_classes, settings.label_dropout
    )
    flops = 3 * saved.flops(config)  # a backward pass costs two forward passes
    blocks = [*network.blocks]
    workload = Workload(network, step_fn, load_batch, len(rows), blocks=blocks, flops_per_image=flops)
    ema = training.fit(task, worker, workload)
    if ema is not None:
        mean, std = torch.from_numpy(standard.mean), torch.from_numpy(standard.std)
        task.out.publish_files(
            lambda folder: saved.save_feature_denoiser(folder, ema, mean, std, config, settings.steps)
        )


@dataclass(frozen=True)
class Standard:
    """The mean and the standard deviation (dim,) float32 of rows."""

    mean: np.ndarray
    std: np.ndarray

    @classmethod
    def of(cls, rows: Rows) -> Standard:
        """Return those of `rows`, summed in double precision a chunk at a time."""
        dim = rows.matrix.shape[1]
        total, squares = np.zeros(dim), np.zeros(dim)
        for start in range(0, len(rows), CHUNK_ROWS):
            part = _matrix(rows, np.arange(start, min(start + CHUNK_ROWS, len(rows)))).astype(np.float64)
            total += part.sum(axis=0)
            squares += np.square(part).sum(axis=0)
        # Var = E[f^2] - E[f]^2, without cancellation to speak of: entries are at most 1.
        mean = total / len(rows)
        variance = np.maximum(squares / len(rows) - mean**2, 0)
        return cls(mean.astype(np.float32), np.sqrt(variance).astype(np.float32))

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Return (f - mean) / std; a feature that is the same everywhere becomes 0."""
        return (features - self.mean) / np.maximum(self.std, TINY)


def _matrix(rows: Rows, chosen: np.ndarray) -> np.ndarray:
    return rows.matrix[chosen if rows.index is None else rows.index[chosen]]
