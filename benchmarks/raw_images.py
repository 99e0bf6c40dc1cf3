"""What reading images at random costs against streaming them, by the kind of their source.

    python benchmarks/raw_images.py [--images 256] [--rounds 3]

JPEGs of ImageNet's size are read, decoded and cropped (short side 256, centre 256) as a training reads them:
once by `iterate_pixels`, unit by unit in order, and once by `RawImages` in batches of 32 of a permutation.
Both in this process on one thread, in turn; the pixels are checked to be equal. Parquet has row groups of
100 images, as Hugging Face datasets writes them, and is read with a cache that holds all of them and with one
that holds a single one: the worst case, a data set much larger than the cache. Seconds are those of the
processor, and the files are in the page cache. Writes benchmarks/results/raw_images_DATE.md.
"""

from __future__ import annotations

import argparse
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from machine import HEIGHT, WIDTH, machine, photographs, write_photographs

from dpt_ray.data import raw_images
from dpt_ray.data.crops import Crop
from dpt_ray.data.decoded import iterate_pixels
from dpt_ray.data.raw_images import RawImages
from dpt_ray.data.sources import INDEXERS
from dpt_ray.data.units import read_index, write_index
from dpt_ray.store.artifact import Artifact

RESULTS = Path(__file__).parent / "results"
CROP, BATCH, ROW_GROUP = Crop("eval", 256, 256), 32, 100
SMALL_CACHE = "parquet, cache of one row group"


def write_folder(folder: Path, count: int) -> None:
    write_photographs(folder / "class", count, count)


def write_tar(folder: Path, count: int) -> None:
    folder.mkdir()
    write_folder(folder.with_name("members"), count)
    with tarfile.open(folder / "train-0000.tar", "w") as tar:
        for file in sorted(folder.with_name("members").rglob("*.jpg")):
            tar.add(file, file.name)


def write_parquet(folder: Path, count: int) -> None:
    folder.mkdir()
    images = [{"bytes": data, "path": None} for data in photographs(count)]
    table = pa.table({"image": images})
    pq.write_table(table, folder / "train-00000.parquet", row_group_size=ROW_GROUP)


WRITERS: dict[str, Callable[[Path, int], None]] = {
    "folder": write_folder,
    "tar": write_tar,
    "parquet": write_parquet,
}


def published(kind: str, scratch: Path, count: int) -> Artifact:
    WRITERS[kind](scratch / kind, count)
    index = Artifact(str(scratch / f"{kind}-index"))
    index.publish({"units": write_index(index, INDEXERS[kind](str(scratch / kind))[0])})
    return index


def streamed(index: Artifact) -> np.ndarray:
    return np.concatenate([pixels for _, pixels in iterate_pixels(index, CROP, "RGB")])


def at_random(images: RawImages) -> np.ndarray:
    """The pixels of all rows, read in the order of a permutation."""
    order = np.random.default_rng(0).permutation(len(images))
    pixels = np.empty((len(images), 256, 256, 3), np.uint8)
    for start in range(0, len(images), BATCH):
        rows = order[start : start + BATCH]
        pixels[rows] = images[rows]
    return pixels


def seconds(work: Callable[[], np.ndarray], expected: np.ndarray) -> float:
    started = time.process_time()
    found = work()
    taken = time.process_time() - started
    assert np.array_equal(found, expected), "not the same pixels"
    return taken


def measure(kind: str, index: Artifact, rounds: int) -> tuple[float, float]:
    """Median seconds of the processor of streaming and of random access, for all images."""
    rows, expected = read_index(index), streamed(index)
    raw_images.CACHED = 1 if kind == SMALL_CACHE else 1 << 30
    images = RawImages(rows, CROP, "RGB", 0.0)
    pairs = [
        (seconds(lambda: streamed(index), expected), seconds(lambda: at_random(images), expected))
        for _ in range(rounds)
    ]
    in_order, randomly = zip(*pairs, strict=True)
    return median(in_order), median(randomly)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = []
    with tempfile.TemporaryDirectory() as scratch:
        indexes = {kind: published(kind, Path(scratch), options.images) for kind in WRITERS}
        for kind, index in {**indexes, SMALL_CACHE: indexes["parquet"]}.items():
            in_order, randomly = (1000 * s / options.images for s in measure(kind, index, options.rounds))
            speeds = f"{1000 / randomly:.0f} | {in_order / randomly:.2f}"
            lines.append(f"| {kind} | {in_order:.2f} | {randomly:.2f} | {speeds} |")
    text = f"""# Images read at random, {datetime.now(UTC):%Y-%m-%d}

`python benchmarks/raw_images.py --images {options.images} --rounds {options.rounds}`

One thread of {machine("pillow", "pyarrow", "numpy")}. {options.images} JPEGs of {WIDTH} x {HEIGHT} pixels, \
cropped to 256. Seconds of the processor, medians of {options.rounds} rounds.

| source | streamed, ms an image | at random, ms an image | at random, images/s for a core | speed |
|---|---|---|---|---|
{chr(10).join(lines)}
"""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"raw_images_{datetime.now(UTC):%Y-%m-%d}.md").write_text(text)
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
