"""What a network asks of a device and what the device can do at best: their ratio is the MFU."""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

_REPEATS = 5


def forward_flops(network: nn.Module, *inputs: Tensor) -> int:
    """The FLOPs of one forward pass, as torch counts them: a multiply-add as two.

    Matrix products, attention and convolutions; norms and activations are left out. Nothing is computed:
    weights and inputs are stand-ins without values.
    """
    weights = {name: value.to("meta") for name, value in network.state_dict().items()}
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        functional_call(network, weights, tuple(value.to("meta") for value in inputs))
    return counter.get_total_flops()


def matmul_peak(device: torch.device | str, dtype: torch.dtype) -> float:
    """The FLOP/s of this device's fastest of several large matrix products, a multiply-add being two.

    Random operands: a GPU is clocked higher on constant ones, which draw less power. Takes a second at most
    and no random number from anyone else.
    """
    device = torch.device(device)
    cuda = device.type == "cuda"
    n = 8192 if cuda else 2048  # a processor's matrix units come to speed on large ones only
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(n, n, device=device, generator=generator).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    best = float("inf")
    for _ in range(_REPEATS):
        start = time.perf_counter()
        torch.mm(a, b, out=product)
        if cuda:
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best
