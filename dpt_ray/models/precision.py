"""The arithmetic in which a frozen network runs."""

from typing import Literal, get_args

import torch

Precision = Literal["float32", "bfloat16"]


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """Return the autocast context of `precision`; weights stay float32."""
    if precision not in get_args(Precision):
        raise ValueError(f"precision {precision!r} must be one of {get_args(Precision)}")
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")
