"""Which generated images are measured where their labels are drawn at random, as U-ViT and DPT draw them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def images_of_each_class(images: int, classes: int, seed: int) -> Tensor:
    """Return how many of `images` independent, uniformly drawn labels are of each class: (classes,) int64.

    With balanced labels all counts are images / classes. The standard deviation of a count is about the
    square root of that: 7 of 50 for 50,000 images of 1,000 classes.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(classes, (images,), generator=generator).bincount(minlength=classes)


def check_counts(counts: np.ndarray, images_per_class: int | None) -> None:
    """Raise ValueError where more images of a class are drawn than there are of each."""
    most = int(counts.max())
    if images_per_class is not None and most > images_per_class:
        raise ValueError(
            f"evaluate.labels: uniform draws up to {most} images of a class, not {images_per_class}: "
            f"set generate.images_per_class to {most} or more, or evaluate.images to fewer"
        )
