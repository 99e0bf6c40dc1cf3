"""predict: label new images with the encoder, the crop and the best classifier of a run.

Everything runs in this process. An unreadable image is a row with its reason in `error`.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from PIL import Image
from rich.console import Console
from rich.progress import track

from dpt_ray.commands.best_classifier import Choice, best_classifier
from dpt_ray.config import Config, ConfigError
from dpt_ray.data.crops import Crop, crop
from dpt_ray.data.decode import DEEP, Mode, decode, is_deep
from dpt_ray.data.index import GapsError, read_bytes
from dpt_ray.data.listing import IMAGE_SUFFIXES, open_root, walk_files
from dpt_ray.data.manifest import index_manifest
from dpt_ray.data.parquet import has_images, index_parquet
from dpt_ray.data.rows import row_normalise
from dpt_ray.data.tar import index_tar
from dpt_ray.learners.linear_classifier import load_classifier, probabilities
from dpt_ray.store.artifact import Artifact, Store

if TYPE_CHECKING:
    from dpt_ray.models.batches import Batches
    from dpt_ray.models.encoder import Encoder

Index = Callable[[str], tuple[pa.Table, list[str]]]

WRITERS = {".csv": pyarrow.csv.write_csv, ".parquet": pq.write_table}
SHARDS: dict[str, Index] = {".tar": index_tar, ".parquet": index_parquet}

SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "uri": pa.string(),
        "label": pa.int32(),
        "class_name": pa.string(),
        "confidence": pa.float32(),
        "classifier": pa.string(),
        "error": pa.string(),
    }
)


def predict_images(config: Config, images: str, out: Path, method: str | None = None) -> Predicted:
    """Write a row of `SCHEMA` for each image to `out` (.csv or .parquet).

    `images` is as for `list_images`. The classifier is that of `method`, by default the run's best on
    validation; column `classifier` has its method. `confidence` is the probability of the label, at the
    fitted temperature for stage 1's classifiers, the ladder's rungs, learners and the student, and from the
    plain softmax for the others. An existing table is replaced atomically.
    """
    if out.suffix not in WRITERS:
        raise ConfigError(f"out: {str(out)!r} must end in .csv or .parquet")
    labeller = load_labeller(config, method)
    rows = list_images(images)
    try:
        Store(str(out.parent.absolute())).check_writable()
    except ValueError as error:  # before the labelling, not after it
        raise ConfigError(f"out: {str(out)!r}: {str(error).removeprefix('output: ')}") from error
    console = Console(stderr=True)
    with ThreadPoolExecutor(config.compute.cpus) as pool:
        batches = track(
            _batches(labeller, rows, config.compute.batch_size, pool),
            "predict",
            total=-(-rows.num_rows // config.compute.batch_size),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        tables, deep = zip(*batches, strict=True)
    table = pa.concat_tables(tables)
    try:
        with Artifact(str(out.parent.absolute())).writing(out.name) as part:
            WRITERS[out.suffix](table, part)
    except OSError as error:
        raise ConfigError(f"out: {str(out)!r} cannot be written: {error}") from error
    labelled = table.num_rows - table["label"].null_count
    return Predicted(labelled, table.num_rows, labeller.choice, sum(deep))


@dataclass(frozen=True)
class Predicted:
    """What was written: `labelled` of `images` images got a label from the classifier of `choice`.

    `deep` of them have more than 8 bits a value.
    """

    labelled: int
    images: int
    choice: Choice
    deep: int = 0

    def __str__(self) -> str:
        bad = self.images - self.labelled
        left = f" ({bad:,} could not be, see column error)" if bad else ""
        note = f"\nnote: {self.deep:,} images {DEEP}" if self.deep else ""
        return f"{self.labelled:,} images labelled{left} by {self.choice}{note}"


@dataclass(frozen=True)
class Labeller:
    """An encoder, the weights (C, dim) of a classifier and its temperature."""

    encoder: Encoder
    batches: Batches
    mode: Mode
    choice: Choice
    weights: np.ndarray
    classes: list[str]
    temperature: float

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """Return probabilities (n, C) of cropped pixels (n, H, W, C) uint8."""
        import torch

        images, device = torch.from_numpy(pixels), self.encoder.mean.device
        features = self.batches(lambda a, b: self.encoder(images[a:b].to(device)), len(images))
        return probabilities(row_normalise(features.cpu().numpy()), self.weights, self.temperature)


def load_labeller(config: Config, method: str | None = None) -> Labeller:
    """Return the encoder and the classifier of a run. Raises ConfigError if none is published."""
    import torch

    from dpt_ray.models.batches import Batches
    from dpt_ray.models.encoder import load_encoder
    from dpt_ray.models.precision import resolve_precisions, resolved

    made, best = best_classifier(config, "encoder", method=method)
    precision = resolved(resolve_precisions(config).encoder.precision)
    encoder = load_encoder(made[best.encoder].uri, precision)
    return Labeller(
        encoder.to("cuda" if torch.cuda.is_available() else "cpu"),
        Batches(config.compute.batch_size),
        config.data.mode,
        best,
        load_classifier(best.artifact, best.prefix),
        best.artifact.read_json(f"{best.prefix}config.json")["classes"],
        best.temperature,
    )


def list_images(images: str) -> pa.Table:
    """Return id, uri, offset and length of the images at a path or URI, in sorted or listed order.

    It is an image, a folder of images, or of tar or Parquet shards (searched recursively), a shard, or a
    manifest (.csv or .parquet with a column `uri` or `id`). The id of a file is its path below the folder
    without suffix. Raises ConfigError where there is no image, or a shard or the manifest is broken.
    """
    try:
        fs, root = open_root(images)
        if fs.isdir(root):
            files = list(walk_files(fs, root))
            for suffix, index in SHARDS.items():
                if not any(map(_is_image, files)) and any(path.lower().endswith(suffix) for path, _ in files):
                    return _located(index, images)
        elif fs.isfile(root):
            path = PurePosixPath(root)
            suffix = path.suffix.lower()
            if suffix == ".csv" or (suffix == ".parquet" and not has_images(images)):
                return index_manifest(images, images_alone=True)[0]
            if suffix in SHARDS:
                return _located(SHARDS[suffix], images)
            root, files = str(path.parent), [(path.name, int(fs.size(root)))]
        else:
            raise ValueError("does not exist; check the path and the credentials")
    except Exception as error:  # each storage raises errors of its own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"images: {images}: {reason}") from error
    found = [
        (str(PurePosixPath(path).with_suffix("")), fs.unstrip_protocol(f"{root}/{path}"), 0, size)
        for path, size in filter(_is_image, files)
    ]
    if not found:
        raise ConfigError(
            f"images: {images} has no image ({', '.join(IMAGE_SUFFIXES)}), .tar, .csv or .parquet"
        )
    return pa.table(dict(zip(("id", "uri", "offset", "length"), zip(*found, strict=True), strict=True)))


def _located(index: Callable[..., tuple[pa.Table, list[str]]], images: str) -> pa.Table:
    """Return the images of shards, whatever their splits and labels are."""
    try:
        return index(images, split_names={})[0]
    except GapsError as error:
        return index(images, error.classes, {})[0]


def _is_image(file: tuple[str, int]) -> bool:
    return PurePosixPath(file[0]).suffix.lower() in IMAGE_SUFFIXES


def _batches(
    labeller: Labeller, rows: pa.Table, size: int, pool: ThreadPoolExecutor
) -> Iterator[tuple[pa.Table, int]]:
    """Yield a table of `SCHEMA` for each `size` rows, and how many of its images are deep."""
    cut = partial(_pixels, mode=labeller.mode, how=labeller.encoder.crop)
    for start in range(0, rows.num_rows, size):
        batch = rows.slice(start, size)
        read = list(pool.map(cut, (batch.slice(i, 1) for i in range(batch.num_rows))))
        found = [pixels for pixels, _ in read]
        table: list[dict[str, str | int | float]] = batch.select(["id", "uri"]).to_pylist()
        for row, pixels in zip(table, found, strict=True):
            if isinstance(pixels, str):
                row["error"] = pixels
        good = [i for i, pixels in enumerate(found) if not isinstance(pixels, str)]
        if good:
            for i, probs in zip(good, labeller(np.stack([found[i] for i in good])), strict=True):
                if not np.isfinite(probs).all():
                    table[i]["error"] = "its features are not finite; set encoder.precision=float32"
                    continue
                label = int(probs.argmax())
                table[i] |= {
                    "label": label,
                    "class_name": labeller.classes[label],
                    "confidence": float(probs[label]),
                    "classifier": labeller.choice.method,
                }
        yield pa.Table.from_pylist(table, SCHEMA), sum(deep for _, deep in read)


def _pixels(row: pa.Table, mode: Mode, how: Crop) -> tuple[np.ndarray | str, bool]:
    """Return the cropped pixels of one image, or why it cannot be read, and whether it is deep."""
    try:
        data = read_bytes(row)[0]
        pixels = crop(decode(data, mode), how)
        with Image.open(io.BytesIO(data)) as image:  # as it is in its file
            return pixels, is_deep(image)
    except (OSError, ValueError) as error:
        return " ".join(str(error).split()), False
