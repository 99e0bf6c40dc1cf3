"""An encoder that is trained together with the linear classifier on its features."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.modules.batchnorm import _BatchNorm

from dpt_ray.learners.linear_classifier import HEAD, save_classifier
from dpt_ray.models.encoder import Encoder, apply_network, save_encoder
from dpt_ray.store.artifact import Artifact

HEAD_STD = 2e-5  # of a random head, Semi-ViT's


class FineTuned(nn.Module):
    """An encoder's network and a classifier of its row-normalised features: (B, C, H, W) -> (B, classes).

    Images are in [-1, 1]. The classifier is that of every other stage (`linear_classifier`), so what is
    trained here is used as an encoder and a classifier of their own. Batch normalisation keeps the statistics
    that it came with: those of a batch would depend on the number of workers, and mix labelled images with
    strong views of others.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, encoder: Encoder, weights: np.ndarray | Tensor) -> None:
        """`weights` (classes, dim) are those of the classifier to start from."""
        super().__init__()
        self.network, self.spec = encoder.network.requires_grad_(True), encoder.spec
        self.register_buffer("mean", encoder.mean.clone())
        self.register_buffer("std", encoder.std.clone())
        # W r = (W / sqrt(d)) LN(f), since the row r = (f - mean f) / ||f - mean f|| is LN(f) / sqrt(d)
        self.scale = math.sqrt(encoder.dim)
        self.head = nn.Parameter(torch.as_tensor(weights, dtype=torch.float32) / self.scale)

    def train(self, mode: bool = True) -> FineTuned:
        """Set the mode of all layers but batch normalisation, which stays in evaluation mode."""
        super().train(mode)
        for layer in self.modules():
            if isinstance(layer, _BatchNorm):
                layer.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, classes)."""
        x = ((images + 1) / 2 - self.mean) / self.std
        features = apply_network(self.network, self.spec, x).float()
        return F.linear(F.layer_norm(features, features.shape[1:], eps=1e-12), self.head)

    def freeze_unused(self, size: int) -> None:
        """Freeze what does not enter the features of an image of `size` pixels, such as MSN's last norm.

        Several workers would wait for its gradient forever.
        """
        self.eval()(torch.zeros(1, self.mean.numel(), size, size)).sum().backward()
        for parameter in self.parameters():
            parameter.requires_grad_(parameter.grad is not None)
        self.zero_grad()

    @property
    def weights(self) -> np.ndarray:
        """The weights (classes, dim) of the classifier of row-normalised features."""
        found: np.ndarray = (self.head.detach() * self.scale).cpu().numpy()
        return found


def publish(out: Artifact, trained: FineTuned, classes: Sequence[str], facts: Mapping[str, Any]) -> None:
    """Publish the network as an encoder's folder, with its classifier and the `facts` of it in `HEAD`."""
    encoder = Encoder(trained.network, trained.spec)
    out.publish_files(lambda folder: save_encoder(folder, encoder))
    save_classifier(out, trained.weights, classes, facts, HEAD)


def random_head(classes: int, dim: int, generator: Generator) -> Tensor:
    """Return weights (classes, dim) of a classifier that says next to nothing yet."""
    return torch.randn(classes, dim, generator=generator) * HEAD_STD * math.sqrt(dim)
