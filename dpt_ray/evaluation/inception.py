"""Inception-v3's features for FID, sFID and the Inception Score.

The network is the TensorFlow graph of 2015-12-05 of Heusel et al. 2017 (arXiv 1706.08500) as ported by
torch-fidelity; the weights come from a file. Layers and order of the features are those of ADM's
evaluator (Dhariwal & Nichol 2021, arXiv 2105.05233), so that its reference statistics apply.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from torch_fidelity.feature_extractor_inceptionv3 import (  # type: ignore[import-untyped]
    FeatureExtractorInceptionV3,
)
from torch_fidelity.interpolate_compat_tensorflow import (  # type: ignore[import-untyped]
    interpolate_bilinear_2d_like_tensorflow1x,
)

from dpt_ray.evaluation.inception_files import WEIGHTS, WHERE
from dpt_ray.models.weights import load_weights

SIZE = 299

Resize = Literal["tensorflow", "pytorch_fid", "clean"]


class Activations(NamedTuple):
    """Inception-v3's activations of B images, float32.

    `pool` (B, 2048) is for FID, KID, precision and recall. `spatial` (B, 2023) is for sFID (Nash et al.
    2021, arXiv 2103.03841): the first 7 channels of the 17 x 17 layer mixed_6/conv, channels last.
    `probabilities` (B, 1008) are for the Inception Score, without the last layer's bias, as in ADM's
    evaluator.
    """

    pool: Tensor
    spatial: Tensor
    probabilities: Tensor


def load_inception(path: str | Path, device: str = "cpu") -> FeatureExtractorInceptionV3:
    """Return the network in evaluation mode with the weights of a file, pickle or safetensors.

    Any weights of this network are accepted; results compare with published ones only with the published
    file (WEIGHTS, WEIGHTS_SHA256). Raises ValueError for a file that is missing, contains code, or is
    for another network.
    """
    try:
        tensors = load_weights(path)
    except ValueError as error:
        raise ValueError(f"{error}. {WHERE}") from error
    # The constructor unpickles without weights_only: pass it only what load_weights has checked.
    checked = io.BytesIO()
    torch.save(tensors, checked)
    checked.seek(0)
    try:
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], checked)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: not the weights of FID's Inception, {WEIGHTS}: {reason}") from error
    return network.to(device)


@torch.no_grad()
def activations(
    network: FeatureExtractorInceptionV3, images: Tensor, resize: Resize = "tensorflow"
) -> Activations:
    """Return the activations of uint8 `images` (B, H, W, C), on the device of the network.

    One channel is repeated to three. `resize` to 299 x 299 is

    - "tensorflow": the original graph's bilinear without antialiasing, with pixel positions at corners
      (ADM's evaluator, which made the reference statistics of ImageNet);
    - "pytorch_fid": PyTorch's bilinear without antialiasing, with pixel positions at centres
      (pytorch-fid, with which U-ViT and DPT report their FID against ADM's statistics);
    - "clean": the antialiased bicubic of clean-fid (Parmar et al. 2022, arXiv 2104.11222).

    Values of different `resize` do not compare.
    """
    device = network.fc.weight.device
    x = network_input(_as_rgb(images).to(device), resize)
    # cuDNN's default TF32 would round float32 to ten bits.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for name, layer in network.named_children():  # in the order of the graph
            if name == "fc":
                break
            x = layer(x)
            if name == "Mixed_6d":
                # TensorFlow's mixed_6; its 1x1 branch, mixed_6/conv, comes first in the concatenation.
                spatial = rearrange(x[:, :7], "b c h w -> b (h w c)")
    pool = x.flatten(1)
    return Activations(pool, spatial, (pool @ network.fc.weight.T).softmax(1))


def network_input(x: Tensor, resize: Resize) -> Tensor:
    """Return uint8 images (B, 3, H, W) resized to 299 x 299, in about [-1, 1]; see `activations`."""
    if resize == "pytorch_fid":  # on [0, 1], then 2 x - 1, in pytorch-fid's order of operations
        size = (SIZE, SIZE)
        return 2 * interpolate(x.float() / 255, size=size, mode="bilinear", align_corners=False) - 1
    return ((_resized_tensorflow(x) if resize == "tensorflow" else _resized_clean(x)) - 128) / 128


def _as_rgb(images: Tensor) -> Tensor:
    """Return uint8 images (B, H, W, 1 or 3) as (B, 3, H, W)."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
        raise ValueError(
            f"images are {images.dtype} {tuple(images.shape)}; pass uint8 of (B, H, W, 3) or (B, H, W, 1)"
        )
    return rearrange(images, "b h w c -> b c h w").expand(-1, 3, -1, -1)


def _resized_tensorflow(x: Tensor) -> Tensor:
    """Resize as TensorFlow 1's resize_bilinear: pixel positions are corners, not centres."""
    return interpolate_bilinear_2d_like_tensorflow1x(x.float(), size=(SIZE, SIZE), align_corners=False)


def _resized_clean(x: Tensor) -> Tensor:
    """Resize each channel as PIL does in float32 (bicubic), clipped to 0..255 and not rounded."""
    channels = x.flatten(0, 1).float().cpu().numpy()
    bicubic = Image.Resampling.BICUBIC
    resized = [np.asarray(Image.fromarray(channel).resize((SIZE, SIZE), bicubic)) for channel in channels]
    return torch.from_numpy(np.stack(resized)).clamp(0, 255).reshape(*x.shape[:2], SIZE, SIZE).to(x.device)
