"""A small Frechet distance while the denoiser trains, of what its averaged weights draw."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dpt_ray.config.sections import ResolvedPrecision
from dpt_ray.data.crops import Crop, crop
from dpt_ray.data.rows import TrainingFeatures
from dpt_ray.diffusion.sampling import image_noise
from dpt_ray.evaluation.frechet import FeatureStatistics, frechet_distance
from dpt_ray.learners.averaged_sampler import AveragedSampler
from dpt_ray.models.encoder import load_encoder
from dpt_ray.store.artifact import Artifact

IMAGES = 1000  # in all, as many of each class as of another where they are no more than this
BLOCK = 4096  # rows of real features at a time


class Extractor:
    """Features of generated images, as if they had been read from files."""

    def __init__(self, encoder: Artifact, precision: ResolvedPrecision, device: str) -> None:
        self._crop = Crop(**encoder.manifest["crop"])
        self._encoder, self._device = load_encoder(encoder.uri, precision).to(device), device

    def __call__(self, images: np.ndarray, batch_size: int) -> Iterator[Tensor]:
        """Yield the features (n, dim) of batches of images (n, H, W, C) uint8."""
        pixels = torch.from_numpy(np.stack([self._cut(image) for image in images]))
        for batch in pixels.split(batch_size):
            yield self._encoder(batch.to(self._device))

    def _cut(self, image: np.ndarray) -> np.ndarray:
        """Return the encoder's crop of one image."""
        return crop(Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image), self._crop)


class TrainingFrechet:
    """The distance of `IMAGES` samples to the real training images in stage 1's features.

    Cheap and biased: few images, an encoder made for these images, and not the report's referee. It
    compares steps of one training, and trainings of equal guidance, encoder and images. The samples are
    the first that the `samples` stage would make of these weights.
    """

    def __init__(
        self, sampler: AveragedSampler, extractor: Extractor, real: TrainingFeatures, classes: int
    ) -> None:
        self._sampler, self._extractor, self._n_reference = sampler, extractor, len(real)
        self._items = [(number % classes, number // classes) for number in range(IMAGES)]
        self._noise = torch.stack([image_noise(sampler.seed, *item, sampler.shape) for item in self._items])
        self._target = FeatureStatistics.empty(real.dim)
        for start in range(0, len(real), BLOCK):
            rows = real.rows(np.arange(start, min(start + BLOCK, len(real))))
            self._target.update(torch.from_numpy(rows))

    @property
    def facts(self) -> dict[str, object]:
        """All that it takes to compare the distances, as JSON."""
        how = self._sampler.sampling
        return {
            "n_generated": IMAGES,
            "n_reference": self._n_reference,
            "reference": "real training images",
            "extractor": "the run's encoder (stage 1)",
            "guidance": how.guidance,
            "guidance_interval": how.guidance_interval,
            "solver": how.solver,
            "nfe": how.nfe,
        }

    def __call__(self, step: int, weights: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the distance, and the guidance it holds for, for the log."""
        images = self._sampler.images(weights, [label for label, _ in self._items], self._noise)
        found = FeatureStatistics.empty(len(self._target.mean))
        for features in self._extractor(images, self._sampler.batch_size):
            found.update(features)
        distance = frechet_distance(found, self._target)
        return {"frechet": distance, "frechet_guidance": self._sampler.sampling.guidance}
