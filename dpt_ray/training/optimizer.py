"""AdamW and the learning rate of each step."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import nn

Schedule = Literal["constant", "cosine"]


def adamw(
    model: nn.Module, learning_rate: float, weight_decay: float, betas: tuple[float, float]
) -> torch.optim.AdamW:
    """Return fused AdamW over all trainable parameters, with decay on every one (as in U-ViT).

    The moments are created at once, so that every checkpoint has the same tensors.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=learning_rate, betas=betas, weight_decay=weight_decay, fused=True
    )
    for p in parameters:
        optimizer.state[p] = {
            "step": torch.zeros((), dtype=torch.float32, device=p.device),
            "exp_avg": torch.zeros_like(p),
            "exp_avg_sq": torch.zeros_like(p),
        }
    return optimizer


def learning_rate(step: int, base: float, warmup: int, total: int, schedule: Schedule) -> float:
    """Return the learning rate of `step`, counted from 0.

    It is linear from 0 over the first `warmup` steps, then `base` or half a cosine that reaches 0 at
    step `total`.
    """
    if step < warmup:
        return base * step / warmup
    if schedule == "constant":
        return base
    return base * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))
