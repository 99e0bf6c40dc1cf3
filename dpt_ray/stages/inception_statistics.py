"""inception: what Inception-v3 says of the generated and of the real test images, part by part.

A part is a fixed range of images, read, decoded and measured by one actor, which publishes their
statistics (moments, sums of the Inception Score, some features): never all features. More generated
images add parts and measure none again but the last.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dpt_ray.cluster import session as cluster
from dpt_ray.data.crops import Crop
from dpt_ray.data.rows import label_and_index
from dpt_ray.data.units import INDEX, Unit, decode_unit, list_units
from dpt_ray.engine.node import Task
from dpt_ray.stages.samples import CLASSES_PER_SHARD, first_images
from dpt_ray.store.artifact import Artifact

if TYPE_CHECKING:
    from dpt_ray.evaluation.image_statistics import ImageStatistics

WEIGHTS = "model.safetensors"
PART = 4096  # images at least; the co-moments of a part take 66 MB, whatever their number
KEPT = 10_000  # images whose features stay, for KID, precision and recall
BATCH = 64  # at most: at 299 x 299 the first layers of an image take 20 MB


@dataclass(frozen=True)
class Measured:
    """One set of images to measure: the generated ones (`generated`; all or the first), or the test images.

    `units` are the work units that hold them, in their order; the first `rows` images of each are meant.
    """

    out: Artifact
    images: Artifact
    generated: bool
    classes: int
    units: list[Unit]
    crop: Crop
    resize: str


def make_together(tasks: list[Task]) -> list[dict[str, Any]]:
    """Publishes the missing parts of every set of images by one pool of actors."""
    sets = {task.node.name: _measured(task) for task in tasks}
    parts = {task.node.name: list_parts(sets[task.node.name].units, _part_names(task)) for task in tasks}
    missing = []
    for name, measured in sets.items():
        done = measured.out.shards()
        missing += [part | {"set": name} for part in parts[name] if part["shard"] not in done]
    facts: dict[str, Any] = {"startup_seconds": 0.0, "peak_memory_bytes": 0}
    if missing:
        facts = _run(tasks[0], sets, missing)
    return [facts | _collect(measured, parts[name]) for name, measured in sets.items()]


def list_parts(units: list[Unit], ending: str = "") -> list[dict[str, Any]]:
    """Runs of units with at least PART images each, the last with what is left; names end in `ending`."""
    parts = []
    ends = list(accumulate(unit["rows"] for unit in units))
    first = start = 0
    for number, stop in enumerate(ends, 1):
        if start < stop and (stop - start >= PART or number == len(ends)):
            key = f"{start:08d}-{stop:08d}{ending}"
            parts.append({"shard": key, "units": [first, number], "start": start})
            first, start = number, stop
    return parts


def read_statistics(artifact: Artifact) -> ImageStatistics | None:
    """The statistics of a published set, merged in the order of its images; None of no images."""
    from dpt_ray.evaluation.image_statistics import ImageStatistics

    total: ImageStatistics | None = None
    for shard in artifact.listed_shards():
        part = ImageStatistics.load(artifact.local_file(shard["file"]))
        if total is None:
            total = part
        else:
            total.merge(part)
    return total


def _run(task: Task, sets: dict[str, Measured], parts: list[dict[str, Any]]) -> dict[str, Any]:
    started = time.perf_counter()
    cluster.connect(task.compute)
    arguments = {
        "sets": sets,
        "weights": task.inputs["inception"].file_uri(WEIGHTS),
        "batch_size": min(BATCH, task.compute.batch_size),
        "threads": cluster.threads(task.compute, task.compute.actors),
    }
    results = cluster.run_units(parts, None, InceptionPart, arguments, task.compute)
    return cluster.follow(results, len(parts), task.progress, started)


class InceptionPart:
    """An actor that measures a part and publishes its statistics."""

    def __init__(self, sets: dict[str, Measured], weights: str, batch_size: int, threads: int) -> None:
        import torch

        from dpt_ray.evaluation.inception import load_inception

        torch.set_num_threads(threads)
        self.network = load_inception(weights, "cuda" if torch.cuda.is_available() else "cpu")
        self.sets, self.batch_size, self.threads = sets, batch_size, threads
        self.computing = threading.Lock()

    @cluster.naming_shard
    def __call__(self, part: dict[str, Any]) -> dict[str, Any]:
        """Publishes the statistics of the images start .. stop of a set."""
        started = time.perf_counter()
        measured = self.sets[part["set"]]
        with self.computing:  # a part is published while the next is measured
            statistics, bad = self._measure(measured, part)

        def write(path: Path) -> None:
            with path.open("wb") as file:  # numpy would add a suffix to a name
                statistics.save(file)

        measured.out.publish_shard(part["shard"], ".npz", statistics.count, write, unreadable=bad)
        return {"seconds": time.perf_counter() - started, "peak_memory_bytes": cluster.peak_memory()}

    def _measure(self, measured: Measured, part: dict[str, Any]) -> tuple[ImageStatistics, int]:
        """The statistics of the images that can be read, and how many cannot."""
        import torch

        from dpt_ray.evaluation.image_statistics import ImageStatistics, some_positions
        from dpt_ray.evaluation.inception import Activations, activations

        resize: Any = measured.resize
        found: list[Activations] = []
        splits: list[int] = []
        places: list[int] = []
        bad, position = 0, part["start"]
        for ids, pixels, unreadable in self._decoded(measured, part):
            for batch in torch.from_numpy(pixels).split(self.batch_size):
                # An empty unit has no size to be resized from.
                found += [activations(self.network, batch, resize)] if len(batch) else []
            if measured.generated:
                which = [label_and_index(identifier) for identifier in ids]
                # Counted off by class + index, splits are equally large and of all classes.
                splits += [label + index for label, index in which]
                # Every class comes once before any comes twice.
                places += [index * measured.classes + label for label, index in which]
            else:
                splits += [0] * len(ids)
                places += range(position, position + len(ids))
            position, bad = position + len(ids) + unreadable, bad + unreadable
        if not found:
            raise ValueError("none of the images can be read; repair or remove them")
        together = Activations(*(torch.cat(values) for values in zip(*found, strict=True)))
        order = torch.tensor(places)
        if measured.generated:
            kept = order < KEPT
        else:
            total = sum(unit["rows"] for unit in measured.units)
            kept = torch.isin(order, some_positions(total, KEPT))
        return ImageStatistics.of(together, torch.tensor(splits), kept, order), bad

    def _decoded(
        self, measured: Measured, part: dict[str, Any]
    ) -> Iterator[tuple[list[str], np.ndarray, int]]:
        """(ids, pixels, number of unreadable images) of each unit, decoded ahead by threads."""
        mode = str(measured.images.manifest["mode"])

        def decode(unit: Unit) -> tuple[list[str], np.ndarray, int]:
            ids, pixels, bad = decode_unit(measured.images, unit, {"pixels": measured.crop}, mode)
            rows = unit["rows"]
            return ids[:rows], pixels["pixels"][:rows], len(bad)

        first, last = part["units"]
        with ThreadPoolExecutor(self.threads) as pool:
            yield from _ahead(pool, decode, measured.units[first:last], self.threads)


def _ahead(
    pool: ThreadPoolExecutor, call: Callable[[Unit], Any], units: Iterable[Unit], count: int
) -> Iterator[Any]:
    """call(unit) in order, with `count` of them under way; unlike `pool.map`, never all."""
    waiting: deque[Future[Any]] = deque()
    for unit in units:
        waiting.append(pool.submit(call, unit))
        if len(waiting) > count:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _measured(task: Task) -> Measured:
    settings, images = task.settings, task.inputs["images"]
    crop = Crop("adm", settings["image_size"])
    classes, units = _classes(task), list_units(images)
    generated = not images.exists(INDEX)  # what an index lists is real
    if not generated:
        units = [unit for unit in units if unit["split"] == "test"]
    elif most := settings.get("images"):
        units = [
            unit | {"rows": min(unit["rows"], first_images(unit["shard"], classes, most))} for unit in units
        ]
        units = [unit for unit in units if unit["rows"]]
    return Measured(task.out, images, generated, classes, units, crop, settings["resize"])


def _part_names(task: Task) -> str:
    """The ending of the names of parts of which other numbers of `images` take other images."""
    most = task.settings.get("images")
    return f"-n{most}" if most and _classes(task) > CLASSES_PER_SHARD else ""


def _classes(task: Task) -> int:
    return int(task.inputs["index"].manifest["classes"])


def _collect(measured: Measured, parts: list[dict[str, Any]]) -> dict[str, Any]:
    published = measured.out.shards()
    shards = [published[part["shard"]] for part in parts]
    return {
        "rows": sum(shard["rows"] for shard in shards),
        "bytes": sum(shard["bytes"] for shard in shards),
        "unreadable": sum(shard["unreadable"] for shard in shards),
        "shards": shards,
    }
