"""Random numbers keyed by position of the global batch, independent of the number of workers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dpt_ray.training.order import GROUP


class StepRandom:
    """The random numbers of positions lo..hi-1 of one step's global batch.

    Each (seed, step, group of 8 positions, name) seeds a generator on the CPU, so the numbers at a
    position do not depend on workers, micro-batches or devices. Drawing the same name twice in a step
    gives the same numbers. The copy to a GPU is asynchronous. Raises ValueError where lo or hi is not a
    multiple of 8.
    """

    def __init__(self, seed: int, step: int, lo: int, hi: int, device: torch.device | str = "cpu") -> None:
        if lo % GROUP or hi % GROUP or not 0 <= lo < hi:
            raise ValueError(
                f"positions {lo}..{hi} do not align with groups of {GROUP}: make the batch of every "
                f"worker and of every accumulated part a multiple of {GROUP}"
            )
        self.seed, self.step, self.lo, self.hi = seed, step, lo, hi
        self.device = torch.device(device)

    def normal(self, name: str, shape: Sequence[int] = ()) -> Tensor:
        """Return standard normal float32 numbers (hi-lo, *shape)."""
        return self._draw(name, shape, torch.float32, lambda x, g: x.normal_(generator=g))

    def uniform(self, name: str, shape: Sequence[int] = ()) -> Tensor:
        """Return uniform float32 numbers in [0, 1), (hi-lo, *shape)."""
        return self._draw(name, shape, torch.float32, lambda x, g: x.uniform_(generator=g))

    def integers(self, name: str, high: int, shape: Sequence[int] = ()) -> Tensor:
        """Return uniform int64 numbers in 0..high-1, (hi-lo, *shape)."""
        return self._draw(name, shape, torch.int64, lambda x, g: x.random_(high, generator=g))

    def _draw(
        self,
        name: str,
        shape: Sequence[int],
        dtype: torch.dtype,
        fill: Callable[[Tensor, torch.Generator], Tensor],
    ) -> Tensor:
        # Pinned memory makes the copy asynchronous.
        numbers = torch.empty(self.hi - self.lo, *shape, dtype=dtype, pin_memory=self.device.type == "cuda")
        generator = torch.Generator()
        for i, block in enumerate(numbers.split(GROUP)):
            key = f"{self.seed}/{self.step}/{self.lo // GROUP + i}/{name}"
            digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
            fill(block, generator.manual_seed(int.from_bytes(digest, "little")))
        return numbers.to(self.device, non_blocking=True)
