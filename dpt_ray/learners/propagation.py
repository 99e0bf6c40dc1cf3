"""Label propagation on the graph of nearest neighbours (Zhou et al. 2003; Iscen et al., arXiv 1904.04717)."""

from __future__ import annotations

import warnings

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

ALPHA = 0.99
SHARPNESS = 3  # gamma of Iscen et al., Eq. 9
MOST_ITERATIONS = 1000
TINY = float(np.finfo(np.float32).tiny)
COLUMNS = 32  # classes that are propagated at a time


def affinity(neighbours: np.ndarray, similarities: np.ndarray) -> sp.csr_array:
    """Return S (n, n) float32 from the positions (n, k) and the cosines (n, k) of each row's neighbours.

    An image without a neighbour of positive cosine has an empty row. At most 2 n k entries of 8 bytes.
    """
    n, k = neighbours.shape
    weights = np.maximum(similarities, 0).astype(np.float32) ** SHARPNESS
    starts = np.arange(0, n * k + 1, k, dtype=np.int64)
    A = sp.csr_array((weights.ravel(), neighbours.ravel().astype(np.int32), starts), shape=(n, n))
    # W = A + A^T,  S = D^-1/2 W D^-1/2 with D the row sums of W
    W = (A + A.T).tocsr()
    W.eliminate_zeros()
    degrees = np.asarray(W.sum(axis=1)).ravel()
    scale = np.divide(1, np.sqrt(degrees), out=np.zeros_like(degrees), where=degrees > 0)
    W.data *= np.repeat(scale, np.diff(W.indptr)) * scale[W.indices]
    return W


def propagate(
    S: sp.csr_array, positions: np.ndarray, labels: np.ndarray, num_classes: int, tolerance: float = 1e-3
) -> np.ndarray:
    """Return F (n, C) float32 >= 0, the class scores of every image, from the labelled ones.

    `positions` (m,) are the labelled rows of S, `labels` (m,) their classes. F solves (Iscen et al., Eq. 5)

        (I - alpha S) F = (1 - alpha) Y,    Y_ic = 1 for a label c of image i

    by conjugate gradients to a residual of `tolerance` times that of F = 0, and until they reach no further
    image (a step goes from an image to its neighbours), `COLUMNS` classes at a time and on the GPU if there
    is one: a class does not depend on another, so what is needed besides S and F is
    5 n COLUMNS numbers. Zhou et al.'s iteration F <- alpha S F + (1 - alpha) Y has the same limit. The
    balance of classes is left to `sinkhorn`, which scales columns as well. Raises ValueError, with the
    class id, for a class without a label.
    """
    if lost := sorted(set(range(num_classes)) - set(labels.tolist())):
        raise ValueError(f"label propagation needs a labelled image of every class: {lost} have none")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    matrix = _torch_csr(S).to(device)
    F = np.empty((S.shape[0], num_classes), np.float32)
    for first in range(0, num_classes, COLUMNS):
        block = slice(first, min(first + COLUMNS, num_classes))
        Y = torch.zeros(S.shape[0], block.stop - first)
        mine = (labels >= first) & (labels < block.stop)
        Y[torch.from_numpy(positions[mine]), torch.from_numpy(labels[mine] - first)] = 1 - ALPHA
        F[:, block] = _conjugate_gradients(matrix, Y.to(device), tolerance).cpu().numpy()
    # The solution has no negative entry; those are rounding.
    return np.maximum(F, 0, out=F)


def _torch_csr(S: sp.csr_array) -> Tensor:
    """Return the same matrix, and values, as a tensor: torch multiplies on all threads, scipy on one."""
    starts, columns = (torch.from_numpy(part.astype(np.int32)) for part in (S.indptr, S.indices))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that compressed tensors are new in torch
        return torch.sparse_csr_tensor(starts, columns, torch.from_numpy(S.data), S.shape)


def _conjugate_gradients(S: Tensor, Y: Tensor, tolerance: float) -> Tensor:
    """Return the solution F (n, b) of (I - alpha S) F = Y, whose matrix is positive definite."""
    F, residual, direction = torch.zeros_like(Y), Y.clone(), Y.clone()
    squared = residual.square().sum(dim=0)
    enough = tolerance**2 * squared
    reached = -1
    for _ in range(MOST_ITERATIONS):
        product = (S @ direction).mul_(-ALPHA).add_(direction)
        step = squared / (direction * product).sum(dim=0).clamp_min(TINY)
        F.addcmul_(step, direction)
        residual.addcmul_(step, product, value=-1)
        before, squared = squared, residual.square().sum(dim=0)
        if bool((squared <= enough).all()):
            # The residual is that of the images near the labels: others may have no score yet.
            further = int(F.any(dim=1).sum())
            if further == reached:
                break
            reached = further
        direction.mul_(squared / before.clamp_min(TINY)).add_(residual)
    return F
