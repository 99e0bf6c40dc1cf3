"""generate: images for each class, from the flat list of (class, index).

A shard is a fixed range of indices x classes, so more images per class add shards and repeat none. The
noise of an image is drawn on the CPU from a hash of (seed, class, index).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dpt_ray.cluster.units import Result, peak_memory, run_actors, unit_call
from dpt_ray.config.sections import SampleSettings
from dpt_ray.data.class_ranges import ClassRange, class_ranges, image_columns, items
from dpt_ray.data.units import collect_shards
from dpt_ray.engine.node import RunsOn, Stage, Task, one_of, reads
from dpt_ray.models.saved import CONFIG
from dpt_ray.store.artifact import Artifact
from dpt_ray.store.records import Facts


class Samples(Stage[SampleSettings]):
    """Generated images, lossless, with class, index, seed, guidance and the denoiser's identity."""

    artifact = "samples"
    settings = SampleSettings
    inputs = reads({"denoiser": one_of("denoiser"), "autoencoder": one_of("autoencoder")})
    runs_on = RunsOn.ACTORS

    @classmethod
    def version(cls, settings: SampleSettings) -> int:
        """Return the version; in version 1 the denoiser sampled in float32 at any precision."""
        return 1 if settings.precision == "float32" else 2

    @classmethod
    def make(cls, task: Task[SampleSettings]) -> Facts:
        """Publish the missing shards of the extent."""
        classes = classes_of(task.inputs["denoiser"].read_json(CONFIG))
        images_per_class = task.node.extent.images_per_class
        assert images_per_class is not None  # set by the flow
        units = class_ranges(images_per_class, task.settings.indices_per_shard, classes)
        done = task.out.shards()
        missing = [unit for unit in units if unit["shard"] not in done]
        facts: Facts = {"startup_seconds": 0.0, "peak_memory_bytes": 0}
        if missing:
            facts = run_actors(
                missing,
                GenerateUnit,
                lambda threads: {"sampler": _sampler(task, threads)},
                task.compute,
                task.progress,
                images=sum(len(items(unit)) for unit in missing),
            )
        channels = task.inputs["autoencoder"].manifest["latent_shape"][0]
        found = collect_shards(task.out, units)
        return {**facts, **found, "made": len(missing), "mode": "L" if channels == 1 else "RGB"}


def classes_of(denoiser: Mapping[str, Any]) -> int:
    """Return the number of classes of a denoiser's configuration; older ones have only the network's."""
    return int(denoiser.get("classes") or denoiser["model"]["num_classes"])


@dataclass(frozen=True)
class Sampler:
    """The arguments of an actor that samples."""

    out: Artifact
    denoiser: str
    autoencoder: str
    denoiser_identity: str
    batch_size: int
    threads: int
    settings: SampleSettings
    compile: bool = False


def _sampler(task: Task[SampleSettings], threads: int) -> Sampler:
    return Sampler(
        task.out,
        task.inputs["denoiser"].uri,
        task.inputs["autoencoder"].uri,
        task.node.inputs["denoiser"].digest,
        task.compute.batch_size,
        threads,
        task.settings,
        task.compute.compile,
    )


class GenerateUnit:
    """An actor that samples and publishes a shard."""

    def __init__(self, sampler: Sampler) -> None:
        import torch

        from dpt_ray.models.autoencoder import load_autoencoder
        from dpt_ray.models.batches import Batches
        from dpt_ray.models.denoiser import load_denoiser

        torch.set_num_threads(sampler.threads)
        self.computing = threading.Lock()
        self.sampler, self.batches = sampler, Batches(sampler.batch_size)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model, self.config = load_denoiser(sampler.denoiser)
        self.model.to(self.device)
        self.autoencoder = load_autoencoder(sampler.autoencoder, sampler.settings.precision).to(self.device)
        if sampler.compile:
            self.autoencoder.compile_networks()
            for block in self.model.blocks:
                block.compile()  # equal blocks are compiled once

    @unit_call
    def __call__(self, unit: ClassRange) -> Result:
        """Publish the images of a range of indices x classes."""
        from dpt_ray.data.shards import write_images

        started = time.perf_counter()
        chosen = items(unit)
        with self.computing:
            images = self._sample(chosen)
        n, settings = len(chosen), self.sampler.settings
        columns = {
            **image_columns("gen", unit),
            "seed": pa.array([settings.seed] * n, pa.int64()),
            "guidance": pa.array([settings.guidance] * n, pa.float32()),
            "denoiser": pa.array([self.sampler.denoiser_identity] * n).dictionary_encode(),
        }

        def write(path: Path) -> None:
            write_images(path, list(images), columns)

        self.sampler.out.publish_shard(unit["shard"], ".parquet", n, write)
        return {
            "seconds": time.perf_counter() - started,
            "peak_memory_bytes": peak_memory(),
            "images": n,
        }

    @property
    def classes(self) -> int:
        """The number of classes that the denoiser generates."""
        return classes_of(self.config)

    def sample_one(self, unit: ClassRange, item: tuple[int, int]) -> np.ndarray:
        """Return one image (H, W, C) uint8 of a unit, sampled in the batch that the unit samples it in."""
        chosen = items(unit)
        place = chosen.index(item)
        start = place - place % self.batches.size
        return self._sample(chosen[start : start + self.batches.size])[place - start]

    def _sample(self, chosen: list[tuple[int, int]]) -> np.ndarray:
        """Return images (n, H, W, C) uint8 of (class, index) pairs."""
        import torch

        from dpt_ray.diffusion.sampling import Sampling, image_noise, sample

        settings, null_class = self.sampler.settings, self.config["model"]["num_classes"]
        sampling = Sampling(
            self.config["schedule"],
            self.config["prediction"],
            settings.solver,
            settings.nfe,
            settings.guidance,
            settings.guidance_interval,
            settings.precision,
        )
        shape = self.autoencoder.latent_shape

        def compute(start: int, stop: int) -> torch.Tensor:
            batch = chosen[start:stop]
            noise = torch.stack([image_noise(settings.seed, *item, shape) for item in batch])
            # An unconditional denoiser has the null class only.
            known = self.config["condition"] != "none"
            labels = torch.tensor([label if known else null_class for label, _ in batch])
            latents = sample(self.model, noise.to(self.device), labels.to(self.device), null_class, sampling)
            return self.autoencoder.decode(latents).cpu()

        return self.batches(compute, len(chosen)).numpy()
