"""The crops of the encoder and of the autoencoder: PIL image to square uint8 array."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
from PIL import Image

from dpt_ray.data.decode import check_pixels

FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


@dataclass(frozen=True)
class Crop:
    """How to crop an image to `size` x `size` pixels.

    none: images have that size. eval: resize the short side to `resize`, then centre crop (the usual
    evaluation of classifiers). squash: resize both sides to `resize`, then centre crop (some timm
    models). adm: ADM's centre crop (arXiv 2105.05233), for latents.
    """

    kind: Literal["none", "eval", "squash", "adm"]
    size: int
    resize: int = 0
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"

    def __post_init__(self) -> None:
        if self.kind not in ("none", "eval", "squash", "adm"):
            raise ValueError(f"crop kind is {self.kind!r}; use one of none, eval, squash, adm")
        if self.interpolation not in FILTERS:
            raise ValueError(f"crop interpolation is {self.interpolation!r}; use bilinear or bicubic")
        if self.size < 1:
            raise ValueError(f"crop size is {self.size}; it must be at least 1 pixel")
        if self.kind in ("eval", "squash") and self.resize < self.size:
            raise ValueError(
                f"crop resize is {self.resize}, below size {self.size}; set resize to at least size"
            )

    def facts(self) -> dict[str, str | int]:
        """Return what somebody needs who crops elsewhere: the settings of this kind, or its steps."""
        if self.kind == "adm":
            steps = (
                f"halve both sides with a box filter while the shorter has {2 * self.size} pixels or more; "
                f"resize the shorter to {self.size}, bicubic; cut the centre, offsets rounded down"
            )
            return {"kind": self.kind, "size": self.size, "steps": steps}
        return {"kind": self.kind, "size": self.size} if self.kind == "none" else asdict(self)

    def __str__(self) -> str:
        """Return a description for tables."""
        if self.kind in ("eval", "squash"):
            sides = f"{self.resize} x {self.resize}" if self.kind == "squash" else f"{self.resize}"
            return f"{self.interpolation} {sides}, crop {self.size}"
        return f"ADM's centre crop {self.size}" if self.kind == "adm" else "none"


def crop(image: Image.Image, crop: Crop) -> np.ndarray:
    """Return the crop of an RGB or L image as uint8 [size, size, 3 or 1].

    Raises ValueError for kind "none" and an image of another size (a wrong setting), and `BadImage` for
    an image so elongated that resizing it would exceed PIL's pixel limit.
    """
    if crop.kind == "eval":
        image = _centre_rounded(_short_side(image, crop), crop.size)
    elif crop.kind == "squash":
        squashed = image.resize((crop.resize, crop.resize), FILTERS[crop.interpolation])
        image = _centre_rounded(squashed, crop.size)
    elif crop.kind == "adm":
        image = _adm(image, crop.size)
    elif image.size != (crop.size, crop.size):
        raise ValueError(
            f"crop kind none needs images of {crop.size} x {crop.size} pixels, got "
            f"{image.width} x {image.height}; use kind eval or adm, or set size to that of the images"
        )
    return np.array(image, dtype=np.uint8).reshape(crop.size, crop.size, -1)


def _short_side(image: Image.Image, crop: Crop) -> Image.Image:
    """Resize as torchvision's Resize(int): the long side is truncated, not rounded."""
    short, long = sorted(image.size)
    new_long = int(crop.resize * long / short)
    portrait = image.width <= image.height
    size = (crop.resize, new_long) if portrait else (new_long, crop.resize)
    if size == image.size:
        return image
    check_pixels(*size)
    return image.resize(size, FILTERS[crop.interpolation])


def _centre_rounded(image: Image.Image, size: int) -> Image.Image:
    """Crop as torchvision's CenterCrop: offsets rounded half to even."""
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    return image.crop((left, top, left + size, top + size))


def _adm(image: Image.Image, size: int) -> Image.Image:
    """Crop as ADM (arXiv 2105.05233): halve with BOX while possible, BICUBIC to the size, floor offsets.

    U-ViT (arXiv 2209.12152) and DPT (arXiv 2302.10586) use it for stage 2.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    new_size = (round(image.width * scale), round(image.height * scale))
    check_pixels(*new_size)
    image = image.resize(new_size, Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))
