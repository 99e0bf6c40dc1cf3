"""The classifier of stages 1 and 3: multinomial logistic regression without intercept (RECIPES 1).

    L(W) = sum_i w_i CE(W f_i, y_i) / sum_i w_i + (lambda / 2) ||W||^2,    lambda = l2 / n

with n the number of rows. The penalty covers all of W, so the optimum is unique. MSN's published probe
(arXiv 2204.07141) and DPT (arXiv 2302.10586) use l2 = 0.0025 and w = 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

CHUNK = 65_536  # rows in double precision at a time: the only copy beside the features themselves


@dataclass(frozen=True)
class Problem:
    """Row-normalised features (n, dim) float32, labels (n,) int64, weights (n,) float32."""

    features: Tensor
    labels: Tensor
    weights: Tensor
    num_classes: int
    l2: float

    @property
    def penalty(self) -> float:
        """lambda = l2 / n."""
        return self.l2 / len(self.labels)

    def chunks(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(features, labels, weights) in double precision, the weights summing to 1 over all chunks."""
        total = self.weights.double().sum()
        for start in range(0, len(self.labels), CHUNK):
            part = slice(start, start + CHUNK)
            yield self.features[part].double(), self.labels[part], self.weights[part].double() / total

    def objective_and_gradient(self, W: Tensor) -> tuple[Tensor, Tensor]:
        """L(W) and dL/dW for W (C, dim) in double precision."""
        value = self.penalty / 2 * W.square().sum()
        gradient = self.penalty * W
        for features, labels, weights in self.chunks():
            logits = features @ W.T
            value = value + (weights * cross_entropy(logits, labels, reduction="none")).sum()
            # dCE/dlogits = softmax - onehot
            residual = logits.softmax(1) - one_hot(labels, self.num_classes)
            gradient = gradient + (weights[:, None] * residual).T @ features
        return value, gradient


@dataclass(frozen=True)
class Fit:
    """The weights (C, dim) float32 that were found, and how far the search went."""

    weights: np.ndarray
    objective: float
    gradient_norm: float
    iterations: int


def fit(
    features: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    *,
    weights: np.ndarray | None = None,
    l2: float = 0.0025,
    max_iterations: int | None = None,
    tolerance: float = 1e-3,
    device: str = "cpu",
) -> Fit:
    """The minimum of L by L-BFGS with strong Wolfe line search, from W = 0.

    `features` (n, dim) float32 are row-normalised already. L is lambda-strongly convex, so a gradient
    below `tolerance` * lambda leaves W within about `tolerance` of the optimum; the search stops there,
    or when L no longer changes in its twelfth decimal, or after `max_iterations` (the published fits
    stop early: 10,000 in stage 1, 100 in stage 3). Raises ValueError for a label outside
    0..num_classes-1 or a weight that is not positive.
    """
    if len(labels) == 0 or labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(f"labels must be one a row and lie in 0..{num_classes - 1}")
    if weights is not None and not (weights > 0).all():
        raise ValueError("row weights must be positive")
    ones = np.ones(len(labels), np.float32) if weights is None else weights.astype(np.float32)
    problem = Problem(
        torch.from_numpy(features).to(device),
        torch.from_numpy(labels.astype(np.int64)).to(device),
        torch.from_numpy(ones).to(device),
        num_classes,
        l2,
    )
    W = torch.zeros(num_classes, features.shape[1], dtype=torch.float64, device=device)
    W.requires_grad_()
    limit = max_iterations or 100_000
    search = torch.optim.LBFGS(
        [W],
        max_iter=limit,
        max_eval=limit * 25,  # the line search is not to end the fit
        tolerance_grad=tolerance * problem.penalty,
        tolerance_change=1e-12,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    @torch.no_grad()
    def closure() -> Tensor:
        value, W.grad = problem.objective_and_gradient(W)
        return value

    search.step(closure)
    value, gradient = problem.objective_and_gradient(W.detach())
    return Fit(
        W.detach().float().cpu().numpy(),
        float(value),
        float(gradient.norm()),
        int(search.state[W]["n_iter"]),
    )
