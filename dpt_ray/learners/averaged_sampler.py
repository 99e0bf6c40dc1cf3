"""Images from the averaged weights of a denoiser in training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from dpt_ray.config.sections import Prediction, SampleSettings
from dpt_ray.diffusion.sampling import Sampling, sample
from dpt_ray.models.autoencoder import load_autoencoder
from dpt_ray.models.uvit import UViT, UViTConfig


class AveragedSampler:
    """Sample with the run's own solver and guidance; draw no random number that the training draws."""

    def __init__(
        self,
        config: UViTConfig,
        schedule: str,
        prediction: Prediction,
        wanted: SampleSettings,
        autoencoder: str,
        device: str,
        batch_size: int,
        conditional: bool = True,
    ) -> None:
        """`autoencoder` is the URI of its folder; not `conditional`: the null class stands for all."""
        self.sampling = Sampling(
            schedule,
            prediction,
            wanted.solver,
            wanted.nfe,
            wanted.guidance,
            wanted.guidance_interval,
            wanted.precision,
        )
        self.seed = wanted.seed
        self._device, self._null_class = device, config.null_class
        self._conditional = conditional
        with torch.device("meta"):  # no initial weights: they would take numbers from the global generator
            self._model = UViT(config)
        self._model.to_empty(device=device).eval().requires_grad_(False)
        self._autoencoder = load_autoencoder(autoencoder, wanted.precision).to(device)
        self.batch_size = batch_size

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one image's latents, and of its noise."""
        return self._autoencoder.latent_shape

    def images(self, weights: Mapping[str, Tensor], labels: Sequence[int], noise: Tensor) -> np.ndarray:
        """Return images (n, H, W, C) uint8 of the classes `labels` from `noise` (n, *shape)."""
        self._model.load_state_dict(dict(weights))
        # An unconditional denoiser knows the null class only.
        given = torch.tensor([label if self._conditional else self._null_class for label in labels])
        parts = []
        for x, y in zip(noise.split(self.batch_size), given.split(self.batch_size), strict=True):
            latents = sample(
                self._model, x.to(self._device), y.to(self._device), self._null_class, self.sampling
            )
            parts.append(self._autoencoder.decode(latents).cpu())
        return torch.cat(parts).numpy()
