"""Random views of handwritten digits and other small images without a meaning of colour or direction."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from dpt_ray.training.random import StepRandom

# Ranges of the augmentations at strength 1, chosen on validation images of 8 x 8 digits.
ROTATION = math.radians(15)
LOG_SCALE = 0.2
SHEAR = 0.2
SHIFT = 0.2  # of half the image's side
LOG_CONTRAST = 0.3
BRIGHTNESS = 0.1
NOISE = 0.1


def digit_view(images: Tensor, random: StepRandom, name: str, strength: float = 1.0) -> Tensor:
    """Return a random view of each image: shifted, scaled, rotated, sheared, recoloured, with noise.

    images (B, C, H, W) in [-1, 1], B = random.hi - random.lo; views may leave that range. Equal
    positions and names give equal views. `strength` scales every range. There are no flips, since
    digits have a handedness. Contrast and brightness are drawn per channel, which shifts colours.
    """
    channels = images.shape[1]

    def spread(what: str, shape: tuple[int, ...] = ()) -> Tensor:
        return strength * (2 * random.uniform(f"{name}/{what}", shape) - 1)

    # The affine map from the view's coordinates to the image's, in units of half the side.
    angle, shear = ROTATION * spread("rotation"), SHEAR * spread("shear")
    across, along = (LOG_SCALE * spread("scale", (2,))).exp().unbind(1)
    cos, sin = angle.cos(), angle.sin()
    shift_x, shift_y = (SHIFT * spread("shift", (2,))).unbind(1)
    to_x = torch.stack([across * cos, shear * cos - along * sin, shift_x], dim=1)
    to_y = torch.stack([across * sin, shear * sin + along * cos, shift_y], dim=1)
    placement = torch.stack([to_x, to_y], dim=1)
    grid = F.affine_grid(placement, list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    contrast = (LOG_CONTRAST * spread("contrast", (channels, 1, 1))).exp()
    brightness = BRIGHTNESS * spread("brightness", (channels, 1, 1))
    noise = strength * NOISE * random.normal(f"{name}/noise", images.shape[1:])
    return contrast * moved + brightness + noise
