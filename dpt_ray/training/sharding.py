"""Training on several workers: a replica of the model on each (DDP) or a shard of it (FSDP2).

In shards (PyTorch FSDP, arXiv 2304.11277; ZeRO stage 3, arXiv 1910.02054) a worker holds its part of
every weight, gradient, average and moment as a DTensor; a block's weights are whole only while it runs.
Here is all that knows of the difference.
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
    """Shards `model` in place over all workers of the process group, each block gathered by itself.

    A model on the CPU reaches `device` block by block, so that it is never whole there. Weights are
    gathered in float32: under autocast too the training is that of replicas, to the rounding.
    """
    # MixedPrecisionPolicy(param_dtype=bfloat16) would halve that traffic, but round the norms' weights too,
    # which autocast does not (and the CPU's norms refuse). With shards of their own for the norms the result
    # is the same to the bit, but their hooks cut each compiled block into pieces.
    mesh = init_device_mesh(torch.device(device).type, (torch.distributed.get_world_size(),))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, whose parameters have the names that it gave them."""
    return model.module if isinstance(model, DistributedDataParallel) else model


@contextmanager
def averaging(model: nn.Module, now: bool) -> Iterator[None]:
    """Backward passes in here average the gradient over the workers only if `now`; else it adds up."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(now)
        yield
    elif isinstance(model, DistributedDataParallel) and not now:
        with model.no_sync():
            yield
    else:
        yield


def local(tensor: Tensor) -> Tensor:
    """This worker's part of a tensor, without a copy."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The tensor from its parts; all workers call this together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Copies of the whole tensors on the CPU where `keep`, elsewhere nothing; all workers take part.

    One tensor at a time: the device never holds all of them.
    """
    copies = {}
    for name, tensor in tensors.items():
        found = whole(tensor)
        if keep:  # copy=True: the run goes on changing the live tensors while the copies are in use
            copies[name] = found.to("cpu", copy=True).contiguous()
    return copies


def write(target: Tensor, values: Tensor) -> None:
    """Copies the whole tensor `values`, which every worker has, into `target` or this worker's part."""
    if isinstance(target, DTensor):
        # Without a source rank each worker cuts its part out of its own values and waits for nobody.
        values = distribute_tensor(values, target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(values)
