"""What `dpt init` finds in a user's images and labels."""

from __future__ import annotations

import io
import json
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

import pyarrow as pa
import pyarrow.compute as pc
from PIL import ExifTags, Image

from dpt_ray.cluster.shards import InTasks
from dpt_ray.config.sections import Compute
from dpt_ray.data.decode import DEEP, is_deep
from dpt_ray.data.index import GapsError, read_bytes
from dpt_ray.data.labels import class_names, read_label_list, unlabelled
from dpt_ray.data.listing import IMAGE_SUFFIXES, SHARD_SUFFIXES, SPLIT_NAMES, open_root, walk_files
from dpt_ray.data.parquet import columns_of_classes
from dpt_ray.data.sources import index_source

LOOKED_AT = 64  # number of images whose size is read
SIDES = (8, 16, 32, 64, 128, 256)
SHOWN = 5  # classes whose names are told
# Photographs that are not read, and what may be a source of its own beside photographs.
NOT_READ = (".heic", ".heif", ".avif", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".psd", *SHARD_SUFFIXES)
NO_CLASS = {"unlabelled", "unlabeled", "unknown", "unsorted"}  # folders that are hardly meant as classes


@dataclass(frozen=True)
class Found:
    """The result of inspecting the images and the label list."""

    source: str
    index: pa.Table
    classes: list[str]
    named_by_list: bool
    labelled: int
    side: int
    mode: str
    warning: str = ""  # of classes without a label
    gaps: bool = False  # the classes are the numbers that occur, and others below them do not
    folders: Sequence[str] = ()  # that are taken for no classes, since the list names others
    deep: bool = False  # some images have more than 8 bits a value
    turned: bool = False  # some images are turned by their EXIF data
    not_read: str = ""  # files beside the images that may be meant, by suffix
    label_columns: Sequence[str] = ()  # of Parquet files without a column `label`

    @property
    def notes(self) -> list[str]:
        """What the labels lack, a line each; none before the first label."""
        found = [self.warning] if self.warning else []
        if self.deep:
            found.append(f"note: some images {DEEP}")
        if self.turned:
            found.append(
                "note: some images are turned by their EXIF data, which is not applied; turn their pixels "
                "(mogrify -auto-orient), or they are learned as they lie"
            )
        if self.not_read:
            found.append(f"note: not read are {self.not_read}; convert photographs to JPEG or PNG")
        if self.label_columns:
            found.append(
                f"note: labels are read from a column called label, and here {_first(self.label_columns)} "
                "has classes: rename one to have it read"
            )
        if self.source == "folder" and (odd := [name for name in self.classes if name.lower() in NO_CLASS]):
            others = [name for name in self.classes if name not in odd]
            found.append(
                f"note: the folder {odd[0]} is taken for a class; if it is none, set "
                f"data.classes={json.dumps(others)}"
            )
        if self.folders:
            found.append(
                f"note: no class of the list is one of the folders ({_first(self.folders)}), so these are "
                "taken for no classes"
            )
        if self.gaps:
            found.append(
                "note: the images' labels are numbers, and not all from 0 up; data.classes lists those that "
                f"occur, {self.classes[0]} to {self.classes[-1]}"
            )
        if self.labelled and self.named_by_list and len(pc.unique(self.index["split"])) == 1:
            found.append(
                "note: these images have no labels but the few, so nothing is chosen or measured on others; "
                "a folder for each class, or a manifest with the columns uri, label and split, holds some out"
            )
        return found

    def __str__(self) -> str:
        splits = pc.value_counts(self.index["split"]).to_pylist()
        counts = ", ".join(f"{entry['counts']} {entry['values']}" for entry in splits)
        names = _first(self.classes)
        return (
            f"{counts} images as {self.source}; {self.labelled} labels of {len(self.classes)} classes"
            f"{names and f' ({names})'}; {self.side} pixels, {self.mode}"
        )


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def look(uri: str, labels: str | None) -> Found:
    """Index the images, check the label list (if any) against them and read the sizes of some images."""
    (source, not_read), each = _source(uri), InTasks(Compute())
    gaps = False
    try:
        index, classes = index_source(source, uri, None, SPLIT_NAMES, each)
    except GapsError as error:
        index, classes = index_source(source, uri, error.classes, SPLIT_NAMES, each)
        gaps = True
    if not pc.any(pc.equal(index["split"], "train")).as_py():
        raise ValueError(f"{uri} has no training images; name their split train, or leave the split out")
    side, mode, deep, turned = _size(index)
    columns = columns_of_classes(uri) if source == "parquet" and not classes else []
    found = Found(source, index, classes, False, 0, side, mode)
    found = replace(found, gaps=gaps, deep=deep, turned=turned, not_read=not_read, label_columns=columns)
    if not labels:
        return found
    fs, path = open_root(labels)
    if not fs.exists(path):
        raise ValueError(f"--labels: {labels!r} does not exist; give the path or URI of the label list")
    listed_classes = class_names(labels)
    named_by_list = not classes
    folders = classes if source == "folder" and _are_others(listed_classes, classes) else []
    if folders:
        index, named_by_list = index_source(source, uri, listed_classes, SPLIT_NAMES, each)[0], True
    if named_by_list:
        classes = listed_classes
    if len(classes) == 1:
        raise ValueError(f"{labels}: one class, {classes[0]}; label images of at least two")
    listed = read_label_list(labels, "csv", index, classes)
    warning = unlabelled(listed, classes)
    found = replace(found, index=index, classes=classes, named_by_list=named_by_list)
    return replace(found, labelled=listed.num_rows, warning=warning, folders=folders)


def _are_others(listed: Sequence[str], folders: Sequence[str]) -> bool:
    """Return whether folders are those of years or cameras, say: a list has other names of classes."""
    numbers = any(name.isdigit() for name in listed)  # which may be ranks of the folders
    return len(listed) > 1 and not numbers and set(listed).isdisjoint(folders)


def _source(uri: str) -> tuple[str, str]:
    """Return the kind of a source by the names of its files, and those beside them that may be meant.

    It is a folder where it has more image files than shards: a dataset of shards may show an image, and
    photographs may have an archive beside them.
    """
    fs, root = open_root(uri)
    if fs.isfile(root):
        return ("tar" if root.lower().endswith(".tar") else "manifest"), ""
    if not fs.exists(root):
        raise ValueError(f"{uri} does not exist; check the path and the credentials")
    suffixes = Counter(PurePosixPath(name).suffix.lower() for name, _ in walk_files(fs, root))
    images = sum(suffixes[suffix] for suffix in IMAGE_SUFFIXES)
    shards = {kind: suffixes[f".{kind}"] for kind in ("tar", "parquet")}
    if images <= sum(shards.values()):
        return next((kind for kind, count in shards.items() if count), "folder"), ""
    counts = [f"{suffixes[suffix]} {suffix}" for suffix in NOT_READ if suffixes[suffix]]
    return "folder", ", ".join(counts)


def _size(index: pa.Table) -> tuple[int, str, bool, bool]:
    """Return the largest of SIDES that half of the images fill, "L" if all are grey, `deep` and `turned`."""
    step = max(1, index.num_rows // LOOKED_AT)
    shorter, modes, deep, turned = [], set(), False, False
    for data in read_bytes(index.take(list(range(0, index.num_rows, step))[:LOOKED_AT])):
        try:
            with Image.open(io.BytesIO(data)) as image:
                shorter.append(min(image.size))
                modes.add("L" if is_deep(image) else image.mode)
                deep |= is_deep(image)
                turned |= image.getexif().get(ExifTags.Base.Orientation, 1) != 1
        except Exception:  # damaged bytes make PIL's plugins raise nearly anything
            continue  # the extract stage reports unreadable images
    if not shorter:
        raise ValueError("none of the inspected images can be read; check the source")
    median = statistics.median(shorter)
    side = max((side for side in SIDES if side <= median), default=SIDES[0])
    return side, "L" if modes <= {"1", "L"} else "RGB", deep, turned
