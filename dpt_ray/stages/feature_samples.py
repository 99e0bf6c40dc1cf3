"""generate-features: features of each class, from the flat list of (class, index).

A shard is a fixed range of indices x classes, as of generated images, and the noise of a feature is drawn
from a hash of (seed, class, index): more of them add shards and change none.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dpt_ray.cluster.units import Result, peak_memory, run_actors, unit_call
from dpt_ray.config.features import FeatureSampling
from dpt_ray.data.class_ranges import ClassRange, class_ranges, image_columns, items
from dpt_ray.data.shards import write_features
from dpt_ray.data.units import collect_shards
from dpt_ray.engine.node import RunsOn, Stage, Task, one_of, reads
from dpt_ray.models.saved import CONFIG
from dpt_ray.store.artifact import Artifact
from dpt_ray.store.records import Facts

SOLVER = "dpm_solver_pp_2m"
# 64 indices of 1,000 classes with features of length 768 are a shard of 200 MB, the most that an actor holds.
INDICES_PER_SHARD = 64


class FeatureSamples(Stage[FeatureSampling]):
    """Rows of id, feature, class and index: to a reader features, and what they are the features of."""

    artifact = "feature_samples"
    settings = FeatureSampling
    inputs = reads({"feature_denoiser": one_of("feature_denoiser")})
    runs_on = RunsOn.ACTORS

    @classmethod
    def make(cls, task: Task[FeatureSampling]) -> Facts:
        """Publish the missing shards of the extent."""
        classes = task.inputs["feature_denoiser"].read_json(CONFIG)["model"]["num_classes"]
        images_per_class = task.node.extent.images_per_class
        assert images_per_class is not None  # set by the flow
        units = class_ranges(images_per_class, INDICES_PER_SHARD, classes)
        done = task.out.shards()
        missing = [unit for unit in units if unit["shard"] not in done]
        facts: Facts = {"startup_seconds": 0.0, "peak_memory_bytes": 0}
        if missing:
            facts = run_actors(
                missing,
                FeatureUnit,
                lambda threads: {"sampler": _sampler(task, threads)},
                task.compute,
                task.progress,
                images=sum(len(items(unit)) for unit in missing),
            )
        return {**facts, **collect_shards(task.out, units), "made": len(missing)}


@dataclass(frozen=True)
class FeatureSampler:
    """The arguments of an actor that samples."""

    out: Artifact
    denoiser: str
    batch_size: int
    threads: int
    settings: FeatureSampling
    compile: bool = False


def _sampler(task: Task[FeatureSampling], threads: int) -> FeatureSampler:
    denoiser, compute = task.inputs["feature_denoiser"].uri, task.compute
    return FeatureSampler(task.out, denoiser, compute.batch_size, threads, task.settings, compute.compile)


class FeatureUnit:
    """An actor that samples and publishes a shard."""

    def __init__(self, sampler: FeatureSampler) -> None:
        import torch

        from dpt_ray.models.batches import Batches
        from dpt_ray.models.feature_denoiser import load_feature_denoiser

        torch.set_num_threads(sampler.threads)
        self.computing = threading.Lock()
        self.sampler, self.batches = sampler, Batches(sampler.batch_size)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = load_feature_denoiser(sampler.denoiser)
        self.model.network.to(self.device)
        if sampler.compile:
            self.model.network.compile()

    @unit_call
    def __call__(self, unit: ClassRange) -> Result:
        """Publish the features of a range of indices x classes."""
        started = time.perf_counter()
        with self.computing:
            features = self._sample(items(unit))
        columns = image_columns("feat", unit)
        ids = columns.pop("id")

        def write(path: Path) -> None:
            write_features(path, ids, features, columns)

        self.sampler.out.publish_shard(unit["shard"], ".parquet", len(features), write)
        return {
            "seconds": time.perf_counter() - started,
            "peak_memory_bytes": peak_memory(),
            "images": len(features),
        }

    def _sample(self, chosen: list[tuple[int, int]]) -> np.ndarray:
        """Return features (n, dim) float32 of (class, index) pairs."""
        import torch

        from dpt_ray.diffusion.sampling import Sampling, image_noise, sample

        settings, model = self.sampler.settings, self.model
        shape = (model.network.config.dim,)
        how = Sampling(
            model.told["schedule"], model.told["prediction"], SOLVER, settings.nfe, settings.guidance
        )

        def compute(start: int, stop: int) -> torch.Tensor:
            batch = chosen[start:stop]
            noise = torch.stack([image_noise(settings.seed, *item, shape) for item in batch])
            labels = torch.tensor([label for label, _ in batch])
            null_class = model.network.config.num_classes
            found = sample(model.network, noise.to(self.device), labels.to(self.device), null_class, how)
            return found.cpu() * model.std + model.mean

        return self.batches(compute, len(chosen)).numpy()
