"""The images of each training step, as a pure function of (seed, step).

Epochs, each with every row once, are concatenated; step s takes positions s * batch_size up to
(s + 1) * batch_size, so a batch may span epochs. The number of workers changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np

# Consecutive positions of a batch that share a random generator and a worker: seeding a generator per
# position costs more than the draws.
GROUP = 8

# The rows of a step's global batch, in the order of its positions.
Order = Callable[[int], np.ndarray]


@lru_cache(maxsize=2)
def _epoch_permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    permutation = np.random.default_rng([seed, epoch]).permutation(n)
    permutation.flags.writeable = False
    return permutation


def batch_rows(seed: int, step: int, batch_size: int, n: int) -> np.ndarray:
    """Return rows (batch_size,) int64 in 0..n-1 of the global batch of `step`, counted from 0.

    An epoch is one permutation of all n rows.
    Raises ValueError where seed or step is negative or batch_size or n is not positive.
    """
    _check(seed, step, batch_size, n)

    def piece_at(position: int) -> tuple[np.ndarray, int]:
        epoch, offset = divmod(position, n)
        return _epoch_permutation(seed, epoch, n), offset

    return _cut(piece_at, step * batch_size, (step + 1) * batch_size)


class ShardWindows:
    """A two-level shuffle for data sets that do not fit on a node.

    In each epoch the shards are permuted and split into windows of at most `per_window` shards, of nearly
    equal size; then the rows of each window are permuted. A batch spans at most two windows (more only if
    it is larger than a window), so a node needs the current window and the next one.

    The cost is that batches of a window are correlated. For a quantity with variance S between the means
    of shards and V over all rows, the mean of a batch of B rows from a window of N shards has variance
    near V/B + S/N * (1 - N/shards), against V/B with a full shuffle, and the second term is shared by all
    batches of the window. Where rows are distributed over shards at random, S is V over the rows of a
    shard, and the term is negligible for a window of many batches. Where each shard has one class (as a
    folder per class is listed), S is V, and N must be several times B.
    """

    def __init__(self, seed: int, batch_size: int, sizes: Sequence[int], per_window: int) -> None:
        """Set the rows of each shard, `sizes`. Raises ValueError without rows or for values out of range."""
        self.seed, self.batch_size, self.per_window = seed, batch_size, per_window
        self.sizes = np.asarray(sizes, np.int64)
        self.n = int(self.sizes.sum())
        _check(seed, 0, batch_size, self.n)
        self._first_rows = np.cumsum(self.sizes) - self.sizes
        self._nonempty = np.flatnonzero(self.sizes)
        self.windows = -(-len(self._nonempty) // per_window)  # of an epoch
        self._epoch = lru_cache(maxsize=2)(self._draw_epoch)
        self._window = lru_cache(maxsize=2)(self._draw_window)

    def __call__(self, step: int) -> np.ndarray:
        """Return rows (batch_size,) int64 of the global batch of `step`, counted from 0."""
        _check(self.seed, step, self.batch_size, self.n)

        def piece_at(position: int) -> tuple[np.ndarray, int]:
            number = self._number(position)
            epoch, window = divmod(number, self.windows)
            return self._window(number), position - epoch * self.n - int(self._epoch(epoch)[1][window])

        return _cut(piece_at, step * self.batch_size, (step + 1) * self.batch_size)

    def shards(self, step: int) -> np.ndarray:
        """Return the shards to hold at `step`: those of its rows' windows, then of the next window.

        While a batch spans two windows, only these are returned. Windows of at least two batches are thus
        requested before the step that first reads them.
        """
        first = self._number(step * self.batch_size)
        last = self._number((step + 1) * self.batch_size - 1)
        return np.concatenate([self._shards(number) for number in range(first, max(last, first + 1) + 1)])

    def _number(self, position: int) -> int:
        """Return the number of the window, over all epochs, at a position."""
        epoch, offset = divmod(position, self.n)
        return epoch * self.windows + int(np.searchsorted(self._epoch(epoch)[1], offset, side="right")) - 1

    def _shards(self, number: int) -> np.ndarray:
        epoch, window = divmod(number, self.windows)
        return self._epoch(epoch)[0][window]

    def _draw_epoch(self, epoch: int) -> tuple[list[np.ndarray], np.ndarray]:
        """Return the shards of each window of an epoch and the window's first position in the epoch."""
        shards = np.random.default_rng([self.seed, epoch]).permutation(self._nonempty)
        windows = np.array_split(shards, self.windows)
        rows = np.array([self.sizes[window].sum() for window in windows])
        return windows, np.cumsum(rows) - rows

    def _draw_window(self, number: int) -> np.ndarray:
        epoch, window = divmod(number, self.windows)
        ranges = [self._first_rows[k] + np.arange(self.sizes[k]) for k in self._shards(number)]
        return np.random.default_rng([self.seed, epoch, 1 + window]).permutation(np.concatenate(ranges))


def _cut(piece_at: Callable[[int], tuple[np.ndarray, int]], position: int, end: int) -> np.ndarray:
    """Return the rows at positions up to `end`.

    `piece_at` gives the permuted rows around a position and the position's index among them.
    """
    parts = []
    while position < end:
        rows, offset = piece_at(position)
        parts.append(rows[offset : offset + end - position])
        position += len(parts[-1])
    return np.concatenate(parts)


def _check(seed: int, step: int, batch_size: int, n: int) -> None:
    if seed < 0 or step < 0 or batch_size < 1 or n < 1:
        raise ValueError(
            f"seed {seed}, step {step}, batch_size {batch_size}, n {n}: "
            "seed and step start at 0, batch_size and n at 1"
        )


def share(count: int, part: int, parts: int, unit: int) -> tuple[int, int]:
    """Return (lo, hi), the positions lo..hi-1 of 0..count-1 that belong to `part` of `parts`.

    Parts are whole units of consecutive positions, of nearly equal number; count is a multiple of unit.
    """
    units = count // unit
    return units * part // parts * unit, units * (part + 1) // parts * unit
