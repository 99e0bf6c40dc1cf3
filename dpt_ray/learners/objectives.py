"""What an encoder can be trained to do on the run's own images: one entry for each objective."""

from __future__ import annotations

from collections.abc import Callable

from torch import Generator, nn

from dpt_ray.config.sections import Pretrain
from dpt_ray.learners.augmentations import VIEWS
from dpt_ray.learners.objective import Objective
from dpt_ray.learners.simclr import ProjectedEncoder, simclr_step
from dpt_ray.learners.supervised import LabelledEncoder, supervised_step
from dpt_ray.models.own_networks import feature_dim

# (encoder, settings, number of classes, generator of the initial weights) -> what is trained
Build = Callable[[nn.Module, Pretrain, int, Generator], Objective]


def _simclr(encoder: nn.Module, settings: Pretrain, classes: int, generator: Generator) -> Objective:
    group, dim = settings.contrast_group, feature_dim(encoder)
    # A small_conv's features have `dim` values already.
    out = settings.dim // 2 if settings.network == "small_conv" else settings.dim
    step = simclr_step(VIEWS[settings.augmentation], settings.temperature, group, settings.augment_strength)
    return Objective(ProjectedEncoder(encoder, dim, out, generator), step, views=2, unit=group)


def _supervised(encoder: nn.Module, settings: Pretrain, classes: int, generator: Generator) -> Objective:
    model = LabelledEncoder(encoder, feature_dim(encoder), classes, generator)
    step = supervised_step(VIEWS[settings.augmentation], settings.augment_strength)
    return Objective(model, step, views=1, labelled=True)


OBJECTIVES: dict[str, Build] = {"simclr": _simclr, "supervised": _supervised}
