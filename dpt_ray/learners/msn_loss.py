"""The loss of Masked Siamese Networks (MSN, arXiv 2204.07141).

Projections of masked anchor views and of one unmasked target view (by the EMA encoder) are assigned
to K learned prototypes; the anchors predict the target's sharpened assignment.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

ANCHOR_TEMPERATURE = 0.1  # tau of the assignments
SHARPENING = 0.25  # T of the targets


class MsnTerms(NamedTuple):
    """The two scalars of the loss cross_entropy + weight * entropy_gap.

    cross_entropy: of the anchors against their targets. entropy_gap: log K - H(mean prediction), 0
    where the predictions use all K prototypes equally.
    """

    cross_entropy: Tensor
    entropy_gap: Tensor


def msn_loss(
    anchors: Tensor,
    targets: Tensor,
    prototypes: Tensor,
    group: int,
    sinkhorn_iterations: int = 0,
    temperature: float = ANCHOR_TEMPERATURE,
    sharpening: float = SHARPENING,
) -> MsnTerms:
    """Return the terms of MSN's loss (Eq. 1), averaged over groups.

    anchors (V B, D) are ordered by view: first view of the whole batch, then the second, and so on.
    targets (B, D) get no gradient; prototypes (K, D); none need be normalised. The mean prediction and
    Sinkhorn, which couple rows, are computed within `group` consecutive rows, so that the loss does not
    depend on the number of workers. Raises ValueError where rows or groups do not fit.
    """
    if len(targets) % group or len(anchors) % len(targets):
        raise ValueError(
            f"{len(anchors)} anchors and {len(targets)} targets: make targets a multiple of the "
            f"group of {group} and anchors a multiple of targets"
        )
    with torch.autocast(anchors.device.type, enabled=False):
        q = msn_targets(targets, prototypes, group, sinkhorn_iterations, temperature, sharpening)
        log_p = log_assignments(anchors, prototypes, temperature).unflatten(0, (-1, len(targets)))
        # H(q, p) = -sum_k q_k log p_k
        cross_entropy = -(q * log_p).sum(-1).mean()

        # log mean(p) over views and images of each group, (B / group, K), in log space: the gradient
        # at a mean that underflows to 0 would be infinite.
        rows = len(log_p) * group
        log_mean = log_p.unflatten(1, (-1, group)).logsumexp((0, 2)) - math.log(rows)
        entropy = -(log_mean.exp() * log_mean).sum(-1)
        return MsnTerms(cross_entropy, math.log(len(prototypes)) - entropy.mean())


def log_assignments(z: Tensor, prototypes: Tensor, temperature: float) -> Tensor:
    """Return the log probabilities of the prototypes: (B, D) -> (B, K)."""
    # log p_k = log softmax_k(cos(z, prototype_k) / tau)
    cosines = F.normalize(z.float(), dim=1) @ F.normalize(prototypes.float(), dim=1).T
    return F.log_softmax(cosines / temperature, dim=1)


@torch.no_grad()
def msn_targets(
    targets: Tensor,
    prototypes: Tensor,
    group: int,
    sinkhorn_iterations: int = 0,
    temperature: float = ANCHOR_TEMPERATURE,
    sharpening: float = SHARPENING,
) -> Tensor:
    """Return the soft targets q (B, K) of target projections (B, D); rows sum to 1.

    q_k is proportional to p_k^(1/sharpening); `sinkhorn_iterations` > 0 (MSN: 3) balances the use of the
    prototypes within each group.
    """
    log_q = F.log_softmax(log_assignments(targets, prototypes, temperature) / sharpening, dim=1)
    return sinkhorn(log_q.unflatten(0, (-1, group)), sinkhorn_iterations).flatten(0, 1).exp()


def sinkhorn(log_q: Tensor, iterations: int) -> Tensor:
    """Apply Sinkhorn-Knopp, as in SwAV (arXiv 2006.09882), to log assignments (..., B, K).

    Each iteration normalises the columns (all prototypes get the same total), then the rows.
    """
    for _ in range(iterations):
        log_q = F.log_softmax(F.log_softmax(log_q, dim=-2), dim=-1)
    return log_q
