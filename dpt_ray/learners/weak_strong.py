"""The weak and strong views of consistency training, by torchvision's and timm's transforms of uint8 images.

FixMatch (arXiv 2001.07685), FreeMatch (arXiv 2205.07246) and Semi-ViT (arXiv 2208.05688) take the
pseudo-label of an image from its weak view and train on its strong view.
"""

from __future__ import annotations

import contextlib
import random as python_random
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import v2

from dpt_ray.models.encoder import IMAGENET_MEAN
from dpt_ray.training.random import StepRandom
from dpt_ray.training.workload import Batch

JITTER = 0.4  # of brightness, contrast and saturation, in Semi-ViT's weak view
ERASING = 0.25  # probability of random erasing in Semi-ViT's strong view
CUTOUT = 0.25  # area of the square that FixMatch's strong view erases, as a part of the image's
KEYS = 2**62  # number of different keys of a view


# What draws the views of a batch: a workload's `prepare`.
Draw = Callable[[Batch, StepRandom], Batch]


class Views(NamedTuple):
    """A weak and a strong random transform of one uint8 image (C, H, W)."""

    weak: nn.Module
    strong: nn.Module


def small_image_views(size: int, mirror: bool = True) -> Views:
    """Return the views of FixMatch and FreeMatch, for small images of `size` pixels.

    Weak: mirrored with probability 1/2 (if `mirror`) and shifted by up to 1/8, reflected at the border.
    Strong: then RandAugment (two operations of magnitude 9 of 30), and a square of a quarter of the area
    erased.
    """
    shift = v2.RandomCrop(size, padding=size // 8, padding_mode="reflect")
    weak = [v2.RandomHorizontalFlip(), shift] if mirror else [shift]
    cutout = v2.RandomErasing(p=1.0, scale=(CUTOUT, CUTOUT), ratio=(1.0, 1.0), value=127)
    return Views(v2.Compose(weak), v2.Compose([*weak, v2.RandAugment(), cutout]))


def photograph_views(size: int, erasing: float = ERASING) -> Views:
    """Return the views of Semi-ViT, `size` pixels wide and high.

    Weak: a random part of the image, mirrored with probability 1/2, colours jittered. Strong: RandAugment
    instead of the jitter, and a part erased with probability `erasing` (to grey, where the published code
    erases to noise).
    """
    crop = [
        v2.RandomResizedCrop(size, interpolation=v2.InterpolationMode.BICUBIC, antialias=True),
        v2.RandomHorizontalFlip(),
    ]
    jitter = v2.ColorJitter(JITTER, JITTER, JITTER)
    erase = v2.RandomErasing(p=erasing, value=127)
    return Views(v2.Compose([*crop, jitter]), v2.Compose([*crop, RandAugment(size), erase]))


class RandAugment(nn.Module):
    """timm's RandAugment "rand-m9-mstd0.5-inc1" of a uint8 image (C, size, size), as Semi-ViT uses it.

    Two operations are drawn, and each is done with probability 1/2 at a magnitude ~ N(9, 0.5) of 10.
    """

    def __init__(self, size: int) -> None:
        from timm.data.auto_augment import rand_augment_transform  # slow to import

        super().__init__()
        options = {
            "translate_const": int(0.45 * size),
            "img_mean": tuple(round(255 * mean) for mean in IMAGENET_MEAN),
            "interpolation": Image.Resampling.BICUBIC,
            "magnitude_max": 9.99,  # at 10 an image would be posterized to 0 bits, which Pillow refuses
        }
        self.augment = rand_augment_transform("rand-m9-mstd0.5-inc1", options)

    def forward(self, image: Tensor) -> Tensor:
        """Return the augmented image; a grey one stays grey."""
        with _seeded(int(torch.randint(1 << 32, ()))):
            found = self.augment(Image.fromarray(image.expand(3, -1, -1).permute(1, 2, 0).numpy()))
        return torch.from_numpy(np.array(found)).permute(2, 0, 1)[: len(image)]


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed Python's and NumPy's global generators, from which timm draws; restore them afterwards."""
    before, numpy_before = python_random.getstate(), np.random.get_state()
    python_random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        python_random.setstate(before)
        np.random.set_state(numpy_before)


def batch_views(views: Views, labelled: nn.Module) -> Draw:
    """Return what draws the views of a batch {"image" (B, C, H, W), "unlabelled" (B, R, C, H, W), ...} uint8.

    It returns them in the place of the images, uint8 of the same shapes with the views' size: "labelled" by
    the transform `labelled`, "weak" and "strong".
    """

    def draw(batch: Batch, random: StepRandom) -> Batch:
        drawn = {name: value for name, value in batch.items() if name not in ("image", "unlabelled")}
        drawn["labelled"] = draw_views(batch["image"], labelled, view_keys(random, "labelled"))
        if (unlabelled := batch.get("unlabelled")) is not None:
            shape = unlabelled.shape[:2]
            for name, transform in views._asdict().items():
                keys = view_keys(random, name, shape[1])
                drawn[name] = draw_views(unlabelled.flatten(0, 1), transform, keys).unflatten(0, shape)
        return drawn

    return draw


def view_keys(random: StepRandom, name: str, per_position: int = 1) -> list[int]:
    """Return a key for each of `per_position` images at each position of the batch, in order."""
    on_cpu = StepRandom(random.seed, random.step, random.lo, random.hi)  # from a GPU they would be waited for
    return on_cpu.integers(name, KEYS, (per_position,)).flatten().tolist()


def draw_views(images: Tensor, transform: nn.Module, keys: Sequence[int]) -> Tensor:
    """Return a random view of each image: equal images and keys give equal views.

    images (B, C, H, W) and views are uint8, keys are B integers. The transforms draw from global generators,
    whose states are restored afterwards: call this where no other thread draws from them at the same time.
    """
    if images.dtype != torch.uint8:
        raise ValueError(f"images of dtype {images.dtype}: views are drawn of uint8 images")
    with torch.random.fork_rng(devices=[]), _one_thread():
        return torch.stack([_view(x, transform, key) for x, key in zip(images, keys, strict=True)])


def _view(image: Tensor, transform: nn.Module, key: int) -> Tensor:
    torch.default_generator.manual_seed(key)
    return transform(image)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Run torch on one thread: an operation on one small image costs less than waking the others."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def network_pixels(images: Tensor) -> Tensor:
    """Return uint8 images as float32 in [-1, 1]."""
    return images.float() / 127.5 - 1
