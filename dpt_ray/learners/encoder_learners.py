"""The learners that train the encoder: one entry for each method of `semi_supervised`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from dpt_ray.config.semi_supervised import LearnerSettings
from dpt_ray.learners.labelled_mixup import LabelledMix, batch_mixup
from dpt_ray.learners.semi_supervised import (
    freematch_step,
    semi_vit_step,
    supervised_first,
    supervised_step,
)
from dpt_ray.learners.weak_strong import (
    Draw,
    Views,
    batch_views,
    photograph_views,
    small_image_views,
)
from dpt_ray.training.workload import StepFn

VIEWS: dict[str, Callable[[int], Views]] = {
    "digits": partial(small_image_views, mirror=False),
    "small_images": small_image_views,
    "photographs": photograph_views,
}
WITH_BACKWARD = 3  # a backward pass costs two forward passes: for the weights and for the input

# (settings, number of classes, mix of labelled images) -> step function for a `StudentTeacher`
Build = Callable[[LearnerSettings, int, LabelledMix | None], StepFn]


def _semi_vit(settings: LearnerSettings, classes: int, mix: LabelledMix | None) -> StepFn:
    threshold = None if settings.threshold == "adaptive" else settings.threshold
    weight = settings.unlabelled_weight or 5.0
    return semi_vit_step(classes, settings.group, threshold, weight, mix=mix)


def _freematch(settings: LearnerSettings, classes: int, mix: LabelledMix | None) -> StepFn:
    return freematch_step(settings.group, settings.unlabelled_weight or 1.0)


LEARNERS: dict[str, Build] = {
    "semi_vit": _semi_vit,
    "freematch": _freematch,
    "supervised": lambda settings, classes, mix: supervised_step(mix),
}


def step_function(settings: LearnerSettings, classes: int) -> StepFn:
    """Return the step function of a method, supervised for its first steps."""
    mix = batch_mixup(classes, settings.group) if settings.mixup else None
    step = LEARNERS[settings.method](settings, classes, mix)
    if not settings.supervised_steps:
        return step
    first = supervised_step(None if settings.mixup == "after_supervised" else mix)
    return supervised_first(settings.supervised_steps, first, step)


def draw_function(settings: LearnerSettings, size: int) -> Draw:
    """Return what draws a method's views, of `size` pixels; FreeMatch's of labelled images are weak."""
    of_photographs = partial(photograph_views, erasing=settings.erasing)
    views = (of_photographs if settings.views == "photographs" else VIEWS[settings.views])(size)
    return batch_views(views, views.weak if settings.method == "freematch" else views.strong)


def passes(method: str, ratio: int) -> int:
    """Return the forward passes that a step costs for one labelled and `ratio` unlabelled images."""
    # Weak views have no gradient.
    return WITH_BACKWARD + (0 if method == "supervised" else ratio * (1 + WITH_BACKWARD))
