"""Applying the linear classifier, and the rows it is fitted to (numpy alone: light workers load no torch)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

NORMALISED_AT_A_TIME = 4096


@dataclass(frozen=True)
class Rows:
    """Rows `index` (n,) of row-normalised `matrix` (m, dim) float32 with their class ids `labels` (n,).

    Without an `index` they are all of the matrix. `weight` is that of each row in a fit. The matrix is
    shared, so any number of selections of one set of features costs no more than their indices.
    """

    matrix: np.ndarray
    labels: np.ndarray
    index: np.ndarray | None = None
    weight: float = 1.0

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def features(self) -> np.ndarray:
        """The rows themselves (n, dim); a copy where there is an `index`."""
        return self.matrix if self.index is None else self.matrix[self.index]


def row_normalise(features: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """Each row (n, dim) less its own mean, divided by its L2 norm (DPT's and MSN's preprocessing).

    As in numpy, `out=features` overwrites them, so that no second copy is ever in memory.
    """
    normalised = np.empty_like(features) if out is None else out
    for start in range(0, len(features), NORMALISED_AT_A_TIME):
        part = slice(start, start + NORMALISED_AT_A_TIME)
        centred = features[part] - features[part].mean(axis=1, keepdims=True)
        norm = np.linalg.norm(centred, axis=1, keepdims=True)
        normalised[part] = centred / np.maximum(norm, np.finfo(features.dtype).tiny)
    return normalised


def logits(features: np.ndarray, W: np.ndarray) -> np.ndarray:
    """Decision values (n, C) of row-normalised features (n, dim) and weights (C, dim)."""
    return features @ W.T
