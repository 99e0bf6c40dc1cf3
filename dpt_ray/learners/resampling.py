"""Images that are sampled again, from other noise, until a classifier takes them for their class."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from dpt_ray.config.sections import Resample, ResolvedPrecision
from dpt_ray.data.crops import crop
from dpt_ray.learners.agreement import agreed
from dpt_ray.learners.linear_classifier import load_classifier
from dpt_ray.models.encoder import load_encoder
from dpt_ray.models.served import Served
from dpt_ray.store.artifact import Artifact

Sample = Callable[[Sequence[int], int], np.ndarray]  # (places in the batch, attempt) -> images
Judge = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]  # see `EncoderJudge.__call__`


class Resampled(NamedTuple):
    """Images (n, H, W, C), the attempt (n,) that each is of, from 0 on, and whether it passes (n,)."""

    images: np.ndarray
    attempt: np.ndarray
    passes: np.ndarray


class EncoderJudge:
    """The classifier of a run's pseudo-labels on generated pixels, by the run's encoder."""

    def __init__(
        self,
        inputs: Mapping[str, Artifact],
        min_confidence: float,
        precision: ResolvedPrecision,
        device: str,
    ) -> None:
        """`inputs` has the artifacts encoder, judge (a classifier) and judge_labels (its temperature)."""
        encoder = load_encoder(inputs["encoder"].uri, precision)
        temperature = inputs["judge_labels"].manifest["calibration"]["temperature"]
        self.served = Served(encoder, load_classifier(inputs["judge"]), temperature).to(device)
        self.min_confidence, self.device = min_confidence, device

    def __call__(self, images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the confidence (n,) in each image's own class, and whether the image passes (n,).

        `images` (n, H, W, C) are uint8, `labels` (n,) class ids.
        """
        pixels = np.stack([crop(_picture(image), self.served.encoder.crop) for image in images])
        p = self.served(torch.from_numpy(pixels).to(self.device)).cpu().numpy()
        return p[np.arange(len(labels)), labels], agreed(p, labels, self.min_confidence)


def resample(sample: Sample, judge: Judge, labels: np.ndarray, how: Resample) -> Resampled:
    """Return an image for each of `labels` (n,): the first attempt that passes, else the surest one."""
    images = sample(range(len(labels)), 0)
    surest, passes = judge(images, labels)
    attempts = np.zeros(len(labels), np.int64)
    for attempt in range(1, how.attempts):
        again = np.flatnonzero(~passes)
        if not len(again):
            break
        new = sample(again.tolist(), attempt)
        confidence, passed = judge(new, labels[again])
        better = passed | (confidence > surest[again])
        taken = again[better]
        images[taken], surest[taken] = new[better], confidence[better]
        attempts[taken], passes[again] = attempt, passed
    return Resampled(images, attempts, passes)


def sampled_in_all(attempt: np.ndarray, passes: np.ndarray, attempts: int) -> int:
    """Return how many images were sampled for those that were taken; see `Resampled`."""
    return int(np.where(passes, attempt + 1, attempts).sum())


def _picture(image: np.ndarray) -> Image.Image:
    """Return an image (H, W, 1 or 3) uint8 as it is read from its file."""
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
