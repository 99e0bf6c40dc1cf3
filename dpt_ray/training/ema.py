"""Exponential moving average of a model's weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dpt_ray.training.sharding import local


class EMA:
    """Exponential moving averages of a model's parameters and persistent buffers, started at their values.

    Integer buffers are copied. `tensors` has the averages under the model's state-dict names, on the
    model's device and sharded as the model is.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:  # at 1 they would stay the initial values
            raise ValueError(f"ema_decay {decay}: must be at least 0 and below 1")
        self.decay = decay
        self.tensors: dict[str, Tensor] = {
            name: value.detach().clone() for name, value in model.state_dict().items()
        }

    @torch.no_grad()
    def update(self, model: nn.Module, *, copying: bool = False) -> None:
        """Update the averages with the model's current weights, or set them to these where `copying`."""
        # theta_ema <- decay theta_ema + (1 - decay) theta
        averages, weights = [], []
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                averages.append(local(self.tensors[name]))
                weights.append(local(value))
            else:
                self.tensors[name].copy_(value)
        torch._foreach_lerp_(averages, weights, 1.0 if copying else 1 - self.decay)
