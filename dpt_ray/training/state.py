"""The state of a training run at one step as named tensors, for safetensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from dpt_ray.training.ema import EMA
from dpt_ray.training.sharding import gather, write

_NAMED_AT_MOST = 5


def pack(
    model: nn.Module, ema: EMA, optimizer: torch.optim.Optimizer, keep: bool = True
) -> dict[str, Tensor]:
    """Return CPU copies of a run's weights, averages and moments, gathered if they are sharded.

    Keys are `model.NAME`, `ema.NAME` and `optimizer.{step,exp_avg,exp_avg_sq}.NAME`. With sharding this is
    a collective operation, which returns an empty dict where `keep` is False.
    """
    return gather(_live_tensors(model, ema, optimizer), keep)


@torch.no_grad()
def restore(
    model: nn.Module, ema: EMA, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    """Write the tensors of `pack` into model, averages and optimizer, in place.

    Raises ValueError naming the keys that are missing, unexpected or of another shape or dtype, before
    anything is changed.
    """
    live = _live_tensors(model, ema, optimizer)
    check_tensors(live, tensors)
    for key, value in live.items():
        write(value, tensors[key])


def check_tensors(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless `found` has exactly the keys, shapes and dtypes of `expected`."""
    differing = (
        f"{key} {_kind(found[key])} instead of {_kind(value)}"
        for key, value in expected.items()
        if key in found and _kind(found[key]) != _kind(value)
    )
    problems = {
        "missing": _named(expected.keys() - found.keys()),
        "unexpected": _named(found.keys() - expected.keys()),
        "differing": _named(differing),
    }
    if any(problems.values()):
        what = "; ".join(f"{problem}: {keys}" for problem, keys in problems.items() if keys)
        raise ValueError(f"checkpoint does not fit this model: {what}; use the model that made it")


def _live_tensors(model: nn.Module, ema: EMA, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    live = {f"model.{name}": value.detach() for name, value in model.state_dict().items()}
    live |= {f"ema.{name}": value for name, value in ema.tensors.items()}
    for name, parameter in model.named_parameters():
        for moment, value in optimizer.state.get(parameter, {}).items():
            live[f"optimizer.{moment}.{name}"] = value
    return live


def _kind(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _named(keys: Iterable[str]) -> str:
    names = sorted(keys)
    more = len(names) - _NAMED_AT_MOST
    return ", ".join(names[:_NAMED_AT_MOST]) + (f" and {more} more" if more > 0 else "")
