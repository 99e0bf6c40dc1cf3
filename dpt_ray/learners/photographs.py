"""SimCLR's random views of small photographs (Chen et al. 2020, arXiv 2002.05709, App. A and B.9).

A view is one affine map of the coordinates and one of the colours, so that a batch takes a few tensor
operations on the device that trains.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from dpt_ray.training.random import StepRandom

# Of the crop: its area as a part of the image's, and its largest ratio of width to height.
AREA, ASPECT = (0.08, 1.0), 4 / 3
# Of the colours at strength 1, which is the 0.5 of SimCLR on CIFAR-10.
BRIGHTNESS = CONTRAST = SATURATION = 0.4
HUE = 0.1  # of a turn
JITTERED, GREY = 0.8, 0.2  # probabilities
LUMA = (0.299, 0.587, 0.114)
# Luma and the two colour differences that hue turns, from red, green and blue (NTSC).
YIQ = (LUMA, (0.595716, -0.274453, -0.321263), (0.211456, -0.522591, 0.311135))
NUMBERS = 11  # that a view is drawn from


def photograph_view(
    images: Tensor,
    random: StepRandom,
    name: str,
    strength: float = 1.0,
    area: tuple[float, float] = AREA,
) -> Tensor:
    """Return a random view of each image: cropped, resized, mirrored, recoloured, sometimes grey.

    images (B, 3, H, W) and views are float32 in [-1, 1], B = random.hi - random.lo. Equal positions and
    names give equal views. `strength` scales the changes of colour; `area` is the range of the crop's, as
    a part of the image's. There is no blur, as in SimCLR on
    32 pixels. Brightness, contrast, saturation and hue change in this order, where SimCLR draws the order,
    and values are clipped once, after them.
    """
    with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
        # All numbers at once: seeding a generator for each would cost more than drawing from it.
        drawn = random.uniform(name, (NUMBERS,))
        cropped = _crop(images.float(), drawn[:, :5], area)
        return _recolour(cropped, drawn[:, 5:], strength)


def _crop(images: Tensor, drawn: Tensor, between: tuple[float, float]) -> Tensor:
    """Return a random part of each image at its full size, mirrored with probability 1/2."""
    area, aspect, x, y, flip = drawn.unbind(1)
    # width * height = area, width / height = aspect; in units of the image's side, at most 1
    scale = (between[0] + (between[1] - between[0]) * area).sqrt()
    ratio = (math.log(ASPECT) * (2 * aspect - 1) / 2).exp()
    width, height = (scale * ratio).clamp(max=1), (scale / ratio).clamp(max=1)
    sign = torch.where(flip < 0.5, -1.0, 1.0)
    # x_image = sign * width * x_view + shift, in [-1, 1] across the image
    placement = images.new_zeros(len(images), 2, 3)
    placement[:, 0, 0], placement[:, 0, 2] = sign * width, (1 - width) * (2 * x - 1)
    placement[:, 1, 1], placement[:, 1, 2] = height, (1 - height) * (2 * y - 1)
    grid = F.affine_grid(placement, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def _recolour(images: Tensor, drawn: Tensor, strength: float) -> Tensor:
    """Return the images with random colours, those in [-1, 1] clipped to it."""
    jitter, grey = drawn[:, 0] < JITTERED, drawn[:, 1] < GREY
    spread = torch.where(jitter[:, None], strength * (2 * drawn[:, 2:] - 1), 0.0)
    brightness, contrast, saturation = (
        (1 + size * part).clamp(min=0)
        for size, part in zip((BRIGHTNESS, CONTRAST, SATURATION), spread.unbind(1), strict=False)
    )
    saturation = torch.where(grey, 0.0, saturation)
    rgb = (images.flatten(2) + 1) / 2  # (B, 3, H W) in [0, 1]
    yiq, from_yiq = _axes(images.device)
    mean = (yiq[0] @ rgb).mean(1) * brightness  # luma of the whole image

    # In the axes of luma and colour: brightness b scales all three, contrast c draws them to the mean luma m,
    # saturation s scales the colour and hue turns it: (Y, I, Q) -> (b c Y + (1 - c) m, b c s R(h) (I, Q)).
    scale = brightness * contrast
    cos, sin = (scale * saturation * turned for turned in _turn(HUE * spread[:, 3]))
    change = images.new_zeros(len(images), 3, 3)
    change[:, 0, 0] = scale
    change[:, 1, 1], change[:, 1, 2], change[:, 2, 1], change[:, 2, 2] = cos, -sin, sin, cos
    matrix = from_yiq @ change @ yiq
    recoloured = torch.baddbmm(((1 - contrast) * mean)[:, None, None], matrix, rgb)
    return (2 * recoloured - 1).clamp(-1, 1).unflatten(2, images.shape[2:])


@cache
def _axes(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the matrices to YIQ and back; a copy to a GPU at each step would wait for it."""
    yiq = torch.tensor(YIQ)
    return yiq.to(device), yiq.inverse().to(device)


def _turn(part: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of a part of a turn."""
    return (2 * math.pi * part).cos(), (2 * math.pi * part).sin()
