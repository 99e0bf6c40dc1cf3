"""Generating features in place of images: what is generated, the feature denoiser, its sampling."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dpt_ray.config.hashing import NotHashed, Settings
from dpt_ray.config.training import Optimisation
from dpt_ray.config.values import BelowOne, Count, Positive, Seed

# What stage 2 generates.
GenerateIn = Literal["images", "features", "both"]


class FeatureTraining(Optimisation):
    """The training of the feature denoiser: a residual MLP with `depth` blocks of `width` units."""

    steps: Count = 1000
    batch_size: Annotated[int, Field(ge=8, multiple_of=8)] = 256
    learning_rate: Positive = 2e-3
    warmup_steps: Annotated[int, Field(ge=0)] = 100
    lr_schedule: Literal["constant", "cosine"] = "cosine"
    ema_decay: BelowOne = 0.99
    width: Annotated[int, Field(ge=2, multiple_of=2)] = 256
    depth: Count = 3
    label_dropout: BelowOne = 0.1


class FeatureSampling(Settings):
    """How features are drawn from the feature denoiser; `guidance` 1 is none."""

    guidance: Positive = 1.0
    nfe: Count = 25
    seed: Seed = 0


class FeatureDiffusion(FeatureTraining, FeatureSampling):
    """Stage 2 on the encoder's features: the training, and what is drawn from it (docs/ladder.md).

    `images_per_class` is how many features of each class are drawn (default: that of `generate`).
    """

    images_per_class: Annotated[Count | None, NotHashed] = None

    @model_validator(mode="after")
    def _null_class(self) -> FeatureDiffusion:
        if self.guidance != 1 and not self.label_dropout:
            raise ValueError(
                f"guidance {self.guidance:g} leads away from the null class, which label_dropout 0 does not "
                "train: set label_dropout above 0, or guidance 1"
            )
        return self
