"""generate: images for each class, from the flat list of (class, index).

A shard is a fixed range of indices x classes, so more images per class add shards and repeat none. The
noise of an image is drawn on the CPU from a hash of (seed, class, index, attempt). With `resample` an image
that a classifier does not take for its class is sampled again, together with the others of its batch.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from dpt_ray.cluster.units import Result, peak_memory, run_actors, unit_call
from dpt_ray.config.sections import Compute, Resample, SampleSettings
from dpt_ray.data.class_ranges import ClassRange, class_ranges, image_columns, items
from dpt_ray.data.shards import read_columns
from dpt_ray.data.units import collect_shards
from dpt_ray.engine.node import Node, RunsOn, Stage, Task, one_of, reads
from dpt_ray.models.saved import CONFIG
from dpt_ray.store.artifact import Artifact
from dpt_ray.store.records import Facts

if TYPE_CHECKING:
    from dpt_ray.learners.resampling import Resampled

RESAMPLED = ("attempt", "passes")  # columns of images with `resample`, see `learners.resampling.Resampled`


class Samples(Stage[SampleSettings]):
    """Generated images, lossless, with class, index, seed, guidance and the denoiser's identity."""

    artifact = "samples"
    settings = SampleSettings
    inputs = reads(
        {
            "denoiser": one_of("denoiser"),
            "autoencoder": one_of("autoencoder"),
            # With `resample`: of the classifier that decides the features, it, and its temperature.
            "encoder": one_of("encoder", optional=True),
            "judge": one_of("classifier", "rung", optional=True),
            "judge_labels": one_of("pseudo_labels", "rung", optional=True),
        }
    )
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
                lambda threads: {
                    "sampler": Sampler.of(task.node, task.out, task.inputs, task.compute, threads)
                },
                task.compute,
                task.progress,
                images=sum(len(items(unit)) for unit in missing),
            )
        channels = task.inputs["autoencoder"].manifest["latent_shape"][0]
        found = collect_shards(task.out, units)
        if task.settings.resample:
            names = task.inputs["judge"].read_json(CONFIG)["classes"]
            found |= _resampled(task.name, task.out, found, task.settings.resample, names)
        return {**facts, **found, "made": len(missing), "mode": "L" if channels == 1 else "RGB"}


def classes_of(denoiser: Mapping[str, Any]) -> int:
    """Return the number of classes of a denoiser's configuration; older ones have only the network's."""
    return int(denoiser.get("classes") or denoiser["model"]["num_classes"])


def _resampled(name: str, out: Artifact, found: Facts, resample: Resample, classes: Sequence[str]) -> Facts:
    """Return how many images were sampled, and how many of those taken pass; warn of those that do not."""
    from dpt_ray.learners.resampling import sampled_in_all

    columns = ("class", *RESAMPLED)
    table = read_columns(out, columns, found["shards"])
    label, attempt, passes = (table[key].to_numpy() for key in columns)
    short = np.bincount(label[~passes], minlength=len(classes))
    if short.any():
        worst = int(short.argmax())
        logging.getLogger("dpt_ray").warning(
            "%s: %d of %d images, of %d of %d classes, pass at none of %d attempts (class %s: %d); "
            "retrain.min_confidence leaves them out of stage 3, more generate.resample.attempts find more",
            name,
            short.sum(),
            len(label),
            np.count_nonzero(short),
            len(classes),
            resample.attempts,
            classes[worst],
            short[worst],
        )
    sampled = sampled_in_all(attempt, passes, resample.attempts)
    return {"sampled": sampled, "passed": int(passes.sum())}


@dataclass(frozen=True)
class Sampler:
    """The arguments of an actor that samples; `denoiser` and `autoencoder` are the URIs of their folders.

    `judges` has what `EncoderJudge` reads, where images are sampled again.
    """

    out: Artifact
    denoiser: str
    autoencoder: str
    denoiser_identity: str
    batch_size: int
    threads: int
    settings: SampleSettings
    compile: bool = False
    judges: Mapping[str, Artifact] = field(default_factory=dict)

    @classmethod
    def of(
        cls, node: Node, out: Artifact, inputs: Mapping[str, Artifact], compute: Compute, threads: int
    ) -> Sampler:
        """Return the arguments for a node of `Samples`."""
        assert isinstance(node.settings, SampleSettings)
        return cls(
            out,
            inputs["denoiser"].uri,
            inputs["autoencoder"].uri,
            node.inputs["denoiser"].digest,
            compute.batch_size,
            threads,
            node.settings,
            compute.compile,
            inputs if node.settings.resample else {},
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
        settings = sampler.settings
        self.model, self.config = load_denoiser(sampler.denoiser)
        self.model.to(self.device)
        self.autoencoder = load_autoencoder(sampler.autoencoder, settings.precision).to(self.device)
        if settings.resample:
            from dpt_ray.learners.resampling import EncoderJudge

            precision = settings.features_precision
            assert precision is not None  # set by the flow
            least = settings.resample.min_confidence
            self.judge = EncoderJudge(sampler.judges, least, precision, self.device)
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
            images, told = self._images(chosen)
        n, settings = len(chosen), self.sampler.settings
        columns = {
            **image_columns("gen", unit),
            "seed": pa.array([settings.seed] * n, pa.int64()),
            "guidance": pa.array([settings.guidance] * n, pa.float32()),
            "denoiser": pa.array([self.sampler.denoiser_identity] * n).dictionary_encode(),
            **told,
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
        return self._images(chosen)[0]

    def _images(self, chosen: list[tuple[int, int]]) -> tuple[np.ndarray, dict[str, pa.Array]]:
        """Return images (n, H, W, C) uint8 of (class, index) pairs, and with `resample` its columns."""
        import torch

        parts: list[Resampled] = []

        def compute(start: int, stop: int) -> torch.Tensor:
            batch = chosen[start:stop]
            if not self.sampler.settings.resample:
                return torch.from_numpy(self._attempt(batch))
            parts.append(self._resample(batch, self.sampler.settings.resample))
            return torch.from_numpy(parts[-1].images)

        images = self.batches(compute, len(chosen)).numpy()
        columns = {key: np.concatenate([getattr(part, key) for part in parts]) for key in RESAMPLED if parts}
        return images, {key: pa.array(column) for key, column in columns.items()}

    def _resample(self, chosen: list[tuple[int, int]], how: Resample) -> Resampled:
        """Return images of (class, index) pairs that pass, as far as the attempts reach."""
        from dpt_ray.learners.resampling import resample

        labels = np.array([label for label, _ in chosen])

        def sample(places: Sequence[int], attempt: int) -> np.ndarray:
            return self._attempt([chosen[place] for place in places], attempt)

        return resample(sample, self.judge, labels, how)

    def _attempt(self, chosen: list[tuple[int, int]], attempt: int = 0) -> np.ndarray:
        """Return images (n, H, W, C) uint8 of (class, index) pairs, sampled in one batch."""
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
        noise = torch.stack([image_noise(settings.seed, *item, shape, attempt) for item in chosen])
        # An unconditional denoiser has the null class only.
        known = self.config["condition"] != "none"
        labels = torch.tensor([label if known else null_class for label, _ in chosen])
        latents = sample(self.model, noise.to(self.device), labels.to(self.device), null_class, sampling)
        images: np.ndarray = self.autoencoder.decode(latents).cpu().numpy()
        return images
