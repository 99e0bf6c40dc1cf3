"""An encoder and a classifier of its features as one network, for serving elsewhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from dpt_ray.models.encoder import Encoder

INPUT, OUTPUT = "pixels", "probabilities"


class Served(nn.Module):
    """From cropped pixels (B, H, W, C) uint8 to probabilities (B, classes), as `dpt predict` has them."""

    weights: Tensor

    def __init__(self, encoder: Encoder, weights: np.ndarray, temperature: float) -> None:
        """`weights` (classes, dim) are those of the classifier of row-normalised features."""
        super().__init__()
        self.encoder, self.temperature = encoder, temperature
        self.register_buffer("weights", torch.from_numpy(weights))

    def forward(self, pixels: Tensor) -> Tensor:
        """Return probabilities (B, classes)."""
        f = self.encoder(pixels)
        # r = (f - mean f) / ||f - mean f||;  p = softmax(W r / T)
        rows = F.normalize(f - f.mean(1, keepdim=True), dim=1)
        return (rows @ self.weights.T / self.temperature).softmax(1)


def write_onnx(served: Served, path: Path) -> None:
    """Write the network as one ONNX file; the number of images of a batch is free."""
    size, channels = served.encoder.crop.size, len(served.encoder.spec.mean)
    example = torch.zeros(2, size, size, channels, dtype=torch.uint8)
    with torch.no_grad():
        torch.onnx.export(
            served.eval(),
            (example,),
            path,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            external_data=False,
            dynamo=True,
            verbose=False,
        )
