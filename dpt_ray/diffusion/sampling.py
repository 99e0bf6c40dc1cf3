"""Sampling from a trained network: its settings, the sampler, and the initial noise of each image."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dpt_ray.diffusion.guidance import guided_denoiser
from dpt_ray.diffusion.loss import Network, Prediction
from dpt_ray.diffusion.schedules import SCHEDULES
from dpt_ray.diffusion.solvers import SOLVERS
from dpt_ray.models.precision import Precision


@dataclass(frozen=True)
class Sampling:
    """How to sample; `guidance` is w (1 is none), applied within `guidance_interval` of t or everywhere.

    `precision` is the network's: noise, solver and latents are float32.
    """

    schedule: str
    prediction: Prediction
    solver: str
    nfe: int
    guidance: float = 1.0
    guidance_interval: Sequence[float] | None = None
    precision: Precision = "float32"


@torch.no_grad()
def sample(network: Network, noise: Tensor, labels: Tensor, null_class: int, sampling: Sampling) -> Tensor:
    """Return scaled latents (B, C, H, W) from standard normal `noise` of that shape and labels (B,)."""
    schedule, interval = SCHEDULES[sampling.schedule], sampling.guidance_interval
    denoiser = guided_denoiser(
        network,
        schedule,
        labels,
        sampling.prediction,
        sampling.guidance,
        null_class,
        (interval[0], interval[1]) if interval else None,
        sampling.precision,
    )
    return SOLVERS[sampling.solver](denoiser, noise, schedule, sampling.nfe)


def image_noise(seed: int, label: int, index: int, shape: Sequence[int], attempt: int = 0) -> Tensor:
    """Return the initial noise of image `index` of a class, standard normal, drawn on the CPU.

    Each further attempt at the image has other noise.
    """
    key = f"{seed}/{label}/{index}" + (f"/{attempt}" if attempt else "")
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
    return torch.randn(tuple(shape), generator=generator)
