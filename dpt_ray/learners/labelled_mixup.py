"""Batch mixup and CutMix of the labelled images, as Semi-ViT (arXiv 2208.05688) trains on them.

mixup is arXiv 1710.09412, CutMix arXiv 1905.04899; torchvision's transforms of a batch are used.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torchvision.transforms import v2

from dpt_ray.learners.pseudo_mixup import check_groups
from dpt_ray.learners.weak_strong import view_keys
from dpt_ray.training.random import StepRandom

# (images (B, C, H, W), labels (B,) int64, random) -> mixed images and soft targets (B, num_classes)
LabelledMix = Callable[[Tensor, Tensor, StepRandom], tuple[Tensor, Tensor]]


def batch_mixup(
    num_classes: int, group: int, mixup: float = 0.8, cutmix: float = 1.0, smoothing: float = 0.1
) -> LabelledMix:
    """Return the mix of groups of `group` consecutive positions of the global batch: mixup or CutMix.

    Either is drawn with probability 1/2, with lambda ~ Beta(mixup, mixup) or Beta(cutmix, cutmix). One
    lambda and one box serve a group, by seed, step and position, where timm's "batch" mode, which the
    published code uses, draws one for the batch of a GPU. An image's partner is the one before it in its
    group.
    """
    either = v2.RandomChoice([v2.MixUp(alpha=mixup), v2.CutMix(alpha=cutmix)])

    def mix(images: Tensor, labels: Tensor, random: StepRandom) -> tuple[Tensor, Tensor]:
        check_groups(len(images), group)
        # x~ = lam x_i + (1 - lam) x_(i-1) or a box of x_(i-1);  y~ = lam LS(y_i) + (1 - lam) LS(y_(i-1))
        smooth = F.one_hot(labels, num_classes) * (1 - smoothing) + smoothing / num_classes
        keys = view_keys(random, "labelled_mixup")[::group]
        mixed = []
        # The transforms draw from torch's generator on the CPU, whichever device the images are on.
        with torch.random.fork_rng(devices=[]):
            for key, *part in zip(keys, images.split(group), smooth.split(group), strict=True):
                torch.default_generator.manual_seed(key)
                mixed.append(either(*part))
        pixels, targets = zip(*mixed, strict=True)
        return torch.cat(pixels), torch.cat(targets)

    return mix
