"""The classifier of stages 1 and 3: multinomial logistic regression without intercept (RECIPES 1).

    L(W) = sum_i w_i CE(W f_i, y_i) / sum_i w_i + (lambda / 2) ||W||^2,    lambda = l2 / n

with n the number of rows. The penalty covers all of W, so the optimum is unique. MSN's published probe
(arXiv 2204.07141) and DPT (arXiv 2302.10586) use l2 = 0.0025 and w_i = 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.optimize import minimize
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
from torch import Tensor

from dpt_ray.data.rows import Rows

# Rows are converted to double precision a chunk at a time: the only copy besides the features.
CHUNK_BYTES = 8 * 2**20
GPU_CHUNK_BYTES = 2**30
TOLERANCE = 1e-3  # of a fit: distance of the weights from the optimum


@dataclass(frozen=True)
class Part:
    """Rows `index` of `features` (m, dim) float32 on any device, with `labels` (n,) and one weight."""

    features: Tensor
    labels: Tensor
    index: Tensor | None
    weight: float

    def chunks(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (features, labels) of at most `size` rows."""
        for start in range(0, len(self.labels), size):
            span = slice(start, start + size)
            rows = span if self.index is None else self.index[span]
            yield self.features[rows], self.labels[span]

    def moved(self, size: int, device: torch.device) -> Part:
        """Return the same rows on `device`, copied `size` at a time."""
        features = torch.empty(len(self.labels), self.features.shape[1], device=device)
        for target, (rows, _) in zip(features.split(size), self.chunks(size), strict=True):
            target.copy_(rows)
        return Part(features, self.labels, None, self.weight)


@dataclass(frozen=True)
class Problem:
    """L as the parts that it sums over, the rows `chunk` to convert at a time, and the penalty lambda."""

    parts: Sequence[Part]
    chunk: int
    penalty: float

    def objective_and_gradient(self, W: Tensor) -> tuple[Tensor, Tensor]:
        """Return L(W) and dL/dW for W (C, dim) in double precision."""
        total = sum(part.weight * len(part.labels) for part in self.parts)
        value = self.penalty / 2 * W.square().sum()
        gradient = self.penalty * W
        doubles = W.new_empty(self.chunk, W.shape[1])
        for part in self.parts:
            share = part.weight / total
            for rows, labels in part.chunks(self.chunk):
                features = doubles[: len(labels)].copy_(rows)
                value += share * _add_cross_entropy(W, features, labels, gradient, share)
        return value, gradient


def _add_cross_entropy(W: Tensor, features: Tensor, labels: Tensor, gradient: Tensor, share: float) -> Tensor:
    """Return sum_i CE(W f_i, y_i) and add `share` times its gradient to `gradient`."""
    log_probs = (features @ W.T).log_softmax(1)
    own = torch.arange(len(labels), device=W.device), labels
    loss = -log_probs[own].sum()
    # dCE / dlogits = softmax(logits) - onehot(y)
    residual = log_probs.exp_()
    residual[own] -= 1
    gradient.addmm_(residual.T, features, alpha=share)
    return loss


@dataclass(frozen=True)
class Fit:
    """The fitted weights (C, dim) float32, with the optimizer's final state."""

    weights: np.ndarray
    objective: float
    iterations: int


def fit(
    blocks: Sequence[Rows],
    num_classes: int,
    *,
    l2: float = 0.0025,
    max_iterations: int | None = None,
    device: str | None = None,
) -> Fit:
    """Minimise L over the rows of all blocks, by L-BFGS from W = 0.

    Features are neither copied nor changed. L is lambda-strongly convex, so a gradient below
    TOLERANCE * lambda leaves W within about TOLERANCE of the optimum. The search stops there, when
    the relative change of L falls below 1e-12, or after `max_iterations` (published fits: 10,000 in
    stage 1, 100 in stage 3). `device` defaults to the GPU if there is one. Raises ValueError for a
    label outside 0..num_classes-1, a weight that is not positive, or features that are not finite.
    """
    _check(blocks, num_classes)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    problem = problem_of(blocks, num_classes, l2, where)
    dim = blocks[0].matrix.shape[1]

    def objective_and_gradient(flat: np.ndarray) -> tuple[float, np.ndarray]:
        W = torch.from_numpy(flat).reshape(num_classes, dim).to(where)
        value, gradient = problem.objective_and_gradient(W)
        # Checked here, since L-BFGS stops silently at W = 0 where a row is not finite.
        if not (value.isfinite() & gradient.isfinite().all()):
            raise ValueError(_not_finite(blocks))
        return float(value), gradient.cpu().numpy().ravel()

    limit = max_iterations or 100_000
    options = {
        "maxiter": limit,
        "maxfun": limit * 25,  # never the first limit to be reached
        "gtol": TOLERANCE * problem.penalty,
        "ftol": 1e-12,
    }
    # L-BFGS's own vectors are too short to parallelise: BLAS threads that wait would take cores from
    # the chunks.
    with threadpool_limits(1, user_api="blas"):
        start = np.zeros(num_classes * dim)
        found = minimize(objective_and_gradient, start, jac=True, method="L-BFGS-B", options=options)
    weights = found.x.reshape(num_classes, dim).astype(np.float32)
    return Fit(weights, float(found.fun), int(found.nit))


def fit_stage(
    labelled: Rows,
    more: Rows | None,
    real_weight: float | str,
    num_classes: int,
    l2: float,
    max_iterations: int | None = None,
) -> Fit:
    """Return the classifier of labelled rows (weight `real_weight`) and further rows (weight 1).

    "balanced" gives the labelled rows together the weight of the others: n_more / n_labelled. There may be
    none of the others, where a filter let no image pass.
    """
    blocks = [labelled]
    if more:
        weight = len(more) / len(labelled) if real_weight == "balanced" else float(real_weight)
        blocks = [replace(labelled, weight=weight), more]
    return fit(blocks, num_classes, l2=l2, max_iterations=max_iterations)


def _check(blocks: Sequence[Rows], num_classes: int) -> None:
    for rows in blocks:
        labels, n = rows.labels, len(rows.matrix if rows.index is None else rows.index)
        if n == 0 or len(labels) != n or labels.min() < 0 or labels.max() >= num_classes:
            raise ValueError(f"labels must be one per row and lie in 0..{num_classes - 1}")
        if not rows.weight > 0:
            raise ValueError(f"row weights must be positive, not {rows.weight}")


def _not_finite(blocks: Sequence[Rows]) -> str:
    """Return why the objective is not finite, naming the first row that is not."""
    for number, rows in enumerate(blocks):
        for row in range(len(rows)) if rows.index is None else rows.index:
            if not np.isfinite(rows.matrix[row]).all():
                return (
                    f"features row {row} of block {number} is not finite; "
                    "recompute them with precision=float32, or leave that image out"
                )
    return "the objective is not finite; the features or weights are too large"


def problem_of(blocks: Sequence[Rows], num_classes: int, l2: float, device: torch.device) -> Problem:
    """Return L over the blocks, with the features on the GPU if they fit, else streamed to it in chunks."""
    n, dim = sum(map(len, blocks)), blocks[0].matrix.shape[1]
    chunk_bytes = GPU_CHUNK_BYTES if device.type == "cuda" else CHUNK_BYTES
    chunk = max(1, chunk_bytes // (8 * (dim + 2 * num_classes)))
    parts = [
        Part(
            torch.from_numpy(rows.matrix),
            torch.from_numpy(rows.labels.astype(np.int64)).to(device),
            None if rows.index is None else torch.from_numpy(rows.index.astype(np.int64)),
            rows.weight,
        )
        for rows in blocks
    ]
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        weights_and_gradient = 4 * 8 * num_classes * dim
        if 4 * n * dim + weights_and_gradient + 2 * chunk_bytes < 0.9 * free:
            parts = [part.moved(chunk, device) for part in parts]
    return Problem(parts, chunk, l2 / n)
