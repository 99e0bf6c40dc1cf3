"""Export of generated images as WebDataset tars, ImageFolder or ADM's npz."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, groupby
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dpt_ray.data.decode import decode
from dpt_ray.store.artifact import Artifact

IMAGES_PER_TAR = 1000
ROWS = 256  # to read at a time: a shard may hold thousands of large images

# id, class id (None for an unconditional model), PNG file
Sample = tuple[str, int | None, bytes]


def iterate_samples(samples: Artifact, images_per_class: int, labelled: bool = True) -> Iterator[Sample]:
    """Yield the first `images_per_class` images of each class of a `samples` artifact, in shard order."""
    for rows in _batches(samples, images_per_class, ["id", "class", "image"]):
        columns = (rows[name].to_pylist() for name in ("id", "class", "image"))
        for identifier, label, image in zip(*columns, strict=True):
            yield identifier, label if labelled else None, image


def count_samples(samples: Artifact, images_per_class: int) -> int:
    """Return the number of images that `iterate_samples` yields, without reading images."""
    return sum(rows.num_rows for rows in _batches(samples, images_per_class, []))


def _batches(samples: Artifact, images_per_class: int, columns: list[str]) -> Iterator[pa.RecordBatch]:
    # Shards hold whole ranges of indices, so the last may go beyond `images_per_class`.
    for shard in samples.listed_shards():
        with pq.ParquetFile(samples.local_file(shard["file"]), memory_map=True) as file:
            for rows in file.iter_batches(ROWS, columns=[*columns, "index"]):
                yield rows.filter(pc.less(rows["index"], images_per_class))


def write_webdataset(folder: Path, samples: Iterable[Sample], classes: Sequence[str]) -> None:
    """Write samples-000000.tar and so on, of 1,000 images each: ID.png, then ID.cls (the class id).

    classes.json has the class names in class-id order. Owner and time are 0, for reproducible bytes.
    """
    _write_classes(folder, classes)
    for number, group in groupby(enumerate(samples), lambda item: item[0] // IMAGES_PER_TAR):
        with tarfile.open(folder / f"samples-{number:06d}.tar", "w") as tar:
            for _, (identifier, label, image) in group:
                _add(tar, f"{identifier}.png", image)
                if label is not None:
                    _add(tar, f"{identifier}.cls", str(label).encode())


def _add(tar: tarfile.TarFile, name: str, payload: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(payload)
    tar.addfile(member, io.BytesIO(payload))


def write_imagefolder(folder: Path, samples: Iterable[Sample], classes: Sequence[str]) -> None:
    """Write CLASSNAME/ID.png, the layout of torchvision's ImageFolder, and classes.json.

    ImageFolder numbers classes by sorted name; classes.json has the names in class-id order, which
    may differ ("10" sorts before "2"). Images without a class go to `unlabelled/`. Raises ValueError
    for a class name that is no valid folder name.
    """
    for name in classes:
        if Path(name).name != name or name.startswith("."):
            raise ValueError(f"class name {name!r} is no valid folder name; export as webdataset or npz")
    _write_classes(folder, classes)
    for name in classes or ["unlabelled"]:
        (folder / name).mkdir()
    for identifier, label, image in samples:
        name = "unlabelled" if label is None else classes[label]
        (folder / name / f"{identifier}.png").write_bytes(image)


def _write_classes(folder: Path, classes: Sequence[str]) -> None:
    folder.mkdir()
    if classes:
        (folder / "classes.json").write_text(json.dumps(list(classes), indent=1) + "\n")


def write_npz(path: Path, samples: Iterable[Sample], count: int) -> None:
    """Write ADM's sample file: arr_0 (count, H, W, 3) uint8 RGB and, with classes, arr_1 (count,) int64.

    ADM's evaluator (Dhariwal & Nichol 2021, arXiv 2105.05233) needs RGB, so greyscale images get three
    equal channels. Images are written one by one. Raises ValueError where their number is not `count`
    or their sizes differ.
    """
    pixels = ((identifier, label, np.asarray(decode(image))) for identifier, label, image in samples)
    first = next(pixels)
    shape = (count, *first[2].shape)
    labels = []
    with zipfile.ZipFile(path, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for identifier, label, image in chain([first], pixels):
                if image.shape != shape[1:]:
                    raise ValueError(
                        f"image {identifier} is {image.shape}, the first is {shape[1:]}; export as webdataset"
                    )
                file.write(image.tobytes())
                labels.append(label)
        if len(labels) != count:
            raise ValueError(f"expected {count} images, got {len(labels)}; pass the number of the samples")
        if labels[0] is not None:
            with archive.open("arr_1.npy", "w") as file:
                np.lib.format.write_array(file, np.array(labels, np.int64), allow_pickle=False)
