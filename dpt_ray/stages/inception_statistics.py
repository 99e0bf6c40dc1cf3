"""inception: statistics of Inception-v3 on the generated and on the real test images, part by part.

A part is a fixed range of images that one actor reads, decodes and measures. It publishes their statistics
(mean and covariance sums, sums for the Inception Score, some features), never all features. More generated
images add parts and repeat only the last one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypedDict, TypeVar, cast

import numpy as np
import pyarrow.compute as pc

from dpt_ray.cluster.units import Result, peak_memory, run_actors, suspect, unit_call
from dpt_ray.config import ConfigError
from dpt_ray.config.hashing import HashedIfSet, NotHashed, Settings
from dpt_ray.config.sections import Count, Resize, Seed
from dpt_ray.data.apart import apart
from dpt_ray.data.class_ranges import CLASSES_PER_SHARD, first_of_all
from dpt_ray.data.crops import Crop
from dpt_ray.data.decoded import ahead, decode_unit
from dpt_ray.data.shards import read_shard_columns
from dpt_ray.data.units import Unit, collect_shards, is_index, list_units, split_of
from dpt_ray.engine.node import Node, RunsOn, Stage, Task, one_of, reads
from dpt_ray.models.saved import WEIGHTS
from dpt_ray.store.artifact import Artifact
from dpt_ray.store.records import Facts, Shard

if TYPE_CHECKING:
    from torch import Tensor

    from dpt_ray.evaluation.image_statistics import ImageStatistics

PART = 4096  # minimum images of a part; its co-moments take 66 MB for any number of images
KEPT_FEATURES = 10_000  # images whose features are kept, for KID, precision and recall
BATCH = 64  # maximum: at 299 x 299 the first layers take 20 MB per image

T = TypeVar("T")


class StatisticsSettings(Settings):
    """How images are cropped and resized; `images` is the number of generated images (from the extent).

    With `label_seed` the number of each class follows uniformly drawn labels, else the first are taken.
    """

    resize: Resize
    image_size: Count
    images: Annotated[Count | None, NotHashed] = None
    label_seed: Annotated[Seed | None, HashedIfSet] = None


class InceptionStatistics(Stage[StatisticsSettings]):
    """Statistics of Inception's features and predictions, one shard per part."""

    artifact = "inception_statistics"
    settings = StatisticsSettings
    inputs = reads(
        {
            "inception": one_of("inception"),
            "images": one_of("index", "samples"),
            "index": one_of("index", hashed=False),
        }
    )
    runs_on = RunsOn.ACTORS

    @classmethod
    def make(cls, task: Task[StatisticsSettings]) -> Facts:
        """Publish the missing parts."""
        return cls.make_together([task])[0]

    @classmethod
    def make_together(cls, tasks: Sequence[Task[StatisticsSettings]]) -> list[Facts]:
        """Publish the missing parts of every set of images by one pool of actors."""
        first = tasks[0]
        sets = {task.name: _measured(task) for task in tasks}
        parts = {task.name: list_parts(sets[task.name].units, _part_names(task)) for task in tasks}
        missing: list[PartOfSet] = []
        for name, measured in sets.items():
            done = measured.out.shards()
            missing += [{**part, "set": name} for part in parts[name] if part["shard"] not in done]
        facts: Facts = {"startup_seconds": 0.0, "peak_memory_bytes": 0}
        if missing:
            facts = run_actors(
                missing,
                InceptionPart,
                lambda threads: {
                    "sets": sets,
                    "weights": first.inputs["inception"].file_uri(WEIGHTS),
                    "batch_size": min(BATCH, first.compute.batch_size),
                    "threads": threads,
                },
                first.compute,
                first.progress,
                images=sum(sets[part["set"]].count(part) for part in missing),
            )
        return [{**facts, **_collect(measured, parts[name])} for name, measured in sets.items()]


class Part(TypedDict):
    """The units `units[0]` .. `units[1] - 1`; their first image is number `start` of the set."""

    shard: str
    units: list[int]
    start: int


class PartOfSet(Part):
    """A part and the name of its set."""

    set: str


@dataclass(frozen=True)
class Measured:
    """A set of images to measure: the generated ones (all, the first or drawn), or the test images.

    `units` are its work units in order. Of each unit the `drawn` images are measured, or the first `rows`
    where `drawn` is None.
    """

    out: Artifact
    images: Artifact
    generated: bool
    classes: int
    units: list[Unit]
    crop: Crop
    resize: Resize
    drawn: frozenset[str] | None = None

    def count(self, part: Part) -> int:
        """Return the number of images of a part, unreadable ones included."""
        return sum(unit["rows"] for unit in self.units[slice(*part["units"])])


def list_parts(units: Sequence[Unit], ending: str = "") -> list[Part]:
    """Return parts of at least PART images each, the last with the rest; names end in `ending`."""
    parts: list[Part] = []
    ends = list(accumulate(unit["rows"] for unit in units))
    first = start = 0
    for number, stop in enumerate(ends, 1):
        if start < stop and (stop - start >= PART or number == len(ends)):
            key = f"{start:08d}-{stop:08d}{ending}"
            parts.append({"shard": key, "units": [first, number], "start": start})
            first, start = number, stop
    return parts


class InceptionPart:
    """An actor that measures a part and publishes its statistics."""

    def __init__(self, sets: dict[str, Measured], weights: str, batch_size: int, threads: int) -> None:
        import torch

        from dpt_ray.evaluation.inception import load_inception

        torch.set_num_threads(threads)
        self.network = load_inception(weights, "cuda" if torch.cuda.is_available() else "cpu")
        self.sets, self.batch_size, self.threads = sets, batch_size, threads
        self.computing = threading.Lock()

    @unit_call
    def __call__(self, part: PartOfSet) -> Result:
        """Publish the statistics of the images of a part."""
        started = time.perf_counter()
        measured = self.sets[part["set"]]
        with self.computing:  # one part is published while the next is measured
            statistics, bad = self._measure(measured, part)

        def write(path: Path) -> None:
            with path.open("wb") as file:  # numpy would append a suffix to a path
                statistics.save(file)

        measured.out.publish_shard(part["shard"], ".npz", statistics.count, write, unreadable=bad)
        return {
            "seconds": time.perf_counter() - started,
            "peak_memory_bytes": peak_memory(),
            "images": measured.count(part),
        }

    def _measure(self, measured: Measured, part: Part) -> tuple[ImageStatistics, int]:
        """Return the statistics of the readable images and the number of unreadable ones."""
        import torch

        from dpt_ray.evaluation.image_statistics import ImageStatistics
        from dpt_ray.evaluation.inception import Activations, activations

        found: list[Activations] = []
        splits: list[Tensor] = []
        places: list[Tensor] = []
        bad, position = 0, part["start"]
        first, last = part["units"]
        units = measured.units[first:last]
        for unit, (ids, pixels, unreadable) in zip(units, self._decoded(measured, units), strict=True):
            for batch in torch.from_numpy(pixels).split(self.batch_size):
                # The pixels of an empty unit have no size.
                found += [activations(self.network, batch, measured.resize)] if len(batch) else []
            split, place = _splits_and_places(measured, unit, ids, position)
            splits.append(split)
            places.append(place)
            position, bad = position + len(ids) + unreadable, bad + unreadable
        if not found:
            raise ValueError("none of the images can be read; repair or remove them")
        together = Activations(*(torch.cat(values) for values in zip(*found, strict=True)))
        order = torch.cat(places)
        return ImageStatistics.of(together, torch.cat(splits), _kept(measured, order), order), bad

    def _decoded(
        self, measured: Measured, units: Sequence[Unit]
    ) -> Iterator[tuple[list[str], np.ndarray, int]]:
        """Yield (ids, pixels, number of unreadable images) of each unit, prefetched by threads."""
        mode, crops, careful = measured.images.manifest["mode"], {"pixels": measured.crop}, suspect()

        def decode(unit: Unit) -> tuple[list[str], np.ndarray, int]:
            with apart(crops, mode) if careful else nullcontext() as pixels_of:
                ids, pixels, bad = decode_unit(measured.images, unit, crops, mode, pixels_of)
            rows = list(range(len(ids)))[: unit["rows"]]
            if measured.drawn is not None:
                rows = [row for row, image in enumerate(ids) if image in measured.drawn]
            return [ids[row] for row in rows], pixels["pixels"][rows], len(bad)

        with ThreadPoolExecutor(self.threads) as pool:
            yield from ahead(pool, decode, units, self.threads)


def _splits_and_places(
    measured: Measured, unit: Unit, ids: Sequence[str], position: int
) -> tuple[Tensor, Tensor]:
    """Return the Inception Score's split and the place in the overall order of a unit's images `ids`.

    Generated images are split by class + index, so that splits are of equal size and contain all classes,
    and ordered by (index, class).
    """
    import torch

    if not measured.generated:
        return torch.zeros(len(ids), dtype=torch.int64), torch.arange(position, position + len(ids))
    table = read_shard_columns(measured.images, cast(Shard, unit), ["id", "class", "index"])
    rows = pc.index_in(np.array(ids, object), table["id"].combine_chunks()).to_numpy()
    label, index = (
        torch.from_numpy(table[name].to_numpy()[rows].astype(np.int64)) for name in ("class", "index")
    )
    return label + index, index * measured.classes + label


def _kept(measured: Measured, order: Tensor) -> Tensor:
    """Return a mask of the kept features: the first generated images, or evenly spread real images."""
    import torch

    from dpt_ray.evaluation.image_statistics import some_positions

    if measured.generated:
        return order < KEPT_FEATURES
    total = sum(unit["rows"] for unit in measured.units)
    return torch.isin(order, some_positions(total, KEPT_FEATURES))


def _measured(task: Task[StatisticsSettings]) -> Measured:
    settings, images = task.settings, task.inputs["images"]
    generated = not is_index(images.manifest)  # an index lists real images
    units = list_units(images)
    drawn = None
    if not generated:
        units = [unit for unit in units if split_of(unit) == "test"]
    elif settings.images:
        seed = settings.label_seed
        counts = None if seed is None else _counts(task.node, _classes(task), settings.images, seed)
        units, drawn = _some_units(images, units, _classes(task), settings.images, counts)
    crop = Crop("adm", settings.image_size)
    return Measured(task.out, images, generated, _classes(task), units, crop, settings.resize, drawn)


def check_drawn(node: Node, index: Artifact) -> None:
    """Raise ConfigError where drawn labels ask for more images of a class than a run will generate."""
    settings = cast(StatisticsSettings, node.settings)
    if settings.images and settings.label_seed is not None:
        _counts(node, index.manifest["classes"], settings.images, settings.label_seed)


def _counts(node: Node, classes: int, images: int, seed: int) -> np.ndarray:
    """Return the number of drawn images of each class. Raises ConfigError where a class has fewer."""
    from dpt_ray.evaluation.label_draw import check_counts, images_of_each_class

    counts = images_of_each_class(images, classes, seed).numpy()
    try:
        check_counts(counts, node.extent.images_per_class)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return counts


def _some_units(
    images: Artifact, units: Sequence[Unit], classes: int, count: int, counts: np.ndarray | None
) -> tuple[list[Unit], frozenset[str] | None]:
    """Return the units with the first `count` images (which come first in each unit), or the drawn images.

    The second value is the ids of the drawn images.
    """
    found: list[Unit] = []
    drawn: set[str] = set()
    for unit in units:
        shard = cast(Shard, unit)
        table = read_shard_columns(images, shard, ["id", "class", "index"])
        if counts is None:
            chosen = first_of_all(table, classes, count)
        else:
            chosen = table["index"].to_numpy() < counts[table["class"].to_numpy()]
            drawn.update(table["id"].filter(chosen).to_pylist())
        if rows := int(chosen.sum()):
            found.append({**shard, "rows": min(shard["rows"], rows)})
    return found, None if counts is None else frozenset(drawn)


def _part_names(task: Task[StatisticsSettings]) -> str:
    """Return a suffix for parts whose images depend on `images` or on the drawn labels."""
    most = task.settings.images
    elsewhere = _classes(task) > CLASSES_PER_SHARD or task.settings.label_seed is not None
    return f"-n{most}" if most and elsewhere else ""


def _classes(task: Task[StatisticsSettings]) -> int:
    return task.inputs["index"].manifest["classes"]


def _collect(measured: Measured, parts: Sequence[Part]) -> Facts:
    found = collect_shards(measured.out, parts)
    return {**found, "unreadable": sum(shard["unreadable"] for shard in found["shards"])}
