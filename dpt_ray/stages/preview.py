"""Pictures from the averaged weights while the denoiser trains: the same noise each time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from dpt_ray.stages.node import Task

CLASSES, IMAGES = 10, 8  # rows and columns of the grid
PIXELS = 64  # a small image is magnified to this


class Preview:
    """Samples with the run's own solver and guidance. Draws no random number that the training draws."""

    def __init__(self, task: Task, config: Any, device: str) -> None:
        import torch

        from dpt_ray.models.autoencoder import load_autoencoder
        from dpt_ray.models.uvit import UViT

        self._task, self._device = task, device
        with torch.device("meta"):  # no initial weights: they would take numbers from the global generator
            self._model = UViT(config)
        self._model.to_empty(device=device).eval().requires_grad_(False)
        sampling = task.settings["sampling"]
        folder = task.inputs["autoencoder"].uri
        self._autoencoder = load_autoencoder(folder, sampling["precision"]).to(device)
        names = task.inputs["index"].read_json("classes.json")
        chosen = np.linspace(0, len(names) - 1, min(CLASSES, len(names))).round().astype(int).tolist()
        self._classes = {label: names[label] for label in chosen}

    def publish(self, step: int, weights: Mapping[str, Any]) -> None:
        """Writes `previews/STEP.png`: a row for each of up to ten classes."""
        from dpt_ray.report.pictures import GridRow, grid_png, scale_to

        self._model.load_state_dict(dict(weights))
        images = iter(self._sample())
        rows = [GridRow(name, [], [next(images) for _ in range(IMAGES)]) for name in self._classes.values()]
        self._task.out.write_bytes(
            f"previews/{step:09d}.png", grid_png(rows, scale_to(rows, PIXELS), gutter=2)
        )

    def _sample(self) -> np.ndarray:
        """Images (n, H, W, C) uint8, the classes one after the other."""
        import torch

        from dpt_ray.diffusion.guidance import guided_denoiser
        from dpt_ray.diffusion.schedules import SCHEDULES
        from dpt_ray.diffusion.solvers import SOLVERS

        settings, sampling = self._task.settings, self._task.settings["sampling"]
        null_class = self._model.config.null_class
        known = settings["condition"] != "none"
        labels = torch.tensor([k if known else null_class for k in self._classes for _ in range(IMAGES)])
        generator = torch.Generator().manual_seed(sampling["seed"])
        noise = torch.randn(len(labels), *self._autoencoder.latent_shape, generator=generator)
        schedule, interval = SCHEDULES[settings["schedule"]], sampling["guidance_interval"]
        denoiser = guided_denoiser(
            self._model,
            schedule,
            labels.to(self._device),
            settings["prediction"],
            sampling["guidance"],
            null_class,
            (interval[0], interval[1]) if interval else None,
        )
        with torch.no_grad():
            latents = SOLVERS[sampling["solver"]](denoiser, noise.to(self._device), schedule, sampling["nfe"])
            return self._autoencoder.decode(latents).cpu().numpy()
