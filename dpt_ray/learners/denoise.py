"""Stage 2 of Dual Pseudo Training: the class-conditional diffusion loss on moments, or on features."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dpt_ray.diffusion.loss import Prediction, latents_from_moments, min_snr_weight, training_loss
from dpt_ray.diffusion.schedules import Schedule
from dpt_ray.learners.alignment import alignment_loss
from dpt_ray.training.random import StepRandom
from dpt_ray.training.workload import Batch, StepFn


def denoise_step(
    schedule: Schedule,
    prediction: Prediction,
    latent_scale: float,
    num_classes: int,
    label_dropout: float,
    min_snr_gamma: float | None = None,
    alignment: float | None = None,
) -> StepFn:
    """Return the denoiser's step function, for batches {"moments", "label"}.

    moments (B, 2C, H, W) are unscaled mean and log-variance, or (B, 2, 2C, H, W) with those of the
    flipped image; label (B,) int64. With probability `label_dropout` a label becomes the null class
    `num_classes` (classifier-free guidance, arXiv 2207.12598; 1 trains the unconditional model).
    `min_snr_gamma` weights the samples' losses (arXiv 2303.09556). `alignment` is the weight of the
    alignment loss: the model is then an `AlignedDenoiser`, and the batch has "features" (B, dim) of
    the clean images.
    """

    def step(model: nn.Module, batch: Batch, random: StepRandom) -> Tensor:
        moments = batch["moments"].float()
        if moments.ndim == 5:
            flipped = random.integers("flip", 2)
            moments = moments[torch.arange(len(moments), device=moments.device), flipped]
        shape = (moments.shape[1] // 2, *moments.shape[2:])
        latents = latents_from_moments(moments, random.normal("latent", shape), latent_scale)

        projections: list[Tensor] = []

        def network(x: Tensor, time: Tensor, labels: Tensor) -> Tensor:
            if alignment is None:
                return model(x, time, labels)
            output, projection = model(x, time, labels)
            projections.append(projection)
            return output

        labels = dropped_labels(batch["label"], num_classes, label_dropout, random)
        t = schedule.training_times(random.uniform("time"))
        noise = random.normal("noise", shape)
        loss = training_loss(network, latents, labels, t, noise, schedule, prediction)
        if min_snr_gamma is not None:
            loss = loss * min_snr_weight(t, schedule, prediction, min_snr_gamma)
        if alignment is not None:
            loss = loss + alignment * alignment_loss(projections[0], batch["features"])
        return loss.mean()

    return step


def feature_step(
    schedule: Schedule, prediction: Prediction, num_classes: int, label_dropout: float
) -> StepFn:
    """Return the feature denoiser's step function, for batches {"feature" (B, dim), "label" (B,) int64}.

    The features are standardised. With probability `label_dropout` a label becomes the null class.
    """

    def step(model: nn.Module, batch: Batch, random: StepRandom) -> Tensor:
        features = batch["feature"]
        labels = dropped_labels(batch["label"], num_classes, label_dropout, random)
        t = schedule.training_times(random.uniform("time"))
        noise = random.normal("noise", features.shape[1:])
        return training_loss(model, features, labels, t, noise, schedule, prediction).mean()

    return step


def dropped_labels(labels: Tensor, num_classes: int, probability: float, random: StepRandom) -> Tensor:
    """Return labels (B,) of which each is the null class `num_classes` with a probability."""
    dropped = random.uniform("label_dropout") < probability
    return torch.where(dropped, num_classes, labels)
