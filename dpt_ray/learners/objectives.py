"""What an encoder can be trained to do on the run's own images: one entry for each objective."""

from __future__ import annotations

from collections.abc import Callable

from torch import Generator, nn

from dpt_ray.config.sections import Pretrain
from dpt_ray.learners.objective import Objective
from dpt_ray.learners.simclr import ProjectedEncoder, simclr_step
from dpt_ray.learners.supervised import LabelledEncoder, supervised_step

# (encoder, settings, number of classes, generator of the initial weights) -> what is trained
Build = Callable[[nn.Module, Pretrain, int, Generator], Objective]


def _simclr(encoder: nn.Module, settings: Pretrain, classes: int, generator: Generator) -> Objective:
    group = settings.contrast_group
    step = simclr_step(settings.temperature, group, settings.augment_strength)
    return Objective(ProjectedEncoder(encoder, settings.dim, generator), step, views=2, unit=group)


def _supervised(encoder: nn.Module, settings: Pretrain, classes: int, generator: Generator) -> Objective:
    model = LabelledEncoder(encoder, settings.dim, classes, generator)
    return Objective(model, supervised_step(settings.augment_strength), views=1, labelled=True)


OBJECTIVES: dict[str, Build] = {"simclr": _simclr, "supervised": _supervised}
