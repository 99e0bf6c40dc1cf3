"""What a device can do at best, to hold a training's speed against."""

from __future__ import annotations

import time

import torch

_REPEATS = 10


def matmul_peak(device: torch.device | str, dtype: torch.dtype) -> float:
    """The FLOP/s of this device's fastest of several large matrix products, a multiply-add being two.

    Random operands: a GPU is clocked higher on constant ones, which draw less power. Takes well under a
    second and no random number from anyone else.
    """
    device = torch.device(device)
    cuda = device.type == "cuda"
    n = 8192 if cuda else 512
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(n, n, device=device, generator=generator).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(_REPEATS):
        start = time.perf_counter()
        a @ b
        if cuda:
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best
