"""generate: images for each class, from the flat list of (class, index).

A shard is a fixed range of indices x classes, so asking for more images per class adds shards and makes
none again. The noise of an image is drawn on the CPU from a hash of (seed, class, index).
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from dpt_ray.cluster import session as cluster
from dpt_ray.data.rows import image_id
from dpt_ray.engine.node import Task
from dpt_ray.store.artifact import Artifact

if TYPE_CHECKING:  # the driver starts without torch
    from dpt_ray.models.precision import Precision

CLASSES_PER_SHARD = 1000


def make(task: Task) -> dict[str, Any]:
    """Publishes the shards that are missing for the extent asked for."""
    classes = task.inputs["denoiser"].read_json("config.json")["model"]["num_classes"]
    units = shard_units(int(task.node.extent[1:]), task.settings["indices_per_shard"], classes)
    done = task.out.shards()
    missing = [unit for unit in units if unit["shard"] not in done]
    facts: dict[str, Any] = {"startup_seconds": 0.0, "peak_memory_bytes": 0}
    if missing:
        facts = _run(task, missing)
    published = task.out.shards()
    shards = [published[unit["shard"]] for unit in units]
    mode = "L" if task.inputs["autoencoder"].manifest["latent_shape"][0] == 1 else "RGB"
    return {
        **facts,
        "rows": sum(shard["rows"] for shard in shards),
        "bytes": sum(shard["bytes"] for shard in shards),
        "shards": shards,
        "made": len(missing),
        "mode": mode,
    }


def shard_units(images_per_class: int, indices_per_shard: int, classes: int) -> list[dict[str, Any]]:
    """The shards that hold the first so many images of every class."""
    return [
        {
            "shard": f"i{first:07d}-c{start:05d}",
            "indices": [first, first + indices_per_shard],
            "classes": [start, min(start + CLASSES_PER_SHARD, classes)],
        }
        for first in range(0, images_per_class, indices_per_shard)
        for start in range(0, classes, CLASSES_PER_SHARD)
    ]


def first_images(shard: str, classes: int, count: int) -> int:
    """How many images of a shard are among the first `count` of all by (index, class); they come first in it.

    In that order every class comes once before any comes twice. Shards lie in another one where there are
    more classes than a shard holds.
    """
    index, label = (int(part[1:]) for part in shard.split("-"))
    width = min(CLASSES_PER_SHARD, classes - label)
    whole, rest = divmod(count, classes)
    return max(0, (whole - index) * width + max(0, min(rest - label, width)))


def _run(task: Task, units: list[dict[str, Any]]) -> dict[str, Any]:
    started = time.perf_counter()
    cluster.connect(task.compute)
    sampler = Sampler(
        task.out,
        task.inputs["denoiser"].uri,
        task.inputs["autoencoder"].uri,
        task.node.inputs["denoiser"].digest,
        task.compute.batch_size,
        cluster.threads(task.compute, task.compute.actors),
        **{key: task.settings[key] for key in _SETTINGS},
    )
    results = cluster.run_units(units, None, GenerateUnit, {"sampler": sampler}, task.compute)
    return cluster.follow(results, len(units), task.progress, started)


_SETTINGS = ("guidance", "guidance_interval", "solver", "nfe", "seed", "precision")


@dataclass(frozen=True)
class Sampler:
    """What an actor needs to know to sample."""

    out: Artifact
    denoiser: str
    autoencoder: str
    denoiser_identity: str
    batch_size: int
    threads: int
    guidance: float
    guidance_interval: list[float] | None
    solver: str
    nfe: int
    seed: int
    precision: Precision


class GenerateUnit:
    """An actor that samples and publishes a shard."""

    def __init__(self, sampler: Sampler) -> None:
        import torch

        from dpt_ray.models.autoencoder import load_autoencoder
        from dpt_ray.models.batches import Batches
        from dpt_ray.stages.denoiser import load_denoiser

        torch.set_num_threads(sampler.threads)
        self.computing = threading.Lock()
        self.sampler, self.batches = sampler, Batches(sampler.batch_size)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model, self.config = load_denoiser(sampler.denoiser)
        self.model.to(self.device)
        self.autoencoder = load_autoencoder(sampler.autoencoder, sampler.precision).to(self.device)

    @cluster.naming_shard
    def __call__(self, unit: dict[str, Any]) -> dict[str, Any]:
        """Publishes the images of a range of indices x classes."""
        from dpt_ray.data.shards import write_images

        started = time.perf_counter()
        items = [(label, index) for index in range(*unit["indices"]) for label in range(*unit["classes"])]
        with self.computing:
            images = self._sample(items)
        n = len(items)
        columns = {
            "id": [image_id("gen", label, index) for label, index in items],
            "class": pa.array([label for label, _ in items], pa.int32()),
            "index": pa.array([index for _, index in items], pa.int64()),
            "seed": pa.array([self.sampler.seed] * n, pa.int64()),
            "guidance": pa.array([self.sampler.guidance] * n, pa.float32()),
            "denoiser": pa.array([self.sampler.denoiser_identity] * n).dictionary_encode(),
        }

        def write(path: Path) -> None:
            write_images(path, list(images), columns)

        self.sampler.out.publish_shard(unit["shard"], ".parquet", n, write)
        return {
            "shard": unit["shard"],
            "seconds": time.perf_counter() - started,
            "peak_memory_bytes": cluster.peak_memory(),
        }

    def _sample(self, items: list[tuple[int, int]]) -> np.ndarray:
        """Images (n, H, W, C) uint8 of (class, index) pairs."""
        import torch

        from dpt_ray.diffusion.sampling import Sampling, image_noise, sample

        sampler, null_class = self.sampler, self.config["model"]["num_classes"]
        sampling = Sampling(
            self.config["schedule"],
            self.config["prediction"],
            sampler.solver,
            sampler.nfe,
            sampler.guidance,
            sampler.guidance_interval,
            sampler.precision,
        )
        shape = self.autoencoder.latent_shape

        def compute(start: int, stop: int) -> torch.Tensor:
            batch = items[start:stop]
            noise = torch.stack([image_noise(sampler.seed, *item, shape) for item in batch])
            # An unconditional denoiser knows the null class only.
            known = self.config["condition"] != "none"
            labels = torch.tensor([label if known else null_class for label, _ in batch])
            latents = sample(self.model, noise.to(self.device), labels.to(self.device), null_class, sampling)
            return self.autoencoder.decode(latents).cpu()

        return self.batches(compute, len(items)).numpy()
