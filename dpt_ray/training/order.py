"""Which images a training step sees: a pure function of (seed, step)."""

from __future__ import annotations

from functools import lru_cache

import numpy as np


@lru_cache(maxsize=2)
def _epoch_permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    permutation = np.random.default_rng([seed, epoch]).permutation(n)
    permutation.flags.writeable = False
    return permutation


def batch_rows(seed: int, step: int, batch_size: int, n: int) -> np.ndarray:
    """Rows (batch_size,) int64 in 0..n-1 of the global batch of `step`, counted from 0.

    The epochs, one permutation of all n rows each, lie end to end; step s takes positions
    s * batch_size up to (s + 1) * batch_size of that line, so a batch may span epochs.
    Raises ValueError where seed or step is negative or batch_size or n is not positive.
    """
    if seed < 0 or step < 0 or batch_size < 1 or n < 1:
        raise ValueError(
            f"seed {seed}, step {step}, batch_size {batch_size}, n {n}: "
            "seed and step start at 0, batch_size and n at 1"
        )
    position, end = step * batch_size, (step + 1) * batch_size
    parts = []
    while position < end:
        epoch, start = divmod(position, n)
        stop = min(n, start + end - position)
        parts.append(_epoch_permutation(seed, epoch, n)[start:stop])
        position += stop - start
    return np.concatenate(parts)
