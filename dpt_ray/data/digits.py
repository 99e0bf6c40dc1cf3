"""scikit-learn's handwritten digits as an image data set that needs no download.

1,797 greyscale images of 8 x 8 pixels in 10 classes: the test part of the UCI Optical Recognition
of Handwritten Digits data.
"""

from __future__ import annotations

import io
import tarfile

import numpy as np
import pyarrow as pa
from PIL import Image

from dpt_ray.data.index import SCHEMA
from dpt_ray.data.splits import stratified_split
from dpt_ray.data.tar import index_tar
from dpt_ray.store.filesystem import url_to_fs

SPLIT_SIZES = {"train": 997, "validation": 200, "test": 600}
SPLIT_SEED = 0  # part of the data set: every run has the same splits


def write_digits(folder_uri: str) -> tuple[pa.Table, list[str]]:
    """Write digits.tar under the folder; return its index and classes ("0" to "9").

    The WebDataset tar has lossless 8 x 8 PNGs, mode L, "digit-0000" to "digit-1796" in scikit-learn's
    order, with grey values scaled to 0..255 by round(v * 255 / 16). The splits are fixed and stratified
    by class: train 997, validation 200, test 600.
    """
    from sklearn.datasets import load_digits  # seconds to import, and needed for these images only

    digits = load_digits()
    grey = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    fs, folder = url_to_fs(folder_uri)
    fs.makedirs(folder, exist_ok=True)
    path = f"{folder.rstrip('/')}/digits.tar"
    with fs.open(path, "wb") as file, tarfile.open(fileobj=file, mode="w") as tar:
        for i, (image, label) in enumerate(zip(grey, digits.target, strict=True)):
            _add(tar, f"digit-{i:04d}.png", _png(image))
            _add(tar, f"digit-{i:04d}.cls", str(label).encode())
    table, classes = index_tar(fs.unstrip_protocol(path), [str(c) for c in digits.target_names])
    splits = stratified_split(table["label"].to_pylist(), SPLIT_SIZES, SPLIT_SEED)
    split_column = pa.chunked_array([pa.array(splits, pa.string())])
    return table.set_column(4, SCHEMA.field("split"), split_column), classes


def _png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def _add(tar: tarfile.TarFile, name: str, payload: bytes) -> None:
    member = tarfile.TarInfo(name)  # owner 0 and time 0, for reproducible bytes
    member.size = len(payload)
    tar.addfile(member, io.BytesIO(payload))
