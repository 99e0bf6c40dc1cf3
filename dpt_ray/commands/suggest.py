"""suggest: choose the images to label next, and write a list and a page to label them on."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from dpt_ray.config import Config, ConfigError
from dpt_ray.data.decode import BadImage, decode
from dpt_ray.data.index import read_bytes
from dpt_ray.data.labels import SCHEMA, class_names, is_empty_list, read_label_list
from dpt_ray.data.listing import open_root
from dpt_ray.data.rows import row_normalise
from dpt_ray.data.shards import read_features
from dpt_ray.data.units import find_rows, read_index
from dpt_ray.engine.progress import Display
from dpt_ray.pipeline.run import run
from dpt_ray.pipeline.run_folder import sets_made
from dpt_ray.report.label_page import PICTURE_PIXELS, LabelPage, render_label_page
from dpt_ray.store.artifact import Artifact, Store
from dpt_ray.store.records import IndexUnit

LIST, PAGE = "to_label.csv", "to_label.html"


@dataclass(frozen=True)
class Given:
    """The labels that exist: a table of (id, label), and the class names of all labels."""

    labels: pa.Table
    classes: list[str]

    @property
    def rows(self) -> list[tuple[str, str]]:
        """(id, class name) of each."""
        columns = (self.labels[name].to_pylist() for name in SCHEMA.names)
        return [(identifier, self.classes[label]) for identifier, label in zip(*columns, strict=True)]


@dataclass(frozen=True)
class Suggested:
    """What was written: `count` of `images` training images; `given` labels existed."""

    count: int
    images: int
    given: int
    folder: Path
    classes_known: bool

    def __str__(self) -> str:
        labels = f", beside {self.given:,} labels that exist" if self.given else ""
        name = "" if self.classes_known else " data.classes='[...]' (the page shows the names)"
        return (
            f"{self.count:,} of {self.images:,} training images to label{labels}: {self.folder / LIST}\n"
            f"open {self.folder / PAGE} in a browser, label the images and save labels.csv; then\n"
            f"  dpt probe CONFIG labels.per_class=null labels.file=labels.csv{name}"
        )


def suggest_images(
    config: Config, count: int, out: Path, given: str | None, display: Display | None = None
) -> Suggested:
    """Write `to_label.csv` and `to_label.html` to the folder `out`, replacing earlier ones without labels.

    The features of the run are made first where they are missing. `given` is a label list of images that are
    passed over (in `labels.format`), by default `labels.file` where that exists; labels that
    `labels.per_class` draws do not count. Raises ConfigError for a bad list, too many images, or images that
    cannot be read any more.
    """
    try:
        Store(str(out.absolute())).check_writable()
    except ValueError as error:  # before the features, not after them
        raise ConfigError(f"out: {str(out)!r}: {str(error).removeprefix('output: ')}") from error

    _refuse_filled_in(out / LIST)

    def check(index: Artifact) -> None:  # before the encoder is trained
        free = _training_images(index) - _given(config, given, index).labels.num_rows
        if count > free:
            raise ConfigError(f"suggest: {count} images to label, and {free} have no label: ask for fewer")

    run(config, display or Display(), ["features"], check)
    made = next(sets_made(config))
    index = made["index"]
    existing = _given(config, given, index)
    ids, images = _choose(config, count, existing, index, made["features"])
    known = index.read_json("classes.json")
    page = LabelPage(
        config.name, _pictures(index, ids), existing.classes, open_classes=not known, given=existing.rows
    )
    try:
        folder = Artifact(str(out.absolute()))
        folder.write_bytes(LIST, _empty_list(ids))
        folder.write_bytes(PAGE, render_label_page(page).encode())
    except OSError as error:
        raise ConfigError(f"out: {str(out)!r} cannot be written: {error}") from error
    return Suggested(len(ids), images, existing.labels.num_rows, out, bool(known))


def _refuse_filled_in(file: Path) -> None:
    """Raise ConfigError where a list that would be replaced has classes that a person wrote."""
    if not file.is_file():
        return
    with file.open(newline="", encoding="utf-8-sig", errors="replace") as text:
        filled = sum(bool((row.get("label") or "").strip()) for row in csv.DictReader(text))
    if filled:
        raise ConfigError(
            f"out: {str(file)!r} has {filled} labels, and would be replaced: move it away, or name another "
            "folder with --out"
        )


def _training_units(index: Artifact) -> list[IndexUnit]:
    return [unit for unit in index.manifest["units"] if unit["split"] == "train"]


def _training_images(index: Artifact) -> int:
    return sum(unit["rows"] for unit in _training_units(index))


def _given(config: Config, given: str | None, index: Artifact) -> Given:
    """Return the labels that exist. Raises ConfigError for a list that `labels.file` could not be either."""
    key, uri = ("given", given) if given else ("labels.file", config.labels.file)
    classes: list[str] = index.read_json("classes.json")
    try:
        if uri and (given or _exists(uri)) and not is_empty_list(uri, config.labels.format):
            classes = classes or class_names(uri)
            return Given(read_label_list(uri, config.labels.format, read_index(index), classes), classes)
    except (ValueError, OSError) as error:
        raise ConfigError(f"{key}: {error}") from error
    return Given(SCHEMA.empty_table(), classes)


def _exists(uri: str) -> bool:
    fs, path = open_root(uri)
    return bool(fs.exists(path))


def _choose(
    config: Config, count: int, given: Given, index: Artifact, features: Artifact
) -> tuple[list[str], int]:
    """Return the ids of the images to label, and the number of training images with features."""
    from dpt_ray.learners.suggestion import suggest

    ids, raw = read_features(features, {unit["shard"] for unit in _training_units(index)})
    # Of a labelled image that cannot be read there are no features.
    labelled = pc.drop_null(pc.index_in(given.labels["id"].combine_chunks(), ids)).to_numpy()
    try:
        found = suggest(row_normalise(raw, out=raw), count, labelled, config.labels.seed)
    except ValueError as error:
        raise ConfigError(f"suggest: {error}") from error
    return ids.take(pa.array(found)).to_pylist(), len(ids)


def _pictures(index: Artifact, ids: Sequence[str]) -> list[tuple[str, Image.Image]]:
    """Return (id, picture) of each image, in the order of `ids`, no larger than the page shows it.

    They are read one at a time: photographs of full size would take some 50 MB each.
    """
    rows, mode, found = find_rows(index, ids), index.manifest["mode"], {}
    for row, identifier in enumerate(rows["id"].to_pylist()):
        try:
            picture = decode(read_bytes(rows.slice(row, 1))[0], mode)
        except BadImage as error:
            raise ConfigError(f"data: image {identifier} is not what it was: {error}; restore it") from error
        except (OSError, ValueError) as error:
            raise ConfigError(f"data: an image to label is gone: {error}") from error
        if max(picture.size) > PICTURE_PIXELS:
            picture.thumbnail((PICTURE_PIXELS, PICTURE_PIXELS))
        found[identifier] = picture
    return [(identifier, found[identifier]) for identifier in ids]


def _empty_list(ids: Sequence[str]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([("id", "label"), *((identifier, "") for identifier in ids)])
    return text.getvalue().encode()
