"""FreeMatch's self-adaptive thresholds and fairness term (Wang et al. 2023, arXiv 2205.07246).

C classes; q (B, C) are the predictions of weak views, Q (B, C) those of strong views.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812


class AdaptiveThreshold(nn.Module):
    """A threshold for each class that follows the confidences met in training.

    Buffers, so that a checkpoint holds them: `level` (), `prediction` (C,) and `histogram` (C,).
    """

    level: Tensor
    prediction: Tensor
    histogram: Tensor

    def __init__(self, num_classes: int, momentum: float = 0.999) -> None:
        super().__init__()
        if not 0 < momentum < 1:
            raise ValueError(f"threshold_momentum {momentum}: must lie between 0 and 1")
        self.momentum = momentum
        # tau_0 = p~_0(c) = h~_0(c) = 1 / C
        self.register_buffer("level", torch.tensor(1 / num_classes))
        self.register_buffer("prediction", torch.full((num_classes,), 1 / num_classes))
        self.register_buffer("histogram", torch.full((num_classes,), 1 / num_classes))

    @torch.no_grad()
    def update(self, sums: Tensor) -> None:
        """Move the averages towards a batch, given the sum of its rows of `threshold_rows` (2C + 2,).

        Sums over workers and accumulated parts add up, so that the batch is the global one. Without rows
        (a supervised step) nothing moves.
        """
        classes = len(self.prediction)
        confidence, predicted, counted, rows = sums.split([1, classes, classes, 1])
        rate = (1 - self.momentum) * (rows > 0)[0]
        rows = rows.clamp(min=1)
        # tau_t = m tau_(t-1) + (1 - m) mean max q; p~_t likewise of q; h~_t of the one-hot of argmax q
        self.level.lerp_((confidence / rows)[0], rate)
        self.prediction.lerp_(predicted / rows, rate)
        self.histogram.lerp_(counted / rows, rate)

    def thresholds(self) -> Tensor:
        """Return the threshold of each class (C,)."""
        # tau_t(c) = p~_t(c) / max_c' p~_t(c') * tau_t
        return self.prediction / self.prediction.max() * self.level


def threshold_rows(weak: Tensor) -> Tensor:
    """Return what each prediction q (B, C) adds to the averages: (B, 2C + 2).

    The columns are its confidence, q, the one-hot of its class, and 1 for the number of rows.
    """
    confidence, classes = weak.max(1, keepdim=True)
    counted = F.one_hot(classes[:, 0], weak.shape[1]).to(weak.dtype)
    return torch.cat([confidence, weak, counted, torch.ones_like(confidence)], dim=1)


def fairness_loss(strong: Tensor, sure: Tensor, prediction: Tensor, histogram: Tensor) -> Tensor:
    """Return FreeMatch's fairness term L_f, a scalar; 0 where no element is sure.

    strong (B, C) are logits of the strong views; sure (B,) bool says which weak views are above their
    threshold; prediction and histogram (C,) are those of `AdaptiveThreshold`. It is the negative
    cross-entropy of the two normalised class distributions, so minimising it spreads the predictions.
    """
    # p- = mean Q, h- = histogram of argmax Q, both over the sure elements
    probabilities = strong.float().softmax(1)
    weight = sure.to(probabilities.dtype)
    count = weight.sum().clamp(min=1)
    mean = weight @ probabilities / count
    counted = weight @ F.one_hot(probabilities.argmax(1), strong.shape[1]).to(weight.dtype) / count
    # L_f = -H(SumNorm(p~ / h~), SumNorm(p- / h-)); classes that were not predicted are left out
    target = _sum_norm(prediction, histogram)
    log_found = (_sum_norm(mean, counted) + 1e-12).log()
    return torch.where(sure.any(), (target * log_found).sum(), 0.0)


def _sum_norm(values: Tensor, counts: Tensor) -> Tensor:
    """Return values / counts, 0 where a count is 0, scaled to the sum 1."""
    ratio = torch.where(counts > 0, values / counts.clamp(min=1e-12), 0.0)
    return ratio / ratio.sum().clamp(min=1e-12)
