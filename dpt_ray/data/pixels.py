"""The decoded images of a training that holds all of them in memory."""

from __future__ import annotations

import numpy as np

from dpt_ray.config import ConfigError
from dpt_ray.data.crops import Crop
from dpt_ray.data.decode import Mode
from dpt_ray.data.decoded import iterate_pixels
from dpt_ray.data.units import list_units, split_of
from dpt_ray.store.artifact import Artifact

IN_MEMORY = 4 << 30  # bytes of decoded images at most


def load_pixels(
    images: Artifact, how: Crop, mode: Mode, split: str = "train"
) -> tuple[list[str], np.ndarray]:
    """Return the ids and the pixels (n, H, W, C) uint8 of a split, without unreadable images.

    The array is filled unit by unit: a worker holds one copy.
    """
    size, rows = how.size, count_rows(images, split)
    pixels = np.empty((rows, size, size, 1 if mode == "L" else 3), np.uint8)
    ids: list[str] = []
    for found, part in iterate_pixels(images, how, mode, split):
        pixels[len(ids) : len(ids) + len(found)] = part
        ids += found
    return ids, pixels[: len(ids)]


def fits_memory(rows: int, size: int, mode: Mode) -> bool:
    """Return whether so many square images of `size` pixels may be held decoded."""
    return rows * (1 if mode == "L" else 3) * size**2 <= IN_MEMORY


def check_fits(key: str, rows: int, size: int, mode: Mode, remedy: str) -> None:
    """Raise ConfigError, naming the section `key`, where so many square images do not fit into memory."""
    if not fits_memory(rows, size, mode):
        raise ConfigError(f"{key}: {rows} images of {size} pixels do not fit into memory; {remedy}")


def count_rows(images: Artifact, split: str = "train") -> int:
    """Return the number of images of a split, including unreadable ones."""
    return sum(unit["rows"] for unit in list_units(images) if split_of(unit) == split)
