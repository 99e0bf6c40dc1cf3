"""MSN (Assran et al. 2022, arXiv 2204.07141): masked anchor views predict the prototypes of a target view."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn

from dpt_ray.learners.augmentations import View
from dpt_ray.learners.msn_loss import msn_loss
from dpt_ray.learners.photographs import photograph_view
from dpt_ray.learners.simclr import ProjectedEncoder
from dpt_ray.training.random import StepRandom
from dpt_ray.training.sharding import local
from dpt_ray.training.workload import Batch, StepFn

MOMENTUM = 0.996  # of the target encoder at the first step; linear towards 1 over 1.25 times the training
MASKED = 0.5  # share of the patches of an anchor that a vision transformer does not see
FOCAL_AREA = (0.05, 0.3)  # of the image, of the smaller crops
ENTROPY_WEIGHT = 1.0
SINKHORN_ITERATIONS = 3
ANCHORS = ("anchor", "focal")


class Projections(NamedTuple):
    """Of anchors (V B, D), of targets (B, D; None if there are none), and the prototypes (K, D)."""

    anchors: Tensor
    targets: Tensor | None
    prototypes: Tensor


class MsnModel(nn.Module):
    """An encoder with a projection head, their moving average that makes the targets, and K prototypes.

    The projection is SimCLR's, since batch normalisation in it (as in the paper) would depend on the number
    of workers. `generator` draws the initial weights.
    """

    def __init__(self, online: ProjectedEncoder, prototypes: int, generator: Generator) -> None:
        super().__init__()
        self.online = online
        self.target = copy.deepcopy(online).requires_grad_(False)
        self.prototypes = nn.Parameter(
            torch.randn(prototypes, online.out, generator=generator) * online.out**-0.5
        )

    def forward(
        self, anchors: Tensor, targets: Tensor | None = None, seen: Tensor | None = None
    ) -> Projections:
        """Return the projections of anchors (V B, C, H, W) and targets (B, C, H, W).

        seen (V B, n) are the indices of the patches of each anchor that a vision transformer sees.
        """
        with torch.no_grad():
            of_targets = None if targets is None else self.target(targets)
        if seen is None:
            return Projections(self.online(anchors), of_targets, self.prototypes)
        encoded = seen_patches(self.online.encoder, anchors, seen)
        return Projections(self.online.projection(encoded), of_targets, self.prototypes)

    @torch.no_grad()
    def follow(self, step: int, steps: int) -> None:
        """Move the target encoder towards the encoder, before step `step` of `steps`."""
        # theta_target <- m theta_target + (1 - m) theta, m linear from 0.996 towards 1
        momentum = MOMENTUM + (1 - MOMENTUM) * step / (1.25 * steps)
        pairs = zip(self.target.parameters(), self.online.parameters(), strict=True)
        target, online = zip(*((local(old), local(new)) for old, new in pairs), strict=True)
        torch._foreach_lerp_(target, online, 1 - momentum)


def seen_patches(vit: Any, images: Tensor, seen: Tensor) -> Tensor:
    """Return the features (B, dim) of timm's vision transformer, which sees the patches seen (B, n) only."""
    tokens = vit._pos_embed(vit.patch_embed(images))
    prefix = vit.num_prefix_tokens
    patches = tokens[:, prefix:].gather(1, seen[:, :, None].expand(-1, -1, tokens.shape[2]))
    tokens = vit.norm_pre(torch.cat([tokens[:, :prefix], patches], dim=1))
    return vit.forward_head(vit.norm(vit.blocks(tokens)))


def msn_step(view: View, group: int, patches: int, strength: float = 1.0) -> StepFn:
    """Return MSN's step function for batches {"image"} and an `MsnModel`.

    An image has one target view, one anchor view and one focal anchor, which shows less of a photograph.
    Of `patches` patches a vision transformer sees a random half in each anchor (0: it is none). The mean
    prediction and Sinkhorn are those of `group` consecutive positions of the global batch.
    """
    focal = partial(photograph_view, area=FOCAL_AREA) if view is photograph_view else view

    def step(model: nn.Module, batch: Batch, random: StepRandom) -> Tensor:
        images = batch["image"]
        target = view(images, random, "target", strength)
        anchors = [
            draw(images, random, name, strength) for draw, name in zip((view, focal), ANCHORS, strict=True)
        ]
        seen = [_seen(random, name, patches) for name in ANCHORS] if patches else []
        found = model(torch.cat(anchors), target, torch.cat(seen) if seen else None)
        terms = msn_loss(found.anchors, found.targets, found.prototypes, group, SINKHORN_ITERATIONS)
        return terms.cross_entropy + ENTROPY_WEIGHT * terms.entropy_gap

    return step


def passes(masked: bool) -> float:
    """Return the encoder's passes, forward and backward, for each image."""
    # Two anchors, which masks shorten, and the target without a backward pass of twice its cost.
    return len(ANCHORS) * (1 - MASKED if masked else 1) + 1 / 3


def _seen(random: StepRandom, name: str, patches: int) -> Tensor:
    """Return the random patches (B, n) that an anchor keeps, in their order."""
    kept = round(patches * (1 - MASKED))
    return random.uniform(f"{name}/mask", (patches,)).argsort(1)[:, :kept].sort(1).values
