"""Probabilistic pseudo mixup of Semi-ViT (arXiv 2208.05688) and its loss.

Each unlabelled image is mixed with a partner in proportion to the teacher's confidences, so that the
more confident pseudo-label has the larger weight. The teacher's p = softmax(logits of the weak view)
gives the confidence o = max p and the pseudo-label y = argmax p.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812


class CutMix(NamedTuple):
    """The elements to cut and paste instead of blend, and the centres of their boxes.

    chosen (B,) bool (Semi-ViT: each with probability 0.5); centres (B, 2), vertical and horizontal,
    uniform in [0, 1).
    """

    chosen: Tensor
    centres: Tensor


class Mixed(NamedTuple):
    """Mixed images (B, C, H, W), soft targets (B, num_classes) and confidences (B,)."""

    images: Tensor
    targets: Tensor
    confidence: Tensor


def check_groups(positions: int, group: int) -> None:
    """Raise ValueError where groups of `group` positions do not fill the batch."""
    if positions % group:
        raise ValueError(
            f"{positions} positions are not a multiple of the mixing group of {group}: make the batch "
            "of every worker and accumulated part a multiple of it"
        )


def partners_within(keys: Tensor, group: int) -> Tensor:
    """Return a permutation pi (B,) within groups of `group` consecutive positions.

    keys (B,) are uniform random numbers per position, such as `StepRandom.uniform("partner")`. The
    published code permutes what is on one GPU, so its partners depend on the number of GPUs. A group takes
    the place of a GPU's batch: of the same size the partners are drawn from as many images, and they are
    the same for any number of workers. Raises ValueError where the groups do not fill the batch.
    """
    check_groups(len(keys), group)
    first = torch.arange(0, len(keys), group, device=keys.device)
    return (keys.unflatten(0, (-1, group)).argsort(dim=1, stable=True) + first[:, None]).flatten()


def pseudo_mixup(
    images: Tensor,
    labels: Tensor,
    confidence: Tensor,
    partners: Tensor,
    num_classes: int,
    smoothing: float = 0.1,
    cutmix: CutMix | None = None,
) -> Mixed:
    """Return each image mixed with its partner, weighted by confidence.

    images (B, C, H, W) are the strong views; labels (B,) int64 and confidence (B,) > 0 are the
    teacher's; partners (B,) int64 is a permutation pi. With `cutmix` the chosen elements get a box of
    their partner's pixels, and lambda becomes the fraction of their own pixels.
    """
    # lam_i = o_i / (o_i + o_pi(i))
    lam = confidence / (confidence + confidence[partners])
    own = lam[:, None, None, None]  # each pixel's weight of its own image
    if cutmix is not None:
        outside = ~cutmix_boxes(lam, cutmix.centres, images.shape[2], images.shape[3])
        own = torch.where(cutmix.chosen[:, None, None, None], outside[:, None].to(lam.dtype), own)
        lam = torch.where(cutmix.chosen, outside.to(lam.dtype).mean((1, 2)), lam)
    # x~_i = lam_i x_i + (1 - lam_i) x_pi(i);  y~_i likewise, from the smoothed labels
    mixed = own * images + (1 - own) * images[partners]
    smooth = F.one_hot(labels, num_classes) * (1 - smoothing) + smoothing / num_classes
    targets = lam[:, None] * smooth + (1 - lam[:, None]) * smooth[partners]
    # o~_i = max(o_i, o_pi(i))
    return Mixed(mixed.to(images.dtype), targets, torch.maximum(confidence, confidence[partners]))


def cutmix_boxes(lam: Tensor, centres: Tensor, height: int, width: int) -> Tensor:
    """Return the pixels of each element's box, bool (B, H, W): CutMix (arXiv 1905.04899, Eq. 2).

    A box has sqrt(1 - lam) of the image's height and width, rounded down, and is clipped at the
    border. lam (B,) in [0, 1]; centres (B, 2) in [0, 1).
    """
    part = (1 - lam).sqrt()

    def covered(size: int, centre: Tensor) -> Tensor:
        length = (size * part).long()
        start = (size * centre).long() - length // 2
        pixels = torch.arange(size, device=lam.device)
        return (pixels >= start[:, None]) & (pixels < (start + length)[:, None])

    return covered(height, centres[:, 0])[:, :, None] & covered(width, centres[:, 1])[:, None]


def pseudo_loss(logits: Tensor, targets: Tensor, confidence: Tensor, threshold: float) -> Tensor:
    """Return the scalar loss L_u of the mixed images.

    logits (B, num_classes) are the student's for the mixed images; targets and confidence are those
    of `pseudo_mixup`. Elements below the threshold count as 0 in the mean.
    """
    # L_u = 1/B sum_i 1[o~_i >= threshold] CE(logits_i, y~_i)
    loss = F.cross_entropy(logits.float(), targets.float(), reduction="none")
    return torch.where(confidence >= threshold, loss, 0.0).mean()
