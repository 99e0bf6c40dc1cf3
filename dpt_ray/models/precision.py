"""The arithmetic in which a network runs, and what `precision: auto` means on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Literal, get_args

from dpt_ray.config.run import Config
from dpt_ray.config.sections import Compute
from dpt_ray.config.sections import Precision as Asked

if TYPE_CHECKING:
    import torch

Precision = Literal["float32", "bfloat16"]


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """Return the autocast context of `precision`; weights stay float32."""
    import torch

    if precision not in get_args(Precision):
        raise ValueError(f"precision {precision!r} must be one of {get_args(Precision)}")
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


def resolve_precisions(config: Config) -> Config:
    """Return the configuration with "bfloat16" or "float32" in place of each precision `auto`.

    It is bfloat16 on a GPU and on a processor that is faster with it, else float32. That decides results
    and so identities: a precision that is written out stays the same on another machine.
    """
    asked = _precisions(config)
    chosen = {key: _chosen(key, config.compute) for key, value in asked.items() if value == "auto"}
    return _with_precisions(config, chosen) if chosen else config


def emulation_note(config: Config) -> str:
    """Return what to say where bfloat16 is asked for and only emulated here, with the factor; else ""."""
    asked = _precisions(config)
    keys = [key for key, value in asked.items() if value == "bfloat16" and not _on_gpu(key, config.compute)]
    if not keys or (gain := bfloat16_gain()) >= 1:
        return ""
    return (
        f"note: this processor emulates bfloat16: a small matrix product or convolution takes {1 / gain:.3g} "
        f"times as long as in float32; set {' '.join(f'{key}.precision=auto' for key in keys)}"
    )


@cache
def bfloat16_gain() -> float:
    """Return how many times as fast as in float32 this processor is in bfloat16; measured in milliseconds.

    The smaller of the gains of a matrix product and of a convolution under autocast, on one thread. 2.0 and
    1.4 were measured with AVX512-BF16; the lesser is 0.4 on AVX512 and 0.02 on AVX2, which emulate it.
    """
    import torch
    from torch.nn.functional import conv2d

    generator = torch.Generator().manual_seed(0)  # nobody else's random numbers
    matrix = torch.randn(256, 256, generator=generator)
    images, kernel = (torch.randn(n, 32, s, s, generator=generator) for n, s in ((4, 16), (32, 3)))

    def gain(compute: Callable[[], object]) -> float:
        seconds = {False: float("inf"), True: float("inf")}
        for repeat in range(6):  # in turn, so that a busy machine slows both; the first ones are not counted
            for enabled in seconds:
                with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                    start = time.perf_counter()
                    compute()
                    if repeat:
                        seconds[enabled] = min(seconds[enabled], time.perf_counter() - start)
        return seconds[False] / seconds[True]

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several wait for each other where the machine is busy
    try:
        return min(gain(lambda: matrix @ matrix), gain(lambda: conv2d(images, kernel, padding=1)))
    finally:
        torch.set_num_threads(threads)


def _precisions(config: Config) -> dict[str, str]:
    """Every precision that is asked for, by its section."""
    sections = {
        "encoder": config.encoder,
        "autoencoder": config.autoencoder,
        "generate": config.generate,
        "pretrain": config.pretrain,
        "semi_supervised": config.semi_supervised,
        "diffusion": config.diffusion,
        "feature_diffusion": config.feature_diffusion,
        "student": config.student,
        "evaluate.referee": config.evaluate.referee,
    }
    return {key: section.precision for key, section in sections.items() if section and section.precision}


def resolved(precision: Asked) -> Precision:
    """Return a precision of a configuration that `resolve_precisions` returned."""
    assert precision != "auto"
    return precision


def _with_precisions(config: Config, chosen: dict[str, Precision]) -> Config:
    changed = {
        key: getattr(config, key).model_copy(update={"precision": precision})
        for key, precision in chosen.items()
        if key != "evaluate.referee"
    }
    if config.evaluate.referee and (precision := chosen.get("evaluate.referee")):
        referee = config.evaluate.referee.model_copy(update={"precision": precision})
        changed["evaluate"] = config.evaluate.model_copy(update={"referee": referee})
    return config.model_copy(update=changed)


def _chosen(section: str, compute: Compute) -> Precision:
    return "bfloat16" if _on_gpu(section, compute) or bfloat16_gain() > 1 else "float32"


def _on_gpu(section: str, compute: Compute) -> bool:
    """Whether what a section is about runs on a GPU."""
    if section in ("encoder", "autoencoder", "generate"):
        return compute.actor_gpus > 0
    if compute.train_workers:
        return compute.train_gpus
    import torch

    return torch.cuda.is_available()  # a training in the driver's process takes what GPU that has
