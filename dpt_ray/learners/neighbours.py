"""The nearest neighbours of feature rows by cosine, exact and by blocks, on the GPU if there is one."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

# Rows that are compared with as many others at a time: 64 MiB of similarities in float32.
BLOCK = 4096


def centre_and_normalise(features: np.ndarray) -> np.ndarray:
    """Subtract the mean row and divide each row (n, dim) by its L2 norm, in place; return the features.

    Unlike `row_normalise` it removes what all images share, so that cosines spread over [-1, 1].
    """
    centre = np.mean(features, axis=0, dtype=np.float64).astype(features.dtype)
    for start in range(0, len(features), BLOCK):
        part = features[start : start + BLOCK]
        part -= centre
        part /= np.maximum(np.linalg.norm(part, axis=1, keepdims=True), np.finfo(part.dtype).tiny)
    return features


def nearest(features: Tensor, start: int, stop: int, k: int, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """Return for the rows start..stop-1 their `k` nearest others: positions (m, k) and cosines, best first.

    `features` (n, dim) are normalised rows, float32, on any device. Beside them it needs (stop - start) x
    block x 4 bytes. Raises ValueError unless 1 <= k < n.
    """
    n = len(features)
    if not 1 <= k < n:
        raise ValueError(f"{k} neighbours among {n} images: each has {n - 1} others; ask for fewer")
    queries = features[start:stop]
    rows = torch.arange(start, stop, device=features.device)
    best = queries.new_empty(len(rows), 0)
    where = rows.new_empty(len(rows), 0)
    for first in range(0, n, block):
        found = queries @ features[first : first + block].T
        own = (rows >= first) & (rows < first + found.shape[1])
        found[own.nonzero()[:, 0], rows[own] - first] = -torch.inf
        values, columns = found.topk(min(k, found.shape[1]), dim=1)
        best, kept = torch.cat([best, values], 1).topk(min(k, best.shape[1] + values.shape[1]), dim=1)
        where = torch.cat([where, columns + first], 1).gather(1, kept)
    return where, best
