"""What an encoder can be trained to do on the run's own images: one entry for each objective."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Generator, nn

from dpt_ray.config.training import Pretrain
from dpt_ray.learners.augmentations import VIEWS
from dpt_ray.learners.msn import MsnModel, msn_step, passes
from dpt_ray.learners.objective import Objective
from dpt_ray.learners.simclr import ProjectedEncoder, simclr_step
from dpt_ray.learners.supervised import LabelledEncoder, supervised_step
from dpt_ray.models.own_networks import feature_dim

# (encoder, settings, number of classes, generator of the initial weights) -> what is trained
Build = Callable[[nn.Module, Pretrain, int, Generator], Objective]


def _simclr(encoder: nn.Module, settings: Pretrain, classes: int, generator: Generator) -> Objective:
    view, group = VIEWS[settings.augmentation], settings.contrast_group
    step = simclr_step(view, settings.temperature, group, settings.augment_strength)
    return Objective(_projected(encoder, settings, generator), step, views=2, unit=group)


def _msn(encoder: nn.Module, settings: Pretrain, classes: int, generator: Generator) -> Objective:
    view, group = VIEWS[settings.augmentation], settings.contrast_group
    model = MsnModel(_projected(encoder, settings, generator), settings.prototypes, generator)
    vit: Any = encoder
    patches = vit.patch_embed.num_patches if settings.patch_size else 0
    step = msn_step(view, group, patches, settings.augment_strength)
    follow = partial(model.follow, steps=settings.steps)
    return Objective(model, step, views=passes(patches > 0), unit=group, before_step=follow)


def _projected(encoder: nn.Module, settings: Pretrain, generator: Generator) -> ProjectedEncoder:
    # A small_conv's features have `dim` values already.
    out = settings.dim // 2 if settings.network == "small_conv" else settings.dim
    return ProjectedEncoder(encoder, feature_dim(encoder), out, generator)


def _supervised(encoder: nn.Module, settings: Pretrain, classes: int, generator: Generator) -> Objective:
    model = LabelledEncoder(encoder, feature_dim(encoder), classes, generator)
    step = supervised_step(VIEWS[settings.augmentation], settings.augment_strength)
    return Objective(model, step, views=1, labelled=True)


OBJECTIVES: dict[str, Build] = {"simclr": _simclr, "msn": _msn, "supervised": _supervised}
