"""CIFAR-10's own encoder on one GPU: SimCLR for so many seconds, then what its features are worth.

    python benchmarks/gpu_cifar.py FOLDER_OF_CIFAR10 [--seconds 150] [--batch 1024] [--features OUT]

It runs the stages `index` and `encoder` of the software in this process, without Ray, first for a few steps
to learn the speed, compiled and not, and then for as many steps as the seconds allow. The features are
measured with true labels: nearest neighbours and a linear classifier of all 50,000 training images, and the
paper's probe of a few labels per class (mean and standard error over 5 draws), on the test images, looked
at once. `--features` writes them in float16, in parts. Writes benchmarks/results/gpu_cifar_DATE.md.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import machine
from rich.console import Console

from dpt_ray.config import load_config
from dpt_ray.data.decoded import iterate_pixels
from dpt_ray.data.rows import Rows, row_normalise
from dpt_ray.data.units import read_index
from dpt_ray.engine.progress import Display
from dpt_ray.learners.linear_classifier import logits
from dpt_ray.learners.linear_probe import fit
from dpt_ray.models.encoder import load_encoder
from dpt_ray.pipeline.flow import flow
from dpt_ray.pipeline.run import run
from dpt_ray.store.artifact import Store
from dpt_ray.training.log import read_log

RESULTS = Path(__file__).parent / "results"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PART = 15_000  # rows of a file of features
NEIGHBOURS, TEMPERATURE = 200, 0.1  # Wu et al. 2018, arXiv 1805.01978
CONFIG = """
name: gpu_cifar
output: {folder}/out
data: {{source: parquet, uri: {data}, mode: RGB, image_size: 32}}
labels: {{per_class: 4}}
pretrain:
  network: resnet
  width: {width}
  dim: 128
  augmentation: photographs
  steps: {steps}
  batch_size: {batch}
  contrast_group: {batch}
  temperature: 0.2
  learning_rate: 2e-3
  warmup_steps: {warmup}
  lr_schedule: cosine
  ema_decay: 0.99
  precision: {precision}
  checkpoint_every: 1000000
  log_every: 10
autoencoder: {{kind: identity}}
diffusion:
  model: {{dim: 64, depth: 2, heads: 1}}
  steps: 1
  batch_size: 8
  learning_rate: 1e-4
generate: {{images_per_class: 1}}
retrain: {{images_per_class: 1}}
compute: {{train_workers: 0, compile: {compile}}}
"""


def trained(folder: Path, steps: int, compiled: bool, options: argparse.Namespace) -> dict[str, Any]:
    """Makes the encoder of a run; its artifacts, the images/s of its log and the seconds in all."""
    values = {"folder": folder, "data": options.data, "steps": steps, "batch": options.batch}
    values |= {"warmup": min(100, steps // 10), "compile": str(compiled).lower(), "width": options.width}
    values["precision"] = "bfloat16" if DEVICE == "cuda" else "float32"
    (folder / "cifar.yaml").write_text(CONFIG.format(**values))
    config = load_config(folder / "cifar.yaml")
    started = time.perf_counter()
    run(config, Display(Console()), ("encoder",))
    seconds = time.perf_counter() - started
    nodes, store = flow(config), Store(config.output)
    made = {name: nodes[name].artifact(store) for name in ("index", "encoder")}
    records = read_log(made["encoder"])
    settled = [record["images_per_s"] for record in records[len(records) // 2 :]]
    waits = [record["data_wait"] for record in records[len(records) // 2 :]]
    told = {"images_per_s": float(np.median(settled)), "data_wait": float(np.mean(waits))}
    return {**made, **told, "seconds": seconds, "mfu": records[-1].get("mfu"), "loss": records[-1]["loss"]}


def extracted(made: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features (n, dim) float32, labels and whether a row is of a test image."""
    index = made["index"]
    encoder = load_encoder(made["encoder"].uri, "bfloat16" if DEVICE == "cuda" else "float32").to(DEVICE)
    table = read_index(index, ["id", "label", "split"])
    label = dict(zip(table["id"].to_pylist(), table["label"].to_pylist(), strict=True))
    features, labels, test = [], [], []
    with torch.no_grad():
        for split in ("train", "test"):
            for ids, pixels in iterate_pixels(index, encoder.crop, "RGB", split):
                features.append(encoder(torch.from_numpy(pixels).to(DEVICE)).cpu().numpy())
                labels += [label[identifier] for identifier in ids]
                test += [split == "test"] * len(ids)
    return np.concatenate(features), np.array(labels), np.array(test)


def neighbours(X: np.ndarray, y: np.ndarray, test: np.ndarray) -> float:
    """Top-1 of the weighted vote of the nearest training images by cosine."""
    rows = torch.nn.functional.normalize(
        torch.from_numpy(X).to(DEVICE) - torch.from_numpy(X[~test].mean(0)).to(DEVICE)
    )
    known, right = torch.from_numpy(y).to(DEVICE), 0
    is_test = torch.from_numpy(test).to(DEVICE)
    train, classes = rows[~is_test], known[~is_test]
    for part, truth in zip(rows[is_test].split(1000), known[is_test].split(1000), strict=True):
        similarity, nearest = (part @ train.T).topk(NEIGHBOURS)
        votes = torch.zeros(len(part), 10, device=DEVICE)
        votes.scatter_add_(1, classes[nearest], (similarity / TEMPERATURE).exp())
        right += int((votes.argmax(1) == truth).sum())
    return right / int(is_test.sum())


def probe(X: np.ndarray, y: np.ndarray, test: np.ndarray, per_class: int | None, seed: int) -> float:
    """Top-1 of the logistic regression on so many labels per class (None: all), lambda 0.0025 / n."""
    rows = np.flatnonzero(~test)
    if per_class:
        random = np.random.default_rng(seed)
        rows = np.concatenate([random.choice(rows[y[rows] == k], per_class, False) for k in range(10)])
    found = fit([Rows(X, y[rows], rows)], 10, device=DEVICE, max_iterations=None if per_class else 300)
    return float((logits(X[test], found.weights).argmax(1) == y[test]).mean())


def measured(X: np.ndarray, y: np.ndarray, test: np.ndarray) -> list[str]:
    """Lines of the table."""
    X = row_normalise(X)
    lines = [f"| {NEIGHBOURS} nearest neighbours, all labels | {100 * neighbours(X, y, test):.1f} |"]
    lines.append(f"| linear classifier, all labels | {100 * probe(X, y, test, None, 0):.1f} |")
    for per_class in (1, 4, 25):
        found = [100 * probe(X, y, test, per_class, seed) for seed in range(5)]
        error = np.std(found, ddof=1) / len(found) ** 0.5
        lines.append(f"| probe, {per_class} per class | {np.mean(found):.1f} +- {error:.1f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("data", type=Path, help="the folder of CIFAR-10's Parquet files")
    parser.add_argument("--seconds", type=float, default=150)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--trial-steps", type=int, default=60)
    parser.add_argument("--features", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        trials = {}
        for compiled in (False, True) if DEVICE == "cuda" else (False,):
            folder = Path(name, f"trial-{compiled}")
            folder.mkdir()
            trials[compiled] = trained(folder, options.trial_steps, compiled, options)
            print(compiled, trials[compiled]["images_per_s"], trials[compiled]["seconds"], flush=True)
        best = max(trials, key=lambda kind: trials[kind]["images_per_s"])
        steps = max(20, int(options.seconds * trials[best]["images_per_s"] / options.batch) // 10 * 10)
        made = trained(Path(name), steps, best, options)
        X, y, test = extracted(made)
        lines = measured(X.copy(), y, test)
        if options.features:
            for number, start in enumerate(range(0, len(X), PART)):
                rows = slice(start, start + PART)
                np.save(options.features / f"features_{number}.npy", X[rows].astype(np.float16))
            np.savez(options.features / "rows.npz", label=y.astype(np.int8), test=test)
    speeds = ", ".join(
        f"{'compiled' if kind else 'not compiled'} {trial['images_per_s']:.0f}"
        for kind, trial in trials.items()
    )
    epochs = steps * options.batch / int((~test).sum())
    text = f"""# CIFAR-10's own encoder on a GPU, {datetime.now(UTC):%Y-%m-%d}

`python benchmarks/gpu_cifar.py CIFAR10 --seconds {options.seconds:g} --batch {options.batch}`. \
{machine("torch", "timm")}

SimCLR of a ResNet-18 (width {options.width}, GroupNorm), batch {options.batch}, {steps} steps ({epochs:.0f} \
epochs) in {made["seconds"]:.0f} s, reading and compilation included. Images/s of the training (two views \
each): {speeds}; in the long one {made["images_per_s"]:.0f}, MFU {100 * (made["mfu"] or 0):.0f}%, data wait \
{100 * made["data_wait"]:.1f}%. Last loss {made["loss"]:.3f}. The images are CIFAR-10 re-saved as JPEG.

| on the 10,000 test images | top-1, % |
|---|---|
{chr(10).join(lines)}
"""
    print(text)
    RESULTS.mkdir(exist_ok=True)
    out = options.features or RESULTS
    (out / f"gpu_cifar_{datetime.now(UTC):%Y-%m-%d}.md").write_text(text)


if __name__ == "__main__":
    main()
