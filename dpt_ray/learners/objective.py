"""What a training of an encoder consists of."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from dpt_ray.training.order import GROUP
from dpt_ray.training.workload import StepFn


@dataclass(frozen=True)
class Objective:
    """A model around the encoder, and its loss on batches {"image"} or, if `labelled`, {"image", "label"}.

    `views` are the encoder's forward passes for each image. `unit` neighbouring positions of the batch
    stay on one worker.
    """

    model: nn.Module
    step_fn: StepFn
    views: int
    unit: int = GROUP
    labelled: bool = False
