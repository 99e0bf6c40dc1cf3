"""Pictures for the report and a study's figure: real test images beside generated ones."""

from __future__ import annotations

import io

import numpy as np
import pyarrow.compute as pc
from PIL import Image

from dpt_ray.data.crops import Crop
from dpt_ray.data.shards import read_images
from dpt_ray.data.units import decode_rows, find_rows, read_index
from dpt_ray.report.pictures import GridRow
from dpt_ray.store.artifact import Artifact

CLASSES_SHOWN = 40


def picture_rows(index: Artifact, samples: Artifact, count: int) -> list[GridRow]:
    """For each class (of the first 40) so many real test images and generated images; no others are read."""
    classes = index.read_json("classes.json")[:CLASSES_SHOWN]
    generated = _generated_images(samples, len(classes), count)
    real = _real_images(index, len(classes), generated[0][0].shape[0], count)
    return [GridRow(name, real[label], generated[label]) for label, name in enumerate(classes)]


def real_rows(index: Artifact, side: int, count: int) -> list[GridRow]:
    """For each class (of the first 40) so many real test images, cropped to `side` pixels."""
    classes = index.read_json("classes.json")[:CLASSES_SHOWN]
    real = _real_images(index, len(classes), side, count)
    return [GridRow(name, images, []) for name, images in zip(classes, real, strict=True)]


def _generated_images(samples: Artifact, classes: int, count: int) -> list[list[np.ndarray]]:
    """The first `count` images of each class, or as many as there are: of the first few shards."""
    found: list[list[np.ndarray]] = [[] for _ in range(classes)]
    for table in read_images(samples):
        shown = table.filter(pc.less(table["class"], classes))
        for label, data in zip(shown["class"].to_pylist(), shown["image"], strict=True):
            if len(found[label]) < count:
                found[label].append(_pixels(data.as_py()))
        if all(len(images) == count for images in found):
            break
    return found


def _real_images(index: Artifact, classes: int, side: int, count: int) -> list[list[np.ndarray]]:
    """The first `count` test images of each class in the index, without those that cannot be read."""
    table = read_index(index, ["id", "split", "label"])
    test = table.filter(pc.and_(pc.equal(table["split"], "test"), pc.less(table["label"], classes)))
    chosen: list[list[str]] = [[] for _ in range(classes)]
    for identifier, label in zip(test["id"].to_pylist(), test["label"].to_pylist(), strict=True):
        if len(chosen[label]) < count:
            chosen[label].append(identifier)
    rows = find_rows(index, [identifier for ids in chosen for identifier in ids])
    found = decode_rows(rows, Crop("adm", side), index.manifest["mode"])
    return [[found[identifier] for identifier in ids if identifier in found] for ids in chosen]


def _pixels(png: bytes) -> np.ndarray:
    image = np.asarray(Image.open(io.BytesIO(png)))
    return image[:, :, None] if image.ndim == 2 else image
