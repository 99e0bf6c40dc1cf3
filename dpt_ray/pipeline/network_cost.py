"""What networks cost: operations for an image, and how rows, bytes and operations become hours.

A multiply-add counts as two operations. Costs without a formula are None.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dpt_ray.config import Config, ConfigError
from dpt_ray.config.training import NetworkTraining
from dpt_ray.pipeline.speed import Rates

# One H200: the dense bfloat16 rate measured with an 8192 matrix product, and the range of the share that
# training code usually reaches (published anchors).
PEAK_FLOPS = 790e12
DATA_SHEET_TFLOPS = 989
LEAST_UTILISATION, UTILISATION = 0.2, 0.4

# By the prefix of the published file's name: operations per image at 224 pixels, and feature length.
MSN = {"vitb4": (0.896e12, 768), "vitl7": (0.723e12, 1024)}
# Stable Diffusion's autoencoder at 256 pixels; proportional to the pixels at other sizes.
KL_ENCODE, KL_DECODE, KL_CHANNELS, KL_FACTOR = 0.273e12, 0.622e12, 4, 8


@dataclass(frozen=True)
class Cost:
    """The `rows` of an artifact, its `bytes` on disk and the floating-point operations to make it.

    Operations are split into convolutional networks, transformers, and the fits of the linear classifier
    (double precision, on CPUs), whose rates differ on a machine.
    """

    rows: int | None = None
    bytes: float | None = None
    conv: float | None = None
    transformer: float | None = None
    fit: float | None = None

    @property
    def flops(self) -> float | None:
        """Return all operations."""
        return known_sum(self.conv, self.transformer, self.fit)

    @property
    def gpu_hours(self) -> float | None:
        """Return the hours of the networks on one H200 at `UTILISATION` of `PEAK_FLOPS`, the better end."""
        networks = known_sum(self.conv, self.transformer)
        return None if networks is None else networks / (UTILISATION * PEAK_FLOPS) / 3600

    def seconds(self, rates: Rates) -> float | None:
        """Return the seconds on a machine with these rates, as far as these are known."""
        parts = ((self.conv, rates.conv), (self.transformer, rates.transformer), (self.fit, rates.fit))
        return known_sum(*(flops / rate if rate and flops is not None else None for flops, rate in parts))


@dataclass(frozen=True)
class EncoderCost:
    """The feature length of an encoder and its operations per image."""

    dim: int | None = None
    conv: float | None = None
    transformer: float | None = None

    def cost(self, rows: int | None) -> Cost:
        """Return the cost of the features of `rows` images."""
        return times(rows, self.dim and 4 * self.dim, self.conv, self.transformer)

    @classmethod
    def of(cls, config: Config) -> EncoderCost:
        """Return those of a run's encoder, None what is not known of a file."""
        if config.encoder.kind == "pretrain":
            assert config.pretrain is not None  # checked by Config
            return cls.small(config.pretrain, config)
        if config.encoder.kind == "timm":
            return cls.timm(str(config.encoder.name), config.encoder.image_size)
        name = Path(config.encoder.weights or "").name
        flops, dim = next((MSN[key] for key in MSN if name.startswith(key)), (None, None))
        return cls(dim and dim * (config.encoder.blocks or 1), transformer=flops)

    @classmethod
    def small(cls, section: NetworkTraining, config: Config) -> EncoderCost:
        """Return those of a network that is trained on the run's own images."""
        import torch

        from dpt_ray.models.own_networks import own_network
        from dpt_ray.training.throughput import forward_flops

        channels, side = 1 if config.data.mode == "L" else 3, config.data.image_size
        network, spec = own_network(section, channels, side)
        # `Rates.conv` is measured with this network, also where it is a transformer.
        return cls(spec.dim, conv=forward_flops(network, torch.empty(1, channels, side, side)))

    @classmethod
    def timm(cls, name: str, image_size: int | None) -> EncoderCost:
        """Return those of timm's network `name`, at its own size or another."""
        import timm
        import torch

        from dpt_ray.training.throughput import forward_flops

        if not timm.is_model(name):  # reported by the flow
            return cls()
        with torch.device("meta"):
            network = timm.create_model(name, num_classes=0)
        channels, *sides = network.default_cfg["input_size"]
        image = torch.empty(1, channels, *([image_size] * 2 if image_size else sides))
        return cls(network.num_features, transformer=forward_flops(network, image))


def known_sum(*values: float | None) -> float | None:
    """Return the sum of the known values, None where all are unknown."""
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def times(
    rows: int | None, bytes: float | None, conv: float | None = None, transformer: float | None = None
) -> Cost:
    """Return the cost of `rows` rows from the cost of one."""
    if rows is None:
        return Cost()
    each = (None if value is None else rows * value for value in (bytes, conv, transformer))
    return Cost(rows, *each)


def autoencoder_flops(config: Config) -> tuple[float, float]:
    """Return the operations to encode and to decode one image."""
    if config.autoencoder.kind == "identity":
        return 0.0, 0.0
    share = (config.data.image_size / 256) ** 2
    return share * KL_ENCODE, share * KL_DECODE


def latents(config: Config) -> tuple[int, int]:
    """Return the channels and the side of the latents."""
    if config.autoencoder.kind == "identity":
        return 1 if config.data.mode == "L" else 3, config.data.image_size
    return KL_CHANNELS, config.data.image_size // KL_FACTOR


def denoiser_flops(config: Config) -> float:
    """Return the operations of one forward pass for one image."""
    from dpt_ray.models.uvit import UViTConfig, flops

    channels, side = latents(config)
    model = config.diffusion.model.model_dump()
    if side < 1 or side % model["patch_size"]:
        raise ConfigError(
            f"diffusion.model.patch_size {model['patch_size']} must divide the side of the latents, {side} "
            f"for data.image_size {config.data.image_size}"
        )
    return flops(UViTConfig(side, in_channels=channels, num_classes=1, **model))


def pixel_bytes(config: Config) -> int:
    """Return the bytes of an image's pixels."""
    return (1 if config.data.mode == "L" else 3) * config.data.image_size**2
