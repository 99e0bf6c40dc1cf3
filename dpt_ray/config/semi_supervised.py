"""The learners of stages 1 and 3 that train the encoder itself: FreeMatch, Semi-ViT, fine-tuning."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dpt_ray.config.hashing import HashedIfSet, NotHashed
from dpt_ray.config.training import Optimisation
from dpt_ray.config.values import Count, Fraction, Positive, ViewsName

# "linear" is logistic regression on the frozen encoder's features; the others train the encoder on pixels.
LearnerName = Literal["linear", "supervised", "freematch", "semi_vit"]
Threshold = Annotated[float, Field(gt=0, lt=1)] | Literal["adaptive"]


class SemiSupervised(Optimisation):
    """The training of a learner other than linear (docs/semi_supervised.md).

    `batch_size` is the number of labelled images of a step; each comes with `unlabelled_ratio` others.

    - `ema_decay`: of the teacher, whose weights are also what is used after the training.
    - `threshold`: least confidence of a pseudo-label; "adaptive" is FreeMatch's, by class.
    - `threshold_momentum`: of adaptive thresholds; short trainings need less than the paper's 0.999.
    - `unlabelled_weight`: of the loss on unlabelled images (default: 5 for semi_vit, 1 for freematch).
    - `head`: the last layer's start, stage 1's linear probe or random values.
    - `views`: how the views of an image differ. "small_images" mirrors it and moves it by up to an eighth,
      "digits" does not mirror, "photographs" crops a random part. The strong ones add RandAugment and
      erasing.
    - `group`: how many neighbouring positions of a batch are mixed with each other, and share a fairness
      term. A worker has whole groups.
    - `supervised_steps`: how many of the first steps train on the labelled images alone. The teacher is the
      student until then.
    - `layer_decay`: the learning rate of a layer is this times that of the layer above it.
    - `mixup`: mix labelled images with each other, by mixup or CutMix (semi_vit and supervised);
      "after_supervised" leaves it out in the `supervised_steps`.
    - `erasing`: how often a part of a strong view of "photographs" is erased.
    """

    ema_decay: Annotated[float, Field(gt=0, lt=1)] = 0.999
    lr_schedule: Literal["constant", "cosine"] = "cosine"
    # The loss rises as pseudo-labels pass, above all after `supervised_steps`: the guard is off by default.
    diverged_above: Annotated[float, Field(gt=1), NotHashed] = 1e9
    unlabelled_ratio: Count = 5
    unlabelled_weight: Annotated[Positive | None, HashedIfSet] = None
    threshold: Threshold = "adaptive"
    threshold_momentum: Annotated[float, Field(gt=0, lt=1)] = 0.999
    head: Literal["probe", "random"] = "probe"
    views: ViewsName = "small_images"
    group: Annotated[int, Field(ge=8, multiple_of=8)] = 16
    supervised_steps: Annotated[int, Field(ge=0)] = 0
    layer_decay: Annotated[Annotated[float, Field(gt=0, le=1)] | None, HashedIfSet] = None
    mixup: bool | Literal["after_supervised"] = False
    erasing: Annotated[Fraction, HashedIfSet] = 0.25

    @model_validator(mode="after")
    def _groups(self) -> SemiSupervised:
        if self.batch_size % self.group:
            raise ValueError(f"group {self.group} must divide batch_size {self.batch_size}")
        return self


class LearnerSettings(SemiSupervised):
    """The training with its method, and in stage 3 the generated images of each class that are added."""

    method: Literal["supervised", "freematch", "semi_vit"]
    images_per_class: Annotated[Count | None, HashedIfSet] = None
    max_bad_fraction: Annotated[Fraction, NotHashed] = 0.001
