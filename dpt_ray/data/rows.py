"""Rows of features with labels: joined by id, normalised as in DPT and MSN."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dpt_ray.config import ConfigError
from dpt_ray.config.ladder import ChooseOn
from dpt_ray.data.class_ranges import read_class_and_index
from dpt_ray.data.shards import read_features
from dpt_ray.data.units import read_index
from dpt_ray.store.artifact import Artifact

LABELS_FILE = "labels.parquet"
PSEUDO_LABELS_FILE = "pseudo_labels.parquet"
CHUNK_ROWS = 4096


@dataclass(frozen=True)
class Rows:
    """Rows `index` (n,) of the row-normalised `matrix` (m, dim) float32 with class ids `labels` (n,).

    `index` None means all rows; `weight` is the weight of each row in a fit. The matrix is shared, so a
    selection costs only the memory of its indices.
    """

    matrix: np.ndarray
    labels: np.ndarray
    index: np.ndarray | None = None
    weight: float = 1.0

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def features(self) -> np.ndarray:
        """The rows (n, dim); a copy where there is an `index`."""
        return self.matrix if self.index is None else self.matrix[self.index]


def row_normalise(features: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """Return each row (n, dim) minus its mean, divided by its L2 norm (DPT's and MSN's preprocessing).

    As in numpy, `out=features` works in place.
    """
    normalised = np.empty_like(features) if out is None else out
    for start in range(0, len(features), CHUNK_ROWS):
        part = slice(start, start + CHUNK_ROWS)
        # f <- (f - mean(f)) / ||f - mean(f)||
        centred = features[part] - features[part].mean(axis=1, keepdims=True)
        norm = np.linalg.norm(centred, axis=1, keepdims=True)
        normalised[part] = centred / np.maximum(norm, np.finfo(features.dtype).tiny)
    return normalised


class RealRows:
    """The features of real images: of whole splits, and of the labelled images."""

    def __init__(
        self, index: Artifact, features: Artifact, splits: Collection[str], labels: Artifact | None = None
    ) -> None:
        whole = {unit["shard"] for unit in index.manifest["units"] if unit["split"] in splits}
        listed = (
            labels and pq.read_table(labels.local_file(LABELS_FILE), columns=["id"])["id"].combine_chunks()
        )
        self.ids, raw = read_features(features, whole, listed)
        self.features = row_normalise(raw, out=raw)
        table = read_index(index, ["id", "split", "label"])
        where = pc.index_in(self.ids, table["id"].combine_chunks())
        if where.null_count:
            raise ValueError(f"{features.uri}: {where.null_count} ids are not in the index")
        self.split = table["split"].take(where)
        self.label = table["label"].take(where)
        self.classes: list[str] = index.read_json("classes.json")

    @cached_property
    def validation(self) -> Rows:
        """The validation rows with a true label."""
        return self.of_split("validation")

    def judges(self, choose_on: ChooseOn) -> Rows:
        """Return the rows to choose on: those of validation, none where it rests on the few labels."""
        if choose_on == "validation":
            return self.validation
        return Rows(self.features, np.empty(0, np.int64), np.empty(0, np.int64))

    def of_split(self, split: str) -> Rows:
        """Return the rows of a split that have a true label."""
        chosen = pc.and_(pc.equal(self.split, split), pc.is_valid(self.label))
        rows = np.flatnonzero(chosen.to_numpy(zero_copy_only=False))
        return Rows(self.features, _int64(self.label.take(pa.array(rows))), rows)

    def labelled(self, labels: Artifact) -> Rows:
        """Return the rows of a `labels` artifact whose images are readable.

        Raises ConfigError, naming the classes, where all labelled images of a class are unreadable.
        """
        readable = readable_labels(labels, self.ids, self.classes)
        return self.joined(readable)

    def pseudo_labelled(self, pseudo_labels: Artifact) -> Rows:
        """Return the training rows with their pseudo-labels.

        A table from elsewhere has labels of unreadable images too: these are left out.
        """
        table = pq.read_table(pseudo_labels.local_file(PSEUDO_LABELS_FILE), columns=["id", "split", "label"])
        readable = pc.is_in(table["id"], value_set=self.ids)
        return self.joined(table.filter(pc.and_(pc.equal(table["split"], "train"), readable)))

    def joined(self, table: pa.Table) -> Rows:
        """Return the rows of the ids in `table`, with its labels. Raises ValueError if features lack one."""
        where = pc.index_in(table["id"].combine_chunks(), self.ids)
        if where.null_count:
            lost = table["id"].filter(pc.is_null(where))[0].as_py()
            raise ValueError(
                f"image {lost} has a pseudo-label but no features ({where.null_count} such images)"
            )
        return Rows(self.features, _int64(table["label"]), where.to_numpy())


def features_bytes(features: Artifact, rows: int | None = None) -> int:
    """Return the bytes that all rows of `features` take in memory, or another number of such `rows`."""
    count = int(features.manifest["rows"]) if rows is None else rows
    return count * math.prod(features.manifest["shape"]) * np.dtype(np.float32).itemsize


def readable_labels(labels: Artifact, ids: pa.Array, classes: Sequence[str]) -> pa.Table:
    """Return id and label of the images in a `labels` artifact that are among the readable ones, `ids`.

    Raises ConfigError, naming the classes, where all labelled images of a class are unreadable.
    """
    table = pq.read_table(labels.local_file(LABELS_FILE))
    readable = table.filter(pc.is_in(table["id"], value_set=ids))
    kept = set(pc.unique(readable["label"]).to_pylist())
    lost = [label for label in pc.unique(table["label"]).to_pylist() if label not in kept]
    if lost:
        names = ", ".join(classes[label] for label in lost[:5])
        first = table["id"].filter(pc.equal(table["label"], lost[0]))[0].as_py()
        raise ConfigError(
            f"labels: no labelled image of class {names} can be read ({len(lost)} such classes; "
            f"{first} and others are in the features' quarantine.parquet); label other images of it, "
            "raise labels.per_class or change labels.seed"
        )
    return readable


class ImageRows:
    """The features of generated or augmented images, with the class and index of each image."""

    def __init__(self, features: Artifact, images: Artifact) -> None:
        """Join `features` with the `images` they are of. Raises ValueError for an id without an image."""
        ids, raw = read_features(features)
        self.features = row_normalise(raw, out=raw)
        table = read_class_and_index(images)
        where = pc.index_in(ids, table["id"].combine_chunks())
        if where.null_count:
            raise ValueError(f"{features.uri}: {where.null_count} ids are not in {images.uri}")
        self.label, self.index = (_int64(table[name].take(where)) for name in ("class", "index"))

    def first(self, images_per_class: int, passes: np.ndarray | None = None) -> Rows:
        """Return the first `images_per_class` images of each class, ordered by class and index.

        With a mask `passes` (n,) they are the first that pass; a class has fewer where too few do.
        """
        rows = np.flatnonzero(self.index < images_per_class if passes is None else passes)
        rows = rows[np.lexsort((self.index[rows], self.label[rows]))]
        labels = self.label[rows]
        if passes is not None:
            # Labels are sorted: the place in its class is the distance to the first of the class.
            kept = np.arange(len(rows)) - np.searchsorted(labels, labels) < images_per_class
            rows, labels = rows[kept], labels[kept]
        return Rows(self.features, labels, rows)


class TrainingFeatures:
    """The features of the training images of a denoiser, in the order of the moments.

    They take images x dim x 4 bytes of memory, including the images of other splits.
    """

    def __init__(self, features: Artifact, ids: pa.Array) -> None:
        """`ids` are those of the moments. Raises ValueError for an id without features."""
        found, self._features = read_features(features)
        where = pc.index_in(ids, found)
        if where.null_count:
            lost = ids.filter(pc.is_null(where))[0].as_py()
            raise ValueError(
                f"{features.uri}: {where.null_count} images have no features, the first is {lost}"
            )
        self._where = where.to_numpy()

    def __len__(self) -> int:
        return len(self._where)

    @property
    def dim(self) -> int:
        """Length of a feature row."""
        return self._features.shape[1]

    def rows(self, rows: np.ndarray) -> np.ndarray:
        """Return the features (n, dim) float32 of the given rows of the moments."""
        return self._features[self._where[rows]]


def _int64(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    return column.to_numpy().astype(np.int64)
