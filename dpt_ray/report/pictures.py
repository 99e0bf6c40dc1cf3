"""Pictures of real and generated images side by side, as PNG bytes."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]
WHITE = 255
GAP_IN_GUTTERS = 4  # between the real and the generated block of one row


@dataclass(frozen=True)
class GridRow:
    """One class: its name, some real and some generated images, uint8 [H, W, 1 or 3]."""

    class_name: str
    real: Sequence[Pixels]
    generated: Sequence[Pixels]


def grid_png(rows: Sequence[GridRow], scale: int, gutter: int) -> bytes:
    """Return a PNG with one row per class: real images, a gap, generated images.

    Every pixel becomes a square of `scale` pixels (nearest neighbour). A white gutter of
    `gutter` pixels surrounds every image; between the two blocks lie `GAP_IN_GUTTERS` of them.
    Rows with fewer images than the longest are filled with white. A block empty in every row
    takes no room. Raises ValueError for images of different sizes or of another type.
    """
    height, width = _common_size(rows)
    cell_height, cell_width = scale * height, scale * width
    n_real = max(len(row.real) for row in rows)
    n_generated = max(len(row.generated) for row in rows)
    gap = (GAP_IN_GUTTERS - 1) * gutter if n_real and n_generated else 0
    n_columns = n_real + n_generated

    canvas = np.full(
        (
            gutter + len(rows) * (cell_height + gutter),
            gutter + n_columns * (cell_width + gutter) + gap,
            3,
        ),
        WHITE,
        dtype=np.uint8,
    )
    for r, row in enumerate(rows):
        top = gutter + r * (cell_height + gutter)
        placed = [(i, 0, image) for i, image in enumerate(row.real)]
        placed += [(n_real + i, gap, image) for i, image in enumerate(row.generated)]
        for column, shift, image in placed:
            left = gutter + column * (cell_width + gutter) + shift
            large = image.repeat(scale, axis=0).repeat(scale, axis=1)
            canvas[top : top + cell_height, left : left + cell_width] = large
    buffer = io.BytesIO()
    Image.fromarray(canvas).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def scale_to(rows: Sequence[GridRow], pixels: int) -> int:
    """Return the largest whole magnification (at least 1) that keeps images within `pixels`."""
    return max(1, pixels // max(_common_size(rows)))


def _common_size(rows: Sequence[GridRow]) -> tuple[int, int]:
    """Return the (height, width) that all images share; ValueError names the class if not."""
    size: tuple[int, int] | None = None
    for row in rows:
        for image in [*row.real, *row.generated]:
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (1, 3):
                raise ValueError(
                    f"class {row.class_name!r}: an image is {image.dtype} {image.shape}; "
                    "the grid takes uint8 [H, W, 1 or 3]"
                )
            size = size or (image.shape[0], image.shape[1])
            if size != image.shape[:2]:
                raise ValueError(
                    f"class {row.class_name!r}: an image is {image.shape[:2]}, an earlier one "
                    f"{size}; crop and resize them alike first"
                )
    if size is None:
        raise ValueError("the grid has no image; leave it out")
    return size
