"""Applying the linear classifier (numpy alone, so that light workers need not load torch)."""

from __future__ import annotations

import numpy as np


def row_normalise(features: np.ndarray) -> np.ndarray:
    """Each row (n, dim) less its own mean, divided by its L2 norm (DPT's and MSN's preprocessing)."""
    centred = features - features.mean(axis=1, keepdims=True)
    norm = np.linalg.norm(centred, axis=1, keepdims=True)
    return centred / np.maximum(norm, np.finfo(features.dtype).tiny)


def logits(features: np.ndarray, W: np.ndarray) -> np.ndarray:
    """Decision values (n, C) of row-normalised features (n, dim) and weights (C, dim)."""
    return features @ W.T
