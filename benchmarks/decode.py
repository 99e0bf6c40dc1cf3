"""What an image costs a core on its way to the encoder and the autoencoder: decoding and both crops.

    python benchmarks/decode.py [--images 64] [--rounds 5]

Ours (read a unit of the index, one decode, both crops, stacked) against loops as the public code of the
method has them, with a pass and a decode for each crop: PIL alone to uint8 arrays, and torchvision's
transforms to normalised float tensors. The images are parts of scikit-learn's photographs. All in one
process on one thread, in turn, so that they share whatever else the machine does. Seconds are those of
the processor. Writes benchmarks/results/decode_DATE.md.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from machine import HEIGHT, WIDTH, machine, write_photographs
from PIL import Image, features
from torchvision.transforms import CenterCrop, Compose, Normalize, Resize, ToTensor

from dpt_ray.data.crops import Crop
from dpt_ray.data.decoded import decode_unit
from dpt_ray.data.folder import index_folder
from dpt_ray.data.units import list_units, write_index
from dpt_ray.store.artifact import Artifact

RESULTS = Path(__file__).parent / "results"
ENCODER, LATENT = Crop("eval", 224, 256), Crop("adm", 256)
NAMES = {
    "ours": "`decode_unit`: one decode, both crops",
    "pil": "PIL, a decode for each crop",
    "torchvision": "torchvision's transforms, a decode for each crop",
}


def ours(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Both crops (n, H, W, 3) uint8 of the images of an index, as the extract stage reads them."""
    index = Artifact(str(folder / "index"))
    crops = {"encoder": ENCODER, "latent": LATENT}
    found = [decode_unit(index, unit, crops, "RGB")[1] for unit in list_units(index)]
    return tuple(np.concatenate([pixels[name] for pixels in found]) for name in crops)


def pil(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """The same with a decode for each crop."""
    files = sorted((folder / "images").rglob("*.jpg"))
    encoder = [np.array(_eval(Image.open(file).convert("RGB"))) for file in files]
    latent = [center_crop_arr(Image.open(file).convert("RGB"), 256) for file in files]
    return np.stack(encoder), np.stack(latent)


def torchvision(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Both as normalised float tensors (n, 3, H, W), with a decode for each."""
    files = sorted((folder / "images").rglob("*.jpg"))
    imagenet = Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    encoder = Compose([Resize(256), CenterCrop(224), ToTensor(), imagenet])
    half = Normalize((0.5,) * 3, (0.5,) * 3)
    latent = Compose([lambda image: center_crop_arr(image, 256), ToTensor(), half])
    return tuple(
        torch.stack([transform(Image.open(file).convert("RGB")) for file in files])
        for transform in (encoder, latent)
    )


def _eval(image: Image.Image) -> Image.Image:
    short = min(image.size)
    image = image.resize(tuple(int(256 * side / short) for side in image.size), Image.Resampling.BILINEAR)
    left, top = (round((side - 224) / 2) for side in image.size)
    return image.crop((left, top, left + 224, top + 224))


def center_crop_arr(image: Image.Image, size: int) -> np.ndarray:
    """The latents' crop, after ADM (arXiv 2105.05233)."""
    while min(image.size) >= 2 * size:
        image = image.resize(tuple(side // 2 for side in image.size), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize(tuple(round(side * scale) for side in image.size), Image.Resampling.BICUBIC)
    pixels = np.array(image)
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


def measure(folder: Path, rounds: int) -> dict[str, list[float]]:
    """Processor seconds of every loop in every round, after one that is not counted."""
    loops: dict[str, Callable[[Path], Any]] = {"ours": ours, "pil": pil, "torchvision": torchvision}
    for mine, theirs in zip(ours(folder), pil(folder), strict=True):
        assert np.array_equal(mine, theirs), "not the same crops"
    torchvision(folder)
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(rounds):
        for name, loop in loops.items():
            started = time.process_time()
            loop(folder)
            seconds[name].append(time.process_time() - started)
    return seconds


def table(seconds: dict[str, list[float]], images: int, rounds: int, size: int) -> str:
    """The result as Markdown."""
    lines = []
    for name, text in NAMES.items():
        ratio = median(b / a for a, b in zip(seconds["ours"], seconds[name], strict=True))
        each = median(seconds[name]) / images
        lines.append(f"| {text} | {1000 * each:.2f} | {1 / each:.0f} | {ratio:.2f} |")
    return f"""# Decoding and both crops, {datetime.now(UTC):%Y-%m-%d}

`python benchmarks/decode.py --images {images} --rounds {rounds}`

One thread of {machine("pillow", "torchvision", "numpy")}; libjpeg-turbo \
{features.version("libjpeg_turbo")}. {images} JPEGs of {WIDTH} x {HEIGHT} pixels, {size / 1000:.0f} kB on \
average. The crops are the encoder's (short side 256 bilinear, centre 224) and the latents' (ADM, 256). \
Seconds of the processor, medians of {rounds} rounds; ratios are medians of those within a round. PIL's \
crops are checked to be ours byte for byte.

| | ms an image | images/s for a core | time over ours |
|---|---|---|---|
{chr(10).join(lines)}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        size = write_photographs(folder / "images" / "class", options.images, options.images)
        index = Artifact(str(folder / "index"))
        index.publish({"units": write_index(index, index_folder(str(folder / "images"))[0])})
        seconds = measure(folder, options.rounds)
    text = table(seconds, options.images, options.rounds, size)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"decode_{datetime.now(UTC):%Y-%m-%d}.md").write_text(text)
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
