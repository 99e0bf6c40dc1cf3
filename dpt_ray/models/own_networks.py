"""The networks of encoders that are trained on the run's own images; all take pixels in [-1, 1]."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, nn

from dpt_ray.config.training import NetworkTraining
from dpt_ray.data.crops import Crop
from dpt_ray.models.conv import SmallConvNet
from dpt_ray.models.encoder_spec import EncoderSpec
from dpt_ray.models.resnet import ResNet


def own_network(
    section: NetworkTraining, channels: int, size: int, generator: Generator | None = None
) -> tuple[nn.Module, EncoderSpec]:
    """Return the network of `section` and its description, for images (B, channels, size, size).

    `generator` draws the initial weights (default: torch's global state). Raises ValueError for a `network`
    that is neither one of this project nor a vision transformer of timm, and for a width that does not fit.
    """
    crop = Crop("adm", size)
    if section.network == "small_conv":
        small = SmallConvNet(channels, section.width, section.dim, generator)
        return small, conv_spec(small, crop)
    if section.network == "resnet":
        resnet = ResNet(channels, section.width, generator)
        return resnet, conv_spec(resnet, crop)
    assert section.patch_size is not None  # checked by NetworkTraining
    network = vision_transformer(section.network, channels, size, section.patch_size, generator)
    half = (0.5,) * channels
    spec = EncoderSpec(
        "timm", section.network, network.num_features, crop, half, half, patch_size=section.patch_size
    )
    return network, spec


def feature_dim(network: nn.Module) -> int:
    """Return the length of a feature of such a network (timm's have `num_features`)."""
    return int(getattr(network, "dim", None) or network.num_features)  # type: ignore[arg-type]


def conv_spec(network: SmallConvNet | ResNet, crop: Crop) -> EncoderSpec:
    """Return the description of a convolutional network of this project."""
    kind, half = "conv" if isinstance(network, SmallConvNet) else "resnet", (0.5,) * network.channels_in
    return EncoderSpec(kind, kind, network.dim, crop, half, half, width=network.width)


def vision_transformer(
    name: str, channels: int, size: int, patch_size: int, generator: Generator | None = None
) -> Any:
    """Return timm's vision transformer `name` for images of `size` pixels in patches of `patch_size`.

    Raises ValueError where timm has none of that name.
    """
    import timm  # slow to import, and unused by the other networks

    seed = int(torch.randint(1 << 62, (), generator=generator, device="cpu"))
    with torch.random.fork_rng(devices=[]):  # timm draws from the global generator
        torch.manual_seed(seed)
        try:
            network = timm.create_model(
                name, num_classes=0, in_chans=channels, img_size=size, patch_size=patch_size
            )
        except (RuntimeError, TypeError) as error:  # no such model; one without patches
            raise ValueError(
                f"network {name!r} is neither small_conv nor resnet nor a vision transformer of timm such as "
                f"vit_tiny_patch16_224 ({error})"
            ) from error
    if any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in network.modules()):
        raise ValueError(
            f"network {name!r} has batch normalisation, whose results depend on the number of workers: "
            "choose another one"
        )
    return network
