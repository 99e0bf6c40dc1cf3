"""What a training of an encoder consists of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from dpt_ray.training.order import GROUP
from dpt_ray.training.workload import StepFn


@dataclass(frozen=True)
class Objective:
    """A model around the encoder, and its loss on batches {"image"} or, if `labelled`, {"image", "label"}.

    `views` are the encoder's passes, forward and backward, for each image. `before_step(step)` is called
    before each step. `unit` neighbouring positions of the batch
    stay on one worker.
    """

    model: nn.Module
    step_fn: StepFn
    views: float
    unit: int = GROUP
    labelled: bool = False
    before_step: Callable[[int], None] = lambda step: None
