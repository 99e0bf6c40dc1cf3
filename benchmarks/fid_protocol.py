"""What the resize and the draw of labels change in a Frechet distance, on real photographs.

    python benchmarks/fid_protocol.py DATA [--images 1000] [--pool 2000]

DATA holds `cifar10/` and `imagenette_128/` as Hugging Face publishes them (Parquet), and
`weights/efficientnet_lite0.safetensors`. FID's Inception is not at hand, so the distances are in the features
of EfficientNet-Lite0 (1,280, trained on ImageNet), at Inception's 299 pixels where the resize is compared and
at 112 where the draw is: their size is not FID's, their ratios tell how much a way of measuring matters.
Prints the rows of a file in benchmarks/results/.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import timm
import torch
from machine import machine
from PIL import Image
from torch.nn.functional import interpolate

from dpt_ray.evaluation.frechet import FeatureStatistics, frechet_distance
from dpt_ray.evaluation.inception import Resize, network_input
from dpt_ray.evaluation.label_draw import images_of_each_class
from dpt_ray.models.weights import load_strict, load_weights

RESIZES: tuple[Resize, ...] = ("tensorflow", "pytorch_fid", "clean")
REPEATS = 10


def read(folder: Path, split: str, count: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Images as RGB arrays and labels of `count` rows of a split, chosen at random."""
    table = pq.read_table(next(folder.glob(f"{split}-*.parquet")))
    chosen = np.sort(np.random.default_rng(0).permutation(len(table))[:count])
    rows = table.take(chosen)
    column = "img" if "img" in rows.column_names else "image"
    images = [
        np.asarray(Image.open(io.BytesIO(row["bytes"])).convert("RGB")) for row in rows[column].to_pylist()
    ]
    return images, rows["label"].to_numpy()


class Features:
    """EfficientNet-Lite0's pooled features of images that are resized in one of the ways."""

    def __init__(self, weights: Path) -> None:
        self.network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
        load_strict(self.network, load_weights(weights), weights)
        self.network.reset_classifier(0)
        self.network.eval().to(memory_format=torch.channels_last)

    @torch.inference_mode()
    def __call__(self, images: list[np.ndarray], resize: Resize | int) -> torch.Tensor:
        """(n, 1280), resized as for Inception or to so many pixels; both take [-1, 1]."""
        found = []
        for start in range(0, len(images), 25):
            batch = torch.from_numpy(np.stack(images[start : start + 25])).permute(0, 3, 1, 2)
            if isinstance(resize, int):
                x = interpolate(batch / 127.5 - 1, size=(resize, resize), mode="bilinear")
            else:
                x = network_input(batch, resize)
            found.append(self.network(x.contiguous(memory_format=torch.channels_last)))
        return torch.cat(found)


def resizes(name: str, features: Features, folder: Path, count: int) -> None:
    """Prints a row: mean input difference, and distances to real images resized as the statistics are."""
    split = "validation" if (folder / "validation-00000-of-00001.parquet").exists() else "test"
    images, _ = read(folder, split, count)
    target = FeatureStatistics.of(features(read(folder, "train", count)[0], "tensorflow"))
    few = torch.from_numpy(np.stack(images[:100])).permute(0, 3, 1, 2)
    inputs = {resize: network_input(few, resize) for resize in RESIZES}
    differ = [255 / 2 * float((inputs[r] - inputs["tensorflow"]).abs().mean()) for r in RESIZES[1:]]
    distances = [
        frechet_distance(FeatureStatistics.of(features(images, resize)), target) for resize in RESIZES
    ]
    more = [f"{value:.3f} ({value / distances[0] - 1:+.1%})" for value in distances[1:]]
    side = images[0].shape[0]
    cells: list[Any] = [name, side, *[f"{value:.2f}" for value in differ], f"{distances[0]:.3f}", *more]
    print("| " + " | ".join(map(str, cells)) + " |")


def draws(features: Features, folder: Path, pool: int) -> None:
    """Prints distances of balanced and of random labels, a quarter of the pool each, mean over draws."""
    images, labels = read(folder, "test", pool)
    found = features(images, 112)
    target = FeatureStatistics.of(features(read(folder, "train", pool // 2)[0], 112))
    classes = int(labels.max()) + 1
    n = pool // 4 // classes * classes
    distances: dict[str, list[float]] = {"balanced": [], "random": []}
    for repeat in range(REPEATS):
        order = np.random.default_rng(repeat).permutation(len(labels))
        place = np.empty(len(labels), int)  # of an image among those of its class, in this order
        for label in range(classes):
            mine = order[labels[order] == label]
            place[mine] = np.arange(len(mine))
        random = images_of_each_class(n, classes, repeat).numpy()
        for name, counts in (("balanced", np.full(classes, n // classes)), ("random", random)):
            chosen = place < counts[labels]
            assert chosen.sum() == counts.sum(), "a class runs short: measure fewer"
            distances[name].append(
                frechet_distance(FeatureStatistics.of(found[torch.from_numpy(chosen)]), target)
            )
    for name, values in distances.items():
        print(f"| {name} | {np.mean(values):.4f} | {np.std(values, ddof=1):.4f} |")
    more = np.array(distances["random"]) - np.array(distances["balanced"])
    print(f"\nrandom less balanced: {more.mean():+.4f} +- {more.std(ddof=1) / REPEATS**0.5:.4f} ({n} images)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--pool", type=int, default=2000)
    asked = parser.parse_args()
    torch.manual_seed(0)
    features = Features(asked.data / "weights" / "efficientnet_lite0.safetensors")
    print("| images | pixels | pytorch_fid | clean | distance: tensorflow | pytorch_fid | clean |")
    print("|---|---|---|---|---|---|---|")
    for name in ("cifar10", "imagenette_128"):
        resizes(name, features, asked.data / name, asked.images)
    print("\n| labels | distance | standard deviation over draws |\n|---|---|---|")
    draws(features, asked.data / "cifar10", asked.pool)
    print("\n" + machine("torch", "timm", "pillow", "numpy"))


if __name__ == "__main__":
    main()
