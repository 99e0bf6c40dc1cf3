"""Inference in batches that fit into the GPU's memory."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor


class Batches:
    """Compute items in batches of `size`, which is halved for good where GPU memory runs out."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, compute: Callable[[int, int], Tensor], n: int) -> Tensor:
        """Return the concatenated rows of `compute(start, stop)` over items 0..n-1, n at least 1.

        Raises OutOfMemoryError, one line, where not even one item fits.
        """
        rows: Tensor | None = None  # one tensor from the beginning: parts and their sum are twice the memory
        start = 0
        while start < n:
            stop = min(start + self.size, n)
            try:
                part = compute(start, stop)
                if rows is None:
                    rows = part.new_empty(n, *part.shape[1:])
                rows[start:stop] = part
                start = stop
                continue
            except torch.cuda.OutOfMemoryError as error:
                said = str(error).splitlines()[0][:200]
            # Outside the handler, since the error's traceback keeps the tensors of `compute` alive.
            torch.cuda.empty_cache()
            if stop - start == 1:
                raise torch.cuda.OutOfMemoryError(
                    f"a single image does not fit into the GPU's memory ({said}): give each actor more of a "
                    "GPU (compute.actor_gpus=1, fewer compute.actors), or use a smaller model"
                )
            self.size = (stop - start) // 2
            logging.getLogger("dpt_ray").warning("out of GPU memory: batch size reduced to %d", self.size)
        assert rows is not None
        return rows
