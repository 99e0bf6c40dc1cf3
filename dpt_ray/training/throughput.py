"""A network's FLOPs and a device's peak FLOP/s, whose ratio is the MFU."""

from __future__ import annotations

import functools
import time

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

_REPEATS = 5
_LONGEST = 0.5  # seconds


def forward_flops(network: nn.Module, *inputs: Tensor) -> int:
    """Return the FLOPs of one forward pass as torch counts them, a multiply-add as two.

    Matrix products, attention and convolutions count; norms and activations do not. Nothing is computed,
    since weights and inputs are meta tensors.
    """
    weights = {name: value.to("meta") for name, value in network.state_dict().items()}
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        functional_call(network, weights, tuple(value.to("meta") for value in inputs))
    return counter.get_total_flops()


@functools.cache
def matmul_peak(device: torch.device | str, dtype: torch.dtype) -> float:
    """Return the FLOP/s of this device's fastest of several matrix products, a multiply-add being two.

    Sizes double up to one that brings matrix units to speed, as long as a product of the next size would
    take less than `_LONGEST`: a processor that emulates the type ends within about a second, too. Operands
    are random (a GPU is clocked higher on constant ones, which draw less power), from a generator of
    their own. Measured once in a process.
    """
    device = torch.device(device)
    n, largest = (1024, 8192) if device.type == "cuda" else (128, 2048)
    _product_seconds(n, device, dtype)  # the first ones of all load libraries
    best = 0.0
    while True:
        seconds = _product_seconds(n, device, dtype)
        best = max(best, 2 * n**3 / seconds)
        if n == largest or 8 * seconds > _LONGEST:  # 2^3 times the FLOPs
            return best
        n *= 2


def _product_seconds(n: int, device: torch.device, dtype: torch.dtype) -> float:
    """Return the least seconds of a few products of two n x n matrices."""
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(n, n, device=device, generator=generator).to(dtype) for _ in range(2))
    product, seconds = torch.empty_like(a), [0.0]
    while len(seconds) <= _REPEATS and sum(seconds) < _LONGEST / 2:
        start = time.perf_counter()
        torch.mm(a, b, out=product)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])
