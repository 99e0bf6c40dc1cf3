"""What an encoder of one's own images is worth: nearest neighbours and a linear classifier, against time.

    python benchmarks/encoder.py configs/cifar10.yaml [KEY=VALUE ...] [--minutes 2 8]

Without `--minutes` it measures the encoder of the configuration's run (trained first if there is none yet).
With it, an encoder is trained for each number of minutes instead, in this process and in a temporary
folder, with as many steps as they allow; a tenth of these and at most 100 are warm-up.

Both measurements use the true labels of ALL training images, far more than a run has, and the test images:
- the vote of the 200 nearest training images by cosine, weighted by exp(cosine / 0.1) (Wu et al. 2018,
  arXiv 1805.01978);
- multinomial logistic regression on row-normalised features, l2 = 0.0025 / n.

Writes benchmarks/results/encoder_NAME_DATE.md.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from machine import machine
from rich.console import Console

from dpt_ray.config import Config, load_config
from dpt_ray.data.decoded import iterate_pixels
from dpt_ray.data.rows import Rows, row_normalise
from dpt_ray.data.units import read_index
from dpt_ray.engine.progress import Display
from dpt_ray.learners.linear_classifier import logits
from dpt_ray.learners.linear_probe import fit
from dpt_ray.models.encoder import load_encoder
from dpt_ray.models.precision import resolve_precisions, resolved
from dpt_ray.pipeline.flow import flow
from dpt_ray.pipeline.run import run
from dpt_ray.store.artifact import Artifact, Store
from dpt_ray.training.log import read_log

RESULTS = Path(__file__).parent / "results"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NEIGHBOURS, TEMPERATURE = 200, 0.1
ITERATIONS = 300  # of the regression at most
TRIAL_STEPS = 20  # that the speed is measured by


class Encoded(NamedTuple):
    """Row-normalised features (n, dim) float32 and labels (n,) of training and of test images."""

    train: Rows
    test: Rows


def trained(config: Config) -> tuple[Artifact, Artifact, float]:
    """Return the index and the encoder of a run, made where they are missing, and the seconds it took."""
    started = time.perf_counter()
    run(config, Display(Console(quiet=True)), ("encoder",))
    seconds = time.perf_counter() - started
    nodes, store = flow(config), Store(config.output)
    return nodes["index"].artifact(store), nodes["encoder"].artifact(store), seconds


def budgeted(options: argparse.Namespace, folder: str, minutes: float) -> Config:
    """Return the configuration with as many steps as fit into the minutes."""

    def configured(name: str, steps: int, warmup: int) -> Config:
        own = [f"output={folder}/{name}", "compute.train_workers=0", "encoder.kind=pretrain"]
        length = [f"pretrain.steps={steps}", f"pretrain.warmup_steps={warmup}", "pretrain.log_every=5"]
        return load_config(options.config, [*options.overrides, *own, *length])

    _, encoder, _ = trained(configured("trial", TRIAL_STEPS, 0))
    # The fastest of a few readings: another process may have slowed the others.
    speed = max(record["images_per_s"] for record in read_log(encoder))
    trial = configured("trial", TRIAL_STEPS, 0)
    assert trial.pretrain is not None
    steps = max(TRIAL_STEPS, int(60 * minutes * speed / trial.pretrain.batch_size))
    return configured(f"{minutes:g}", steps, min(100, steps // 10))


def encoded(index: Artifact, folder: Artifact, config: Config) -> Encoded:
    """Return the features of all images."""
    precision = resolved(resolve_precisions(config).encoder.precision)
    encoder = load_encoder(folder.uri, precision).to(DEVICE)
    table = read_index(index, ["id", "label"])
    label = dict(zip(table["id"].to_pylist(), table["label"].to_pylist(), strict=True))

    def of(split: str) -> Rows:
        features, ids = [], []
        for found, pixels in iterate_pixels(index, encoder.crop, index.manifest["mode"], split):
            features.append(encoder(torch.from_numpy(pixels).to(DEVICE)).cpu().numpy())
            ids += found
        labels = np.array([label[identifier] for identifier in ids])
        return Rows(row_normalise(np.concatenate(features)), labels)

    return Encoded(of("train"), of("test"))


def neighbours(rows: Encoded, classes: int) -> float:
    """Return the top-1 of the weighted vote of the nearest training images."""
    train, test = (torch.from_numpy(part.features).to(DEVICE) for part in rows)
    labels = torch.from_numpy(rows.train.labels).to(DEVICE)
    right = 0
    for part, truth in zip(test.split(1000), torch.from_numpy(rows.test.labels).split(1000), strict=True):
        cosine, nearest = (part @ train.T).topk(NEIGHBOURS)  # row-normalised features have length 1
        votes = torch.zeros(len(part), classes, device=DEVICE)
        votes.scatter_add_(1, labels[nearest], (cosine / TEMPERATURE).exp())
        right += int((votes.argmax(1).cpu() == truth).sum())
    return right / len(test)


def linear(rows: Encoded, classes: int) -> float:
    """Return the top-1 of the logistic regression."""
    found = fit([rows.train], classes, device=DEVICE, max_iterations=ITERATIONS)
    return float((logits(rows.test.features, found.weights).argmax(1) == rows.test.labels).mean())


def line(config: Config, minutes: float | None) -> str:
    """Train and measure; return a line of the table."""
    index, encoder, seconds = trained(config)
    rows, classes = encoded(index, encoder, config), index.manifest["classes"]
    assert config.pretrain is not None
    records = read_log(encoder)
    seen = config.pretrain.steps * config.pretrain.batch_size
    speed = float(np.median([record["images_per_s"] for record in records[1:] or records]))
    values = [
        f"{minutes:g}" if minutes else "",
        f"{seconds:.0f}",
        f"{config.pretrain.steps}",
        f"{seen / len(rows.train.labels):.1f}",
        f"{speed:.0f}",
        f"{records[-1]['loss']:.3f}",
        f"{100 * neighbours(rows, classes):.1f}",
        f"{100 * linear(rows, classes):.1f}",
    ]
    text = f"| {' | '.join(values)} |\n"
    sys.stdout.write(text)
    sys.stdout.flush()
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", help="settings, KEY=VALUE")
    parser.add_argument("--minutes", type=float, nargs="+")
    options = parser.parse_intermixed_args()
    config = load_config(options.config, options.overrides)
    if options.minutes:
        with tempfile.TemporaryDirectory() as folder:
            lines = [line(budgeted(options, folder, minutes), minutes) for minutes in options.minutes]
    else:
        lines = [line(config, None)]
    settings = config.pretrain
    assert settings is not None
    text = f"""# The encoder of {config.name}, {datetime.now(UTC):%Y-%m-%d}

`python benchmarks/encoder.py {" ".join(sys.argv[1:])}`. {machine("torch", "timm")}

SimCLR of {settings.network} (width {settings.width}) with the views of {settings.augmentation}, batch \
{settings.batch_size}, contrast group {settings.contrast_group}, precision {settings.precision}. Images/s of \
the training, of two views each. Top-1 in % on the test images with the true labels of all training images: \
{NEIGHBOURS} nearest neighbours, and a linear classifier.

| minutes asked | seconds, reading included | steps | epochs | images/s | loss | neighbours | linear |
|---|---|---|---|---|---|---|---|
{"".join(lines)}"""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"encoder_{config.name}_{datetime.now(UTC):%Y-%m-%d}.md").write_text(text)


if __name__ == "__main__":
    main()
