"""The random views that an encoder learns from: one entry for each `augmentation`."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from dpt_ray.learners.digits import digit_view
from dpt_ray.learners.photographs import photograph_view
from dpt_ray.training.random import StepRandom

# (images (B, C, H, W) in [-1, 1], random, name, strength) -> a view of each, drawn by position and name
View = Callable[[Tensor, StepRandom, str, float], Tensor]
VIEWS: dict[str, View] = {"digits": digit_view, "photographs": photograph_view}
