"""Training on several workers: a replica of the model on each (DDP) or a shard of it (FSDP2).

With sharding (PyTorch FSDP, arXiv 2304.11277; ZeRO stage 3, arXiv 1910.02054) a worker holds its part
of every weight, gradient, average and moment as a DTensor; a block's weights are gathered only while it
runs. All code that depends on the difference is in this module.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel


def shard(model: nn.Module, blocks: Iterable[nn.Module], device: torch.device | str) -> None:
    """Shard `model` in place over all workers of the process group, with one unit per block.

    A model on the CPU moves to `device` block by block, so that it is never whole there. Weights are
    gathered in float32, so that under autocast the training equals that of replicas up to rounding.
    """
    # MixedPrecisionPolicy(param_dtype=bfloat16) would halve the traffic, but round the norms' weights too,
    # unlike autocast (and the CPU's norms reject them). Separate units for the norms give identical results,
    # but their hooks break each compiled block into pieces.
    mesh = init_device_mesh(torch.device(device).type, (torch.distributed.get_world_size(),))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model without DDP's wrapper, with its own parameter names."""
    return model.module if isinstance(model, DistributedDataParallel) else model


@contextmanager
def averaging(model: nn.Module, now: bool) -> Iterator[None]:
    """Average gradients over the workers in backward passes of this context if `now`, else accumulate."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(now)
        yield
    elif isinstance(model, DistributedDataParallel) and not now:
        with model.no_sync():
            yield
    else:
        yield


def local(tensor: Tensor) -> Tensor:
    """Return this worker's part of a tensor, without a copy."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Return the whole tensor from its parts (a collective operation)."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Return copies of the whole tensors on the CPU where `keep`, else an empty dict (collective).

    Tensors are gathered one at a time, so that the device never holds all of them.
    """
    copies = {}
    for name, tensor in tensors.items():
        found = whole(tensor)
        if keep:  # copy=True: training changes the live tensors while the copies are in use
            copies[name] = found.to("cpu", copy=True).contiguous()
    return copies


def write(target: Tensor, values: Tensor) -> None:
    """Copy the whole tensor `values`, present on every worker, into `target` or this worker's part."""
    if isinstance(target, DTensor):
        # Without a source rank each worker slices its own values, without communication.
        values = distribute_tensor(values, target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(values)
