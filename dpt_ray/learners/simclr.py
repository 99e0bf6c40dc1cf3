"""SimCLR (Chen et al. 2020, arXiv 2002.05709): an encoder from one's own small images, no labels.

Pixels are network pixels in [-1, 1], (B, C, H, W).
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F  # noqa: N812

from dpt_ray.learners.augmentations import View
from dpt_ray.training.random import StepRandom
from dpt_ray.training.workload import Batch, StepFn


class ProjectedEncoder(nn.Module):
    """An encoder with SimCLR's projection head, used by the loss only (Sec. 4.2).

    `encoder` maps (B, C, H, W) to (B, dim); `generator` draws the head's initial weights. Projections have
    length `out`.
    """

    def __init__(self, encoder: nn.Module, dim: int, out: int, generator: Generator) -> None:
        super().__init__()
        self.encoder, self.out = encoder, out
        hidden, last = nn.Linear(dim, dim), nn.Linear(dim, out)
        for layer in (hidden, last):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=generator)
            nn.init.zeros_(layer.bias)
        self.projection = nn.Sequential(nn.SiLU(), hidden, nn.SiLU(), last)

    def forward(self, images: Tensor) -> Tensor:
        """Return projections (B, out)."""
        return self.projection(self.encoder(images))


def simclr_step(view: View, temperature: float, contrast_group: int, strength: float = 1.0) -> StepFn:
    """Return SimCLR's step function for batches {"image"} and a `ProjectedEncoder`.

    `view` draws the two views of an image, with `strength`.

    An image is contrasted with the others of its group, `contrast_group` consecutive positions of the
    global batch, so that the loss does not depend on the number of workers.
    """

    def step(model: nn.Module, batch: Batch, random: StepRandom) -> Tensor:
        if random.lo % contrast_group or random.hi % contrast_group:
            raise ValueError(
                f"positions {random.lo}..{random.hi} split a contrast_group of {contrast_group}: "
                "make the batch of every worker and accumulated part a multiple of it"
            )
        views = [view(batch["image"], random, name, strength) for name in ("view1", "view2")]
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
