"""Supervised training of the referee, an encoder that is used for measurement only."""

from __future__ import annotations

from torch import Generator, Tensor, nn
from torch.nn import functional as F  # noqa: N812

from dpt_ray.learners.augmentations import View
from dpt_ray.training.random import StepRandom
from dpt_ray.training.workload import Batch, StepFn


class LabelledEncoder(nn.Module):
    """An encoder with a linear head: (B, C, H, W) in [-1, 1] -> logits (B, num_classes).

    `encoder` maps to (B, dim); `generator` draws the head's initial weights.
    """

    def __init__(self, encoder: nn.Module, dim: int, num_classes: int, generator: Generator) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(dim, num_classes)
        nn.init.normal_(self.head.weight, std=dim**-0.5, generator=generator)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, num_classes)."""
        return self.head(F.silu(self.encoder(images)))


def supervised_step(view: View, strength: float) -> StepFn:
    """Return the step function of cross-entropy on random views, for batches {"image", "label"}.

    label (B,) is int64; `view` draws the view of an image, with `strength`.
    """

    def step(model: nn.Module, batch: Batch, random: StepRandom) -> Tensor:
        logits = model(view(batch["image"], random, "view", strength))
        return F.cross_entropy(logits.float(), batch["label"])

    return step
