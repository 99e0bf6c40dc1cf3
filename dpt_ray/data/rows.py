"""Joins by id: features with labels and splits."""

from __future__ import annotations

from collections.abc import Collection
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dpt_ray.config import ConfigError
from dpt_ray.data.shards import read_features
from dpt_ray.data.units import read_index
from dpt_ray.learners.linear_classifier import Rows, row_normalise
from dpt_ray.stages.labels import LABELS
from dpt_ray.store.artifact import Artifact

PSEUDO_LABELS = "pseudo_labels.parquet"


class RealRows:
    """The features of real images, read once: those of whole splits, and those of labelled images."""

    def __init__(
        self, index: Artifact, features: Artifact, splits: Collection[str], labels: Artifact | None = None
    ) -> None:
        whole = {unit["shard"] for unit in index.manifest["units"] if unit["split"] in splits}
        listed = labels and pq.read_table(labels.local_file(LABELS), columns=["id"])["id"].combine_chunks()
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
        """The validation rows that have a true label."""
        return self.of_split("validation")

    def of_split(self, split: str) -> Rows:
        """The rows of a split that have a true label."""
        chosen = pc.and_(pc.equal(self.split, split), pc.is_valid(self.label))
        rows = np.flatnonzero(chosen.to_numpy(zero_copy_only=False))
        return Rows(self.features, _int64(self.label.take(pa.array(rows))), rows)

    def labelled(self, labels: Artifact) -> Rows:
        """The rows of a `labels` artifact whose images could be read.

        Raises ConfigError, naming the classes, where none of a class's labelled images could.
        """
        table = pq.read_table(labels.local_file(LABELS))
        readable = table.filter(pc.is_in(table["id"], value_set=self.ids))
        kept = set(pc.unique(readable["label"]).to_pylist())
        lost = [label for label in pc.unique(table["label"]).to_pylist() if label not in kept]
        if lost:
            names = ", ".join(self.classes[label] for label in lost[:5])
            first = table["id"].filter(pc.equal(table["label"], lost[0]))[0].as_py()
            raise ConfigError(
                f"labels: no labelled image of class {names} can be read ({len(lost)} such classes; "
                f"{first} and others are in the features' quarantine.parquet); label another image of it, "
                "draw more (labels.per_class) or otherwise (labels.seed)"
            )
        return self.joined(readable)

    def pseudo_labelled(self, pseudo_labels: Artifact) -> Rows:
        """The training rows with their pseudo-labels."""
        table = pq.read_table(pseudo_labels.local_file(PSEUDO_LABELS), columns=["id", "split", "label"])
        return self.joined(table.filter(pc.equal(table["split"], "train")))

    def joined(self, table: pa.Table) -> Rows:
        """The rows of the ids in `table`, with its labels. Raises ValueError for an id without features."""
        where = pc.index_in(table["id"].combine_chunks(), self.ids)
        if where.null_count:
            lost = table["id"].filter(pc.is_null(where))[0].as_py()
            raise ValueError(f"image {lost} has a pseudo-label but no features ({where.null_count} such)")
        return Rows(self.features, _int64(table["label"]), where.to_numpy())


class ImageRows:
    """The features of generated or augmented images; the class and index are in the id."""

    def __init__(self, features: Artifact) -> None:
        ids, raw = read_features(features)
        self.features = row_normalise(raw, out=raw)
        parts = [label_and_index(identifier) for identifier in ids.to_pylist()]
        self.label, self.index = np.array(parts, np.int64).reshape(-1, 2).T

    def first(self, images_per_class: int) -> Rows:
        """The first so many images of each class, by class and index."""
        rows = np.flatnonzero(self.index < images_per_class)
        rows = rows[np.lexsort((self.index[rows], self.label[rows]))]
        return Rows(self.features, self.label[rows], rows)


class TrainingFeatures:
    """The features of the images a denoiser trains on, row by row with their moments.

    One copy in memory: images x dim x 4 bytes, those of the other splits included.
    """

    def __init__(self, features: Artifact, ids: pa.Array) -> None:
        """`ids` are the moments'. Raises ValueError for an id without features."""
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
        """The features (n, dim) float32 of the given rows of the moments."""
        return self._features[self._where[rows]]


def image_id(kind: str, label: int, index: int) -> str:
    """The id of a generated ("gen") or augmented ("aug") image."""
    return f"{kind}-{label:05d}-{index:07d}"


def label_and_index(identifier: str) -> tuple[int, int]:
    """The class and the index in the id of a generated or augmented image."""
    _, label, index = identifier.split("-")
    return int(label), int(index)


def _int64(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    return column.to_numpy().astype(np.int64)
