"""AdamW and the learning rate of each step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

Schedule = Literal["constant", "cosine"]


@dataclass(frozen=True)
class ParameterGroup:
    """The parameters `names`, as the model names them, with `scale` times the step's learning rate."""

    names: Sequence[str]
    scale: float
    weight_decay: float


def adamw(
    model: nn.Module,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float],
    groups: Sequence[ParameterGroup] | None = None,
) -> torch.optim.AdamW:
    """Return fused AdamW over all trainable parameters, with decay on every one (as in U-ViT) or by group.

    `groups` name each trainable parameter once; else ValueError. The moments are created at once, so that
    every checkpoint has the same tensors.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if groups is None:
        groups = [ParameterGroup(list(trained), 1.0, weight_decay)]
    _check_names(trained, [name for group in groups for name in group.names])
    grouped: list[dict[str, Any]] = [
        {
            "params": [trained[name] for name in group.names],
            "scale": group.scale,
            "weight_decay": group.weight_decay,
        }
        for group in groups
    ]
    optimizer = torch.optim.AdamW(grouped, lr=learning_rate, betas=betas, fused=True)
    for p in trained.values():
        optimizer.state[p] = {
            "step": torch.zeros((), dtype=torch.float32, device=p.device),
            "exp_avg": torch.zeros_like(p),
            "exp_avg_sq": torch.zeros_like(p),
        }
    return optimizer


def _check_names(trained: Iterable[str], grouped: Sequence[str]) -> None:
    """Raise ValueError unless `grouped` are the trainable parameters, each once."""
    wrong = sorted({*trained} ^ {*grouped}) or [name for name in grouped if grouped.count(name) > 1]
    if wrong:
        raise ValueError(
            f"parameter groups miss, repeat or invent {', '.join(wrong[:5])} ({len(wrong)} in all): name "
            "each trainable parameter in one group"
        )


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
