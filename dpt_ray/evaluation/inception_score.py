"""Streaming Inception Score (Salimans et al. 2016, arXiv 1606.03498)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class InceptionScore:
    """Per-split sums that determine exp(E_x KL(p(y|x) || p(y))); start from `empty`.

    `class_sums` (splits, C) is sum p(y|x), `entropy_sums` (splits,) is sum H(p(y|x)) in nats and
    `counts` (splits,) the number of rows, all float64 on the CPU.
    """

    class_sums: Tensor
    entropy_sums: Tensor
    counts: Tensor

    @classmethod
    def empty(cls, classes: int, splits: int = 10) -> InceptionScore:
        """Return the sums over no rows."""
        zeros = torch.zeros(splits, classes + 2, dtype=torch.float64)
        return cls(zeros[:, :classes], zeros[:, classes], zeros[:, classes + 1])

    def update(self, probabilities: Tensor, positions: Tensor) -> None:
        """Add class probabilities (n, C) of the images numbered `positions` (n,).

        An image belongs to split `position % splits`, independent of order and number of workers.
        """
        p = probabilities.detach().to("cpu", torch.float64)
        splits, classes = self.class_sums.shape
        if p.ndim != 2 or p.shape[1] != classes or positions.shape != p.shape[:1]:
            raise ValueError(
                f"probabilities {tuple(p.shape)} and positions {tuple(positions.shape)} do not "
                f"fit; pass (n, {classes}) and (n,)"
            )
        if not ((p >= 0).all() and ((p.sum(dim=1) - 1).abs() < 1e-2).all()):
            raise ValueError("rows of probabilities do not sum to 1; apply softmax to the logits")
        split = positions.detach().cpu().long() % splits
        self.class_sums = self.class_sums.index_add(0, split, p)
        self.entropy_sums = self.entropy_sums.index_add(0, split, torch.special.entr(p).sum(dim=1))
        self.counts = self.counts + torch.bincount(split, minlength=splits)

    def merge(self, other: InceptionScore) -> None:
        """Add another part's rows; the order of merging changes rounding only."""
        if self.class_sums.shape != other.class_sums.shape:
            raise ValueError(
                f"(splits, classes) are {tuple(self.class_sums.shape)} and "
                f"{tuple(other.class_sums.shape)}; use the same for every part"
            )
        self.class_sums = self.class_sums + other.class_sums
        self.entropy_sums = self.entropy_sums + other.entropy_sums
        self.counts = self.counts + other.counts

    def score(self) -> tuple[float, float]:
        """Return mean and standard deviation of the score, in [1, C], over the splits.

        The score grows with the rows per split: compare at equal counts (50,000 rows in 10 splits).
        """
        if (self.counts == 0).any():
            raise ValueError(
                f"{int(self.counts.sum())} rows leave one of {len(self.counts)} splits empty; "
                "add rows or lower splits"
            )
        # E KL(p(y|x) || p(y)) = H(E p(y|x)) - E H(p(y|x))
        marginal = self.class_sums / self.counts[:, None]
        information = torch.special.entr(marginal).sum(dim=1) - self.entropy_sums / self.counts
        scores = information.exp()
        return float(scores.mean()), float(scores.std(correction=0))
