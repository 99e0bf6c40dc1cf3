"""The section of what a run measures."""

from __future__ import annotations

from pydantic import model_validator

from dpt_ray.config.hashing import Section
from dpt_ray.config.sections import LabelChoice, Resize
from dpt_ray.config.training import Pretrain
from dpt_ray.config.values import Augmentation, Count, Positive


class Evaluate(Section):
    """What is measured.

    - `controls`: compare DPT with the same sweep on augmented labelled images and on pseudo-labelled real
      images, and with a probe whose l2 is chosen on validation too, among `classifier.l2` and that value
      divided by 10, 100 and 1000.
    - `augmentation`, `augment_strength`: of those images, see `pretrain`.
    - `referee`: training settings of an independent classifier that is used only to measure.
    - `inception`: the file of FID's Inception weights; enables FID, sFID, Inception Score, KID, precision
      and recall.
    - `images`: how many generated images these measure (default: all).
    - `labels`: how `images` are chosen. "balanced" takes the first of each class; "uniform" draws labels
      uniformly at random, as U-ViT and DPT do, and takes as many of each class as were drawn.
    - `reference`: an npz with `mu` and `sigma` (for sFID also ADM's `mu_s` and `sigma_s`) that replaces
      the run's own test images in FID and sFID.
    - `resize`: the filter to Inception's 299 pixels. "tensorflow" is that of ADM's evaluator and reference
      statistics, "pytorch_fid" that of the published numbers of U-ViT and DPT, "clean" that of clean-fid.
    """

    controls: bool = True
    augmentation: Augmentation = "digits"
    augment_strength: Positive = 1.0
    referee: Pretrain | None = None
    inception: str | None = None
    reference: str | None = None
    resize: Resize = "tensorflow"
    images: Count | None = None
    labels: LabelChoice = "balanced"

    @model_validator(mode="after")
    def _drawn(self) -> Evaluate:
        if self.labels == "uniform" and not self.images:
            raise ValueError("labels uniform needs images: how many of the generated images are drawn")
        return self
