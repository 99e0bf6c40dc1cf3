"""init: a starting configuration for one's own images, from a look at them and at the few labels."""

from __future__ import annotations

import io
import re
import statistics
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.compute as pc
import yaml
from PIL import Image

from dpt_ray.config import ConfigError, load_config
from dpt_ray.data.index import read_bytes
from dpt_ray.data.labels import class_names, read_label_list
from dpt_ray.data.listing import open_root, walk_files
from dpt_ray.data.sources import INDEXERS

LOOKED_AT = 64  # images whose size is read
SIDES = (8, 16, 32, 64, 128, 256)
LARGEST_IN_PIXELS = 32  # above it latents and published weights are needed
HELD_OUT = 1000  # at most, of validation and of test images

SMALL = """\
# Small images: an encoder of their own and a denoiser on the pixels (see configs/digits.yaml).
pretrain:
  steps: 2000
  batch_size: {batch}
  contrast_group: {batch}
  learning_rate: 4e-3
  warmup_steps: 100
  lr_schedule: cosine
autoencoder: {{kind: identity}}
diffusion:
  model: {{patch_size: {patch}, dim: 256, depth: 6, heads: 4, modulation: true}}
  schedule: cosine
  prediction: v
  steps: 5000
  batch_size: {batch}
  learning_rate: 1e-3
  warmup_steps: 100
generate: {{images_per_class: 128, nfe: 25}}
retrain: {{images_per_class: 128}}
"""

LARGE = """\
# Larger images: published weights, which you bring (see configs/imagenet256_base.yaml).
encoder: {{kind: msn, weights: weights/vitb4_300ep.pth.tar, precision: bfloat16}}
autoencoder: {{kind: kl, weights: weights/autoencoder_kl.pth, precision: bfloat16}}
diffusion:
  model: {{patch_size: 2, dim: 512, depth: 12, heads: 8}}
  steps: 100000
  batch_size: 256
  learning_rate: 2e-4
  betas: [0.99, 0.99]
  warmup_steps: 5000
  ema_decay: 0.9999
  precision: bfloat16
  checkpoint_every: 2000
generate: {{images_per_class: 128, guidance: 1.4, indices_per_shard: 16}}
retrain: {{images_per_class: 128}}
"""

GPU = """\
# One GPU for training, one for the other models; without a GPU leave this out.
compute: {train_gpus: true, actor_gpus: 1}
"""


@dataclass(frozen=True)
class Found:
    """What a look at the images and the label list shows."""

    source: str
    index: pa.Table
    classes: list[str]
    named_by_list: bool
    labelled: int
    side: int
    mode: str

    def __str__(self) -> str:
        splits = pc.value_counts(self.index["split"]).to_pylist()
        counts = ", ".join(f"{entry['counts']} {entry['values']}" for entry in splits)
        return (
            f"{counts} images as {self.source}; {self.labelled} labels of {len(self.classes)} classes; "
            f"{self.side} pixels, {self.mode}"
        )


def write_config(uri: str, labels: str, out: Path | None) -> tuple[Path, Found]:
    """Writes a valid configuration for the images at `uri`; where it is, and what was found.

    Raises ConfigError where the file exists, or the images or the label list cannot be used.
    """
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", PurePosixPath(uri.rstrip("/")).stem).strip("-._") or "images"
    path = out or Path(f"{name}.yaml")
    if path.exists():
        raise ConfigError(f"out: {str(path)!r} exists; remove it or name another file with --out")
    try:
        found = look(uri, labels)
    except Exception as error:  # every kind of storage has errors of its own
        raise ConfigError(f"init: {' '.join(str(error).split()) or type(error).__name__}") from error
    try:
        path.write_text(_config_text(name, uri, labels, found, path), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"out: {str(path)!r} cannot be written ({error.strerror})") from error
    load_config(path)
    return path, found


def look(uri: str, labels: str) -> Found:
    """The index of the images, the label list checked against it, and the images' usual size."""
    source = _source(uri)
    index, classes = INDEXERS[source](uri)
    named_by_list = not classes
    if named_by_list:
        classes = class_names(labels)
    listed = read_label_list(labels, "csv", index, classes)
    side, mode = _size(index)
    return Found(source, index, classes, named_by_list, listed.num_rows, side, mode)


def _source(uri: str) -> str:
    """The kind of a source by the names of its files."""
    fs, root = open_root(uri)
    if fs.isfile(root):
        return "tar" if root.endswith(".tar") else "manifest"
    if not fs.exists(root):
        raise ValueError(f"{uri} does not exist; check the path and the credentials")
    suffixes = {PurePosixPath(name).suffix.lower() for name, _ in walk_files(fs, root)}
    return next((kind for kind in ("tar", "parquet") if f".{kind}" in suffixes), "folder")


def _size(index: pa.Table) -> tuple[int, str]:
    """The largest of SIDES that most images fill, and L where all are grey."""
    step = max(1, index.num_rows // LOOKED_AT)
    shorter, modes = [], set()
    for data in read_bytes(index.take(list(range(0, index.num_rows, step))[:LOOKED_AT])):
        try:
            with Image.open(io.BytesIO(data)) as image:
                shorter.append(min(image.size))
                modes.add(image.mode)
        except (OSError, Image.DecompressionBombError):
            continue  # unreadable images are the extract stage's to report
    if not shorter:
        raise ValueError("none of the images that were looked at can be read; check the source")
    median = statistics.median(shorter)
    side = max((side for side in SIDES if side <= median), default=SIDES[0])
    return side, "L" if modes <= {"1", "L"} else "RGB"


def _config_text(name: str, uri: str, labels: str, found: Found, path: Path) -> str:
    small = found.side <= LARGEST_IN_PIXELS
    mode = found.mode if small else "RGB"  # published weights take colour
    data: dict[str, object] = {"source": found.source, "uri": uri, "mode": mode}
    data["image_size"] = found.side
    if found.named_by_list:
        data["classes"] = found.classes
    if held_out := _held_out(found):
        data |= {"validation": held_out, "test": held_out, "keep_in_train": [labels]}
    train = found.index.num_rows - 2 * held_out
    batch = 64 if train >= 64 else 8
    recipe = (SMALL if small else LARGE).format(batch=batch, patch=max(1, found.side // 8))
    if not small or has_gpu():
        recipe += GPU
    head = f"# A starting point, written by `dpt init`: {found}.\n# Command:  dpt run {path}\n"
    start = {"name": name, "output": "outputs", "data": data, "labels": {"file": labels}}
    text = yaml.safe_dump(start, sort_keys=False, allow_unicode=True)
    return head + text + recipe


def has_gpu(devices: Path = Path("/dev")) -> bool:
    """Whether this machine has an NVIDIA GPU, by the driver's files: torch takes seconds to import."""
    return any(devices.glob("nvidia[0-9]*"))


def _held_out(found: Found) -> int:
    """How many validation and test images each to draw: a tenth, where true labels are known."""
    if found.named_by_list or set(pc.unique(found.index["split"]).to_pylist()) != {"train"}:
        return 0
    known = found.index.num_rows - found.index["label"].null_count
    return min(HELD_OUT, (known - found.labelled) // 10)
