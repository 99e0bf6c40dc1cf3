"""Sample images from a denoiser in training: EMA weights, the same noise at every step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from dpt_ray.engine.node import Task

if TYPE_CHECKING:
    from torch import Tensor

    from dpt_ray.models.uvit import UViTConfig

CLASSES, IMAGES = 10, 8  # rows and columns of the grid
PIXELS = 64  # smaller images are magnified to about this side


class AveragedSampler:
    """Samples from EMA weights with the run's own solver and guidance.

    It does not touch the random state of the training.
    """

    def __init__(self, task: Task, config: UViTConfig, device: str) -> None:
        import torch

        from dpt_ray.diffusion.sampling import Sampling
        from dpt_ray.models.autoencoder import load_autoencoder
        from dpt_ray.models.uvit import UViT

        settings, wanted = task.settings, task.settings["sampling"]
        names = ("solver", "nfe", "guidance", "guidance_interval", "precision")
        self.sampling = Sampling(
            settings["schedule"], settings["prediction"], **{name: wanted[name] for name in names}
        )
        self.seed: int = wanted["seed"]
        self._device, self._null_class = device, config.null_class
        self._conditional = settings["condition"] != "none"
        with torch.device("meta"):  # drawing initial weights would advance the global generator
            self._model = UViT(config)
        self._model.to_empty(device=device).eval().requires_grad_(False)
        folder = task.inputs["autoencoder"].uri
        self._autoencoder = load_autoencoder(folder, wanted["precision"]).to(device)
        self._batch_size = task.compute.batch_size

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one image's latents and noise."""
        return self._autoencoder.latent_shape

    def images(self, weights: Mapping[str, Tensor], labels: Sequence[int], noise: Tensor) -> np.ndarray:
        """Return images (n, H, W, C) uint8 of classes `labels` from `noise` (n, *shape)."""
        import torch

        from dpt_ray.diffusion.sampling import sample

        self._model.load_state_dict(dict(weights))
        # An unconditional denoiser has the null class only.
        given = torch.tensor([label if self._conditional else self._null_class for label in labels])
        parts = []
        for x, y in zip(noise.split(self._batch_size), given.split(self._batch_size), strict=True):
            latents = sample(
                self._model, x.to(self._device), y.to(self._device), self._null_class, self.sampling
            )
            parts.append(self._autoencoder.decode(latents).cpu())
        return torch.cat(parts).numpy()


class Preview:
    """A grid of images with a row for each of up to ten classes."""

    def __init__(self, task: Task, sampler: AveragedSampler) -> None:
        self._task, self._sampler = task, sampler
        names = task.inputs["index"].read_json("classes.json")
        chosen = np.linspace(0, len(names) - 1, min(CLASSES, len(names))).round().astype(int).tolist()
        self._classes = {label: names[label] for label in chosen}

    def __call__(self, step: int, weights: Mapping[str, Tensor]) -> dict[str, float]:
        """Write `previews/STEP.png`; return no values for the log."""
        import torch

        from dpt_ray.report.pictures import GridRow, grid_png, scale_to

        labels = [label for label in self._classes for _ in range(IMAGES)]
        generator = torch.Generator().manual_seed(self._sampler.seed)
        noise = torch.randn(len(labels), *self._sampler.shape, generator=generator)
        images = iter(self._sampler.images(weights, labels, noise))
        rows = [GridRow(name, [], [next(images) for _ in range(IMAGES)]) for name in self._classes.values()]
        picture = grid_png(rows, scale_to(rows, PIXELS), gutter=2)
        self._task.out.write_bytes(f"previews/{step:09d}.png", picture)
        return {}
