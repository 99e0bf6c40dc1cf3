"""SimCLR (Chen et al. 2020, arXiv 2002.05709): an encoder from one's own small images, no labels.

Pixels are network pixels in [-1, 1], (B, C, H, W).
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F  # noqa: N812

from dpt_ray.training.random import StepRandom
from dpt_ray.training.workload import Batch, StepFn

# Ranges of the augmentations at strength 1, chosen on validation images of 8 x 8 digits.
ROTATION = math.radians(15)
LOG_SCALE = 0.2
SHEAR = 0.2
SHIFT = 0.2  # of half the image's side
LOG_CONTRAST = 0.3
BRIGHTNESS = 0.1
NOISE = 0.1


class ProjectedEncoder(nn.Module):
    """An encoder with SimCLR's projection head, used by the loss only (Sec. 4.2).

    `encoder` maps (B, C, H, W) to (B, dim); `generator` draws the head's initial weights.
    """

    def __init__(self, encoder: nn.Module, dim: int, generator: Generator) -> None:
        super().__init__()
        self.encoder = encoder
        hidden, out = nn.Linear(dim, dim), nn.Linear(dim, dim // 2)
        for layer in (hidden, out):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=generator)
            nn.init.zeros_(layer.bias)
        self.projection = nn.Sequential(nn.SiLU(), hidden, nn.SiLU(), out)

    def forward(self, images: Tensor) -> Tensor:
        """Return projections (B, dim // 2)."""
        return self.projection(self.encoder(images))


def simclr_step(temperature: float, contrast_group: int, strength: float = 1.0) -> StepFn:
    """Return SimCLR's step function for batches {"image"} and a `ProjectedEncoder`.

    An image is contrasted with the others of its group, `contrast_group` consecutive positions of the
    global batch, so that the loss does not depend on the number of workers.
    """

    def step(model: nn.Module, batch: Batch, random: StepRandom) -> Tensor:
        if random.lo % contrast_group or random.hi % contrast_group:
            raise ValueError(
                f"positions {random.lo}..{random.hi} split a contrast_group of {contrast_group}: "
                "make the batch of every worker and accumulated part a multiple of it"
            )
        views = [augment(batch["image"], random, name, strength) for name in ("view1", "view2")]
        z1, z2 = model(torch.cat(views)).chunk(2)
        return nt_xent(z1, z2, temperature, contrast_group)

    return step


def nt_xent(z1: Tensor, z2: Tensor, temperature: float, group: int) -> Tensor:
    """Return the NT-Xent loss (Eq. 1) within groups of `group` rows, averaged over all views.

    z1, z2 (B, D) hold the two views of image i in row i; B is a multiple of `group`.
    """
    # l_ij = -log(exp(sim_ij / tau) / sum_{k != i} exp(sim_ik / tau)), sim the cosine similarity
    with torch.autocast(z1.device.type, enabled=False):
        z = torch.cat([F.normalize(v.float(), dim=1).unflatten(0, (-1, group)) for v in (z1, z2)], 1)
        similarity = z @ z.transpose(1, 2) / temperature  # (B / group, 2 group, 2 group)
        itself = torch.eye(2 * group, dtype=torch.bool, device=z.device)
        logits = similarity.masked_fill(itself, -torch.inf)
        positive = torch.arange(2 * group, device=z.device).roll(group).expand(len(z), -1)
        return F.cross_entropy(logits.flatten(0, 1), positive.flatten())


def augment(images: Tensor, random: StepRandom, name: str, strength: float = 1.0) -> Tensor:
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
