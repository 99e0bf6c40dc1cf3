"""Stages 1 and 2's passes on 10^4, 10^5 and 10^6 images: seconds, and the memory of driver and workers.

    python benchmarks/rows.py [--rows 10000 100000 1000000] [--samples 16000 160000]

The images are of 8 x 8 pixels, the networks as small as possible and hardly trained, so that the pipeline
itself is what takes the time: listing, decoding, Ray, publishing, joining by id. Each command is a driver
of its own, whose peak memory is that of its stages. Every row is checked: each image must have one
pseudo-label, and each generated image be there once.
Writes benchmarks/results/rows_DATE.md.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from common import dpt, write_result

from dpt_ray.config import Config
from dpt_ray.data.shards import encode_png, read_columns
from dpt_ray.pipeline.flow import flow
from dpt_ray.store.artifact import Store

CLASSES, DISTINCT, PER_FILE = 10, 1000, 100_000
CONFIG = """
name: rows
data: {source: parquet, mode: L, image_size: 8, validation: 1000, test: 1000}
labels: {per_class: 10, seed: 0}
pretrain:
  {steps: 20, batch_size: 64, contrast_group: 64, learning_rate: 4e-3, warmup_steps: 5, width: 8, dim: 16}
autoencoder: {kind: identity, flips: false}
diffusion:
  model: {patch_size: 4, dim: 16, depth: 2, heads: 1, modulation: true}
  schedule: cosine
  prediction: v
  steps: 20
  batch_size: 64
  learning_rate: 4e-3
  warmup_steps: 5
  ema_decay: 0.9
  label_dropout: 0.1
generate: {images_per_class: 1, nfe: 1}
retrain: {images_per_class: 1}
compute: {train_workers: 0, actors: 1, readers: 1, threads: 1}
"""
# The command, and the stage whose numbers are shown.
PASSES = {"index": "index", "pretrain": "encoder", "extract": "features", "pseudo-label": "pseudo_labels"}


def write_images(folder: Path, rows: int) -> None:
    """Write Parquet files of images of ten classes: DISTINCT ones, again and again."""
    rng = np.random.default_rng(0)
    centres = rng.integers(0, 200, (CLASSES, 8, 8, 1))
    labels = np.arange(DISTINCT) % CLASSES
    images = [
        encode_png((centres[label] + rng.integers(0, 56, (8, 8, 1))).astype(np.uint8)) for label in labels
    ]
    some = pa.table({"image": [{"bytes": image} for image in images], "label": labels})
    folder.mkdir()
    for number in range(-(-rows // PER_FILE)):
        n = min(PER_FILE, rows - number * PER_FILE)
        table = pa.concat_tables([some] * (n // DISTINCT))
        pq.write_table(table, folder / f"train-{number:05d}.parquet", row_group_size=DISTINCT)


def shown(config: Config, stage: str, rows: int) -> str:
    """Return a line of the table: a stage's seconds, images/s and memory."""
    found = flow(config)[stage].artifact(Store(config.output)).manifest
    seconds, mb = found["seconds"], 2**20
    peaks = [found.get(f"{who}peak_memory_bytes", 0) for who in ("driver_", "", "reader_")]
    memory = " | ".join(f"{peak / mb:.0f}" if peak else "" for peak in peaks)
    line = f"| {stage} | {rows:,} | {seconds:.1f} | {rows / seconds:,.0f} | {memory} |"
    print(line, flush=True)
    return line


def images(folder: Path, rows: int) -> list[str]:
    """Return the lines of the passes over `rows` real images."""
    write_images(folder / "images", rows)
    (folder / "rows.yaml").write_text(CONFIG)
    given = (f"data.uri={folder / 'images'}", f"output={folder / 'out'}")
    lines = []
    for command, stage in PASSES.items():
        config = dpt(command, folder / "rows.yaml", *given)
        lines.append(shown(config, stage, rows))
    labels = read_columns_of(config, "pseudo_labels", "id")
    assert len(labels) == len(set(labels)) == rows, "an image has no pseudo-label, or two"
    return lines


def generated(folder: Path, count: int) -> str:
    """Return the line of sampling `count` images, after the passes over real ones in this folder."""
    given = (f"data.uri={folder / 'images'}", f"output={folder / 'out'}")
    each = (f"generate.images_per_class={count // CLASSES}", f"retrain.images_per_class={count // CLASSES}")
    config = dpt("generate", folder / "rows.yaml", *given, *each)
    ids = read_columns_of(config, "samples", "id")
    assert len(ids) == len(set(ids)) == count, "an image is missing, or there twice"
    return shown(config, "samples", count)


def read_columns_of(config: Config, stage: str, column: str) -> list[str]:
    """Return a column of all rows of an artifact."""
    artifact = flow(config)[stage].artifact(Store(config.output))
    if artifact.manifest.get("shards"):
        return list(read_columns(artifact, [column])[column].to_pylist())
    [file] = Path(artifact.path("")).glob("*.parquet")
    return list(pq.read_table(file, columns=[column])[column].to_pylist())


def main() -> None:
    """Measure and write the result."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--samples", type=int, nargs="*", default=[16_000, 160_000])
    options = parser.parse_args()
    lines: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        for rows in options.rows:
            folder = Path(scratch, str(rows))
            folder.mkdir()
            lines += images(folder, rows)
        lines += [generated(Path(scratch, str(options.rows[0])), count) for count in options.samples]
    sizes = " ".join(map(str, options.rows)), " ".join(map(str, options.samples))
    how = (
        f"`python benchmarks/rows.py --rows {sizes[0]} --samples {sizes[1]}`: images of 8 x 8 pixels, "
        "networks as small as possible; one actor and one reading task. Every image has one pseudo-label, "
        "every generated image is there once."
    )
    columns = ("stage", "images", "s", "images/s", "driver MiB", "actor MiB", "reader MiB")
    write_result("rows", "The pipeline by number of images", how, columns, lines, ["ray"])


if __name__ == "__main__":
    main()
