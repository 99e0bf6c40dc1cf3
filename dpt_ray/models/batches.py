"""Inference in batches as large as the GPU's memory takes."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor


class Batches:
    """Computes items batch by batch; where memory runs out, `size` is halved, for all that follow too."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, compute: Callable[[int, int], Tensor], n: int) -> Tensor:
        """The rows of `compute(start, stop)` over items 0..n-1, n at least 1, as one tensor.

        Raises OutOfMemoryError, one line, where not even one item fits.
        """
        parts: list[Tensor] = []
        start = 0
        while start < n:
            stop = min(start + self.size, n)
            try:
                parts.append(compute(start, stop))
                start = stop
                continue
            except torch.cuda.OutOfMemoryError as error:
                said = str(error).splitlines()[0][:200]
            # Only here, where the error no longer holds what was computed, can its memory be freed.
            torch.cuda.empty_cache()
            if stop - start == 1:
                raise torch.cuda.OutOfMemoryError(
                    f"the GPU's memory is too small for a single image ({said}): give each actor more of a "
                    "GPU (compute.actor_gpus=1, fewer compute.actors), or take a smaller model"
                )
            self.size = (stop - start) // 2
            logging.getLogger("dpt_ray").warning("out of GPU memory: batches of %d from here on", self.size)
        return torch.cat(parts)
