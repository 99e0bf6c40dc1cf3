"""The linear classifier's rows and predictions, in numpy alone: light workers load no torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

CHUNK_ROWS = 4096


@dataclass(frozen=True)
class Rows:
    """Rows `index` (n,) of row-normalised `matrix` (m, dim) float32 with their class ids `labels` (n,).

    `index` None means all rows; `weight` is each row's weight in a fit. The matrix is shared, so a
    selection of features costs no more memory than its indices.
    """

    matrix: np.ndarray
    labels: np.ndarray
    index: np.ndarray | None = None
    weight: float = 1.0

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def features(self) -> np.ndarray:
        """The rows (n, dim); a copy where there is an `index`."""
        return self.matrix if self.index is None else self.matrix[self.index]


def row_normalise(features: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """Return each row (n, dim) minus its mean, divided by its L2 norm (DPT's and MSN's preprocessing).

    As in numpy, `out=features` works in place.
    """
    normalised = np.empty_like(features) if out is None else out
    for start in range(0, len(features), CHUNK_ROWS):
        part = slice(start, start + CHUNK_ROWS)
        # f <- (f - mean(f)) / ||f - mean(f)||
        centred = features[part] - features[part].mean(axis=1, keepdims=True)
        norm = np.linalg.norm(centred, axis=1, keepdims=True)
        normalised[part] = centred / np.maximum(norm, np.finfo(features.dtype).tiny)
    return normalised


def logits(features: np.ndarray, W: np.ndarray) -> np.ndarray:
    """Return decision values (n, C) of row-normalised features (n, dim) for weights (C, dim)."""
    return features @ W.T
