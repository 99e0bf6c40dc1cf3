"""What a denoiser in training draws: a grid of pictures, from the same noise each time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from dpt_ray.report.pictures import GridRow, grid_png, scale_to
from dpt_ray.store.artifact import Artifact

if TYPE_CHECKING:
    from torch import Tensor

CLASSES, IMAGES = 10, 8  # rows and columns of the grid
PIXELS = 64  # a small image is magnified to this


class Sampler(Protocol):
    """What draws images of classes from noise."""

    seed: int

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one image's noise."""

    def images(self, weights: Mapping[str, Tensor], labels: Sequence[int], noise: Tensor) -> np.ndarray:
        """Return images (n, H, W, C) uint8."""


class Preview:
    """A grid of pictures, a row for each of up to ten classes."""

    def __init__(self, sampler: Sampler, classes: Sequence[str], out: Artifact) -> None:
        self._sampler, self._out = sampler, out
        chosen = np.linspace(0, len(classes) - 1, min(CLASSES, len(classes))).round().astype(int).tolist()
        self._classes = {label: classes[label] for label in chosen}

    def __call__(self, step: int, weights: Mapping[str, Tensor]) -> dict[str, float]:
        """Write `previews/STEP.png`; no number for the log."""
        import torch

        labels = [label for label in self._classes for _ in range(IMAGES)]
        generator = torch.Generator().manual_seed(self._sampler.seed)
        noise = torch.randn(len(labels), *self._sampler.shape, generator=generator)
        images = iter(self._sampler.images(weights, labels, noise))
        rows = [GridRow(name, [], [next(images) for _ in range(IMAGES)]) for name in self._classes.values()]
        picture = grid_png(rows, scale_to(rows, PIXELS), gutter=2)
        self._out.write_bytes(f"previews/{step:09d}.png", picture)
        return {}
