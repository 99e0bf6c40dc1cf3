"""What a run costs, computed before it starts: rows, bytes, floating-point operations, GPU hours.

A multiply-add counts as two operations. What no formula is at hand for is None.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dpt_ray.config import Config
from dpt_ray.stages.inception_statistics import KEPT, PART

# One H200: the dense bfloat16 rate measured for an 8192 matrix product, and the share of it that
# training code usually reaches (published anchors: 20 to 40%).
PEAK_FLOPS = 790e12
UTILISATION = 0.4

# By the start of the published file's name: operations per image at 224 pixels, and feature length.
MSN = {"vitb4": (0.896e12, 768), "vitl7": (0.723e12, 1024)}
# Stable Diffusion's autoencoder at 256 pixels; at other sizes in proportion to the pixels.
KL_ENCODE, KL_DECODE, KL_CHANNELS, KL_FACTOR = 0.273e12, 0.622e12, 4, 8
INCEPTION = 11.4e9  # at its 299 pixels
INCEPTION_BYTES = 8 * (2048**2 + 2023**2)  # the two co-moments of a part, float64


@dataclass(frozen=True)
class Cost:
    """`rows` of an artifact, its `bytes` on disk and the floating-point operations that make it."""

    rows: int | None = None
    bytes: float | None = None
    flops: float | None = None

    @property
    def gpu_hours(self) -> float | None:
        """Hours on one H200 at `UTILISATION` of `PEAK_FLOPS`."""
        return None if self.flops is None else self.flops / (UTILISATION * PEAK_FLOPS) / 3600


def costs(config: Config, images: Mapping[str, int] | None, classes: int | None) -> dict[str, Cost]:
    """The cost of the stages that work on images, by node name.

    `images` counts the images of each split; None where the index is not made yet, as `classes`.
    Sizes of generated images are those before compression, an upper bound.
    """
    everything = sum(images.values()) if images else None
    train = images.get("train", 0) if images else None
    generated = classes * config.generate.images_per_class if classes else None
    forward = _denoiser_flops(config)
    encode, decode = _autoencoder_flops(config)
    channels, side = _latents(config)
    variants = 2 if config.autoencoder.flips else 1
    moment_bytes = 2 * variants * 2 * channels * side**2  # float16; mean and logvar of each variant
    batches = config.diffusion.steps * config.diffusion.batch_size
    passes = config.generate.nfe * (1 if config.generate.guidance == 1 else 2)
    pixel_bytes = (1 if config.data.mode == "L" else 3) * config.data.image_size**2
    found = {
        "features": _features(config, everything),
        "moments": _times(train, moment_bytes, variants * encode),
        # A backward pass costs two forward ones.
        "denoiser": Cost() if config.diffusion.weights else Cost(train, None, 3 * forward * batches),
        "samples": _times(generated, pixel_bytes, passes * forward + decode),
    }
    if config.diffusion.condition != "none":
        found["sample_features"] = _features(config, generated)
    if config.evaluate.inception:
        measured = min(generated, config.evaluate.images or generated) if generated else None
        found["inception_samples"] = _inception(measured)
        found["inception_reference"] = _inception(images.get("test") if images else None)
    return found


def _inception(rows: int | None) -> Cost:
    if rows is None:
        return Cost()
    return Cost(rows, -(-rows // PART) * INCEPTION_BYTES + min(rows, KEPT) * 4 * 2048, rows * INCEPTION)


def _features(config: Config, rows: int | None) -> Cost:
    if config.encoder.kind == "pretrain":
        assert config.pretrain is not None  # checked by Config
        return _times(rows, 4 * config.pretrain.dim, None)
    name = Path(config.encoder.weights or "").name
    flops, dim = next((MSN[key] for key in MSN if name.startswith(key)), (None, None))
    return _times(rows, dim and 4 * dim, flops)


def _times(rows: int | None, bytes: float | None, flops: float | None) -> Cost:
    """The cost of so many rows of known cost each."""
    if rows is None:
        return Cost()
    return Cost(rows, None if bytes is None else rows * bytes, None if flops is None else rows * flops)


def _autoencoder_flops(config: Config) -> tuple[float, float]:
    """Operations to encode and to decode one image."""
    if config.autoencoder.kind == "identity":
        return 0.0, 0.0
    share = (config.data.image_size / 256) ** 2
    return share * KL_ENCODE, share * KL_DECODE


def _latents(config: Config) -> tuple[int, int]:
    """Channels and side of the latents."""
    if config.autoencoder.kind == "identity":
        return 1 if config.data.mode == "L" else 3, config.data.image_size
    return KL_CHANNELS, config.data.image_size // KL_FACTOR


def _denoiser_flops(config: Config) -> float:
    """Operations of one forward pass for one image."""
    from dpt_ray.models.uvit import UViTConfig, flops

    channels, side = _latents(config)
    model = config.diffusion.model.model_dump()
    return flops(UViTConfig(side, in_channels=channels, num_classes=1, **model))
