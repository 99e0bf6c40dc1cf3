"""A small Frechet distance of samples from the EMA weights, while the denoiser trains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from dpt_ray.data.crops import Crop
from dpt_ray.data.rows import TrainingFeatures
from dpt_ray.engine.node import Task
from dpt_ray.learners.preview import AveragedSampler

if TYPE_CHECKING:
    from torch import Tensor

    from dpt_ray.models.precision import Precision

FACTS = "frechet.json"
IMAGES = 1000  # in all; of equal number per class where there are no more classes than this
BLOCK = 4096  # rows of real features to read at a time


class TrainingFrechet:
    """The distance of `IMAGES` samples to the real training images in stage 1's features.

    It is cheap and biased: few images, and an encoder trained on the same images in place of the
    report's referee. Compare steps of one training, or trainings of equal guidance, encoder and images.
    The samples are the first that the `samples` stage makes from these weights.
    """

    def __init__(self, task: Task, sampler: AveragedSampler, real: TrainingFeatures, device: str) -> None:
        import torch

        from dpt_ray.diffusion.sampling import image_noise
        from dpt_ray.evaluation.frechet import FeatureStatistics
        from dpt_ray.models.encoder import load_encoder

        self._sampler, self._device = sampler, device
        encoder = task.inputs["encoder"]
        self._crop = Crop(**encoder.manifest["crop"])
        precision: Precision = task.inputs["features"].manifest["settings"]["precision"]
        self._encoder = load_encoder(encoder.uri, precision).to(device)
        self._batch_size = task.compute.batch_size
        classes = task.inputs["index"].manifest["classes"]
        self._items = [(number % classes, number // classes) for number in range(IMAGES)]
        self._noise = torch.stack([image_noise(sampler.seed, *item, sampler.shape) for item in self._items])
        self._target = FeatureStatistics.empty(real.dim)
        for start in range(0, len(real), BLOCK):
            rows = real.rows(np.arange(start, min(start + BLOCK, len(real))))
            self._target.update(torch.from_numpy(rows))
        how = sampler.sampling
        facts = {
            "n_generated": IMAGES,
            "n_reference": len(real),
            "reference": "real training images",
            "extractor": "the run's encoder (stage 1)",
            "guidance": how.guidance,
            "guidance_interval": how.guidance_interval,
            "solver": how.solver,
            "nfe": how.nfe,
        }
        task.out.write_json(FACTS, facts)

    def __call__(self, step: int, weights: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the distance, and the guidance it was measured at, for the log."""
        import torch

        from dpt_ray.evaluation.frechet import FeatureStatistics, frechet_distance

        images = self._sampler.images(weights, [label for label, _ in self._items], self._noise)
        pixels = torch.from_numpy(np.stack([self._cut(image) for image in images]))
        found = FeatureStatistics.empty(len(self._target.mean))
        for batch in pixels.split(self._batch_size):
            found.update(self._encoder(batch.to(self._device)))
        distance = frechet_distance(found, self._target)
        return {"frechet": distance, "frechet_guidance": self._sampler.sampling.guidance}

    def _cut(self, image: np.ndarray) -> np.ndarray:
        """Return the encoder's crop of one image."""
        from PIL import Image

        from dpt_ray.data.crops import crop

        return crop(Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image), self._crop)
