"""The training images of a network: in memory where they fit, else read from their files."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dpt_ray.data.crops import Crop
from dpt_ray.data.decode import Mode
from dpt_ray.data.pixels import count_rows, fits_memory, load_pixels
from dpt_ray.data.raw_images import RawImages
from dpt_ray.data.units import read_index
from dpt_ray.store.artifact import Artifact


def training_images(
    index: Artifact, how: Crop, max_bad_fraction: float, unreadable: Collection[str] = ()
) -> tuple[pa.Array, np.ndarray | RawImages]:
    """Return the ids (n,) and the pixels (n, H, W, C) uint8 of the training images.

    Those that do not fit into memory are read when asked for, but for the ids known as `unreadable`.
    """
    mode: Mode = index.manifest["mode"]
    if fits_memory(count_rows(index), how.size, mode):
        ids, pixels = load_pixels(index, how, mode)
        return pa.array(ids, pa.string()), pixels
    rows = read_index(index)
    lost = pc.is_in(rows["id"], value_set=pa.array(list(unreadable), pa.string()))
    rows = rows.filter(pc.and_(pc.equal(rows["split"], "train"), pc.invert(lost)))
    return rows["id"].combine_chunks(), RawImages(rows, how, mode, max_bad_fraction)
