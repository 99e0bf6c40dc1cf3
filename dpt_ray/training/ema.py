"""Exponential moving average of a model's weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dpt_ray.training.sharding import local


class EMA:
    """Averages theta_ema <- decay * theta_ema + (1 - decay) * theta, started at theta.

    Covers parameters and persistent buffers; integer buffers are copied. `tensors` holds the
    averages under the model's state-dict names, on the model's device and in shards as the model is.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 <= decay <= 1:
            raise ValueError(f"ema_decay {decay}: must lie between 0 and 1")
        self.decay = decay
        self.tensors: dict[str, Tensor] = {
            name: value.detach().clone() for name, value in model.state_dict().items()
        }

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Moves the averages one step towards the model's present weights."""
        averages, weights = [], []
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                averages.append(local(self.tensors[name]))
                weights.append(local(value))
            else:
                self.tensors[name].copy_(value)
        torch._foreach_lerp_(averages, weights, 1 - self.decay)
