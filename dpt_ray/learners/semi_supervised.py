"""The losses of Semi-ViT (arXiv 2208.05688) and FreeMatch (arXiv 2205.07246) as step functions.

A batch has B labelled images and R unlabelled ones for each of them: "image" (B, C, H, W) uint8, "label"
(B,) int64 and "unlabelled" (B, R, C, H, W) uint8. The images at a position stay on one worker, and whatever
couples images does so within groups of positions, so that the number of workers does not matter.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from dpt_ray.learners.adaptive_threshold import AdaptiveThreshold, fairness_loss, threshold_rows
from dpt_ray.learners.pseudo_mixup import CutMix, partners_within, pseudo_loss, pseudo_mixup
from dpt_ray.learners.weak_strong import Views, draw_views, network_pixels, view_keys
from dpt_ray.training.random import StepRandom
from dpt_ray.training.sharding import local, unwrapped
from dpt_ray.training.workload import Batch, StepFn


class StudentTeacher(nn.Module):
    """A classifier, its moving average that makes the pseudo-labels, and the adaptive thresholds.

    `student` maps (B, C, H, W) in [-1, 1] to logits (B, num_classes). `pending` (2 num_classes + 2,) is
    what the last step adds to the thresholds, the same on every worker.
    """

    pending: Tensor

    def __init__(
        self, student: nn.Module, num_classes: int, decay: float, threshold_momentum: float = 0.999
    ) -> None:
        super().__init__()
        if not 0 < decay < 1:
            raise ValueError(f"ema_decay {decay}: must lie between 0 and 1 for a teacher")
        self.student, self.decay = student, decay
        self.teacher = copy.deepcopy(student).requires_grad_(False)
        self.threshold = AdaptiveThreshold(num_classes, threshold_momentum)
        self.register_buffer("pending", torch.zeros(2 * num_classes + 2))

    def train(self, mode: bool = True) -> StudentTeacher:
        """Set the student's mode; the teacher stays in evaluation mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, images: Tensor, by_teacher: bool = False) -> Tensor:
        """Return logits (B, num_classes)."""
        return self.teacher(images) if by_teacher else self.student(images)

    @torch.no_grad()
    def before_step(self, step: int) -> None:
        """Take what the step before `step` has changed into the teacher and the thresholds."""
        if not step:
            return
        # theta' <- d theta' + (1 - d) theta; counts are copied
        student = self.student.state_dict()
        for name, average in self.teacher.state_dict().items():
            if average.is_floating_point():
                local(average).lerp_(local(student[name]), 1 - self.decay)
            else:
                average.copy_(student[name])
        self.threshold.update(self.pending)
        self.pending.zero_()

    @torch.no_grad()
    def observe(self, probabilities: Tensor) -> None:
        """Add predictions (n, num_classes) of weak views to those that the next step's thresholds follow.

        A collective operation of all workers.
        """
        sums = threshold_rows(probabilities).sum(0)
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
        self.pending += sums


def semi_vit_step(
    views: Views,
    num_classes: int,
    group: int,
    threshold: float | None,
    unlabelled_weight: float = 5.0,
    cutmix: float = 0.5,
    smoothing: float = 0.1,
) -> StepFn:
    """Return Semi-ViT's step function for a `StudentTeacher`: L = CE + lambda_u L_u.

    Partners are mixed within `group` consecutive positions of the global batch. `threshold` None takes
    FreeMatch's adaptive thresholds; `cutmix` is the probability of CutMix for each unlabelled image.
    """

    def step(model: nn.Module, batch: Batch, random: StepRandom) -> Tensor:
        unlabelled, per = batch["unlabelled"].flatten(0, 1), batch["unlabelled"].shape[1]
        weak = _drawn(unlabelled, views.weak, random, "weak", per)
        strong = _drawn(unlabelled, views.strong, random, "strong", per)
        labelled = _drawn(batch["image"], views.strong, random, "labelled", 1)
        # p = softmax(teacher(weak(u))), o = max p, y = argmax p
        with torch.no_grad():
            p = model(weak, by_teacher=True).float().softmax(1)
        confidence, labels = p.max(1)
        core = _observed(model, p)
        partners = partners_within(random.uniform("partner", (per,)).flatten(), group * per)
        chosen = random.uniform("cutmix", (per,)).flatten() < cutmix
        boxes = CutMix(chosen, random.uniform("centre", (per, 2)).flatten(0, 1))
        mixed = pseudo_mixup(strong, labels, confidence, partners, num_classes, smoothing, boxes)

        sure, least = mixed.confidence, threshold
        if least is None:  # in units of each class's threshold
            sure, least = confidence / core.threshold.thresholds()[labels], 1.0
            sure = torch.maximum(sure, sure[partners])
        of_labelled, of_mixed = _split(model(torch.cat([labelled, mixed.images])), len(labelled))
        supervised = F.cross_entropy(of_labelled, batch["label"])
        return supervised + unlabelled_weight * pseudo_loss(of_mixed, mixed.targets, sure, least)

    return step


def freematch_step(
    views: Views, group: int, unlabelled_weight: float = 1.0, fairness_weight: float = 0.01
) -> StepFn:
    """Return FreeMatch's step function for a `StudentTeacher`: L = L_s + w_u L_u + w_f L_f.

    Pseudo-labels are the student's own; the teacher is what is used after the training. The fairness term
    is that of `group` consecutive positions of the global batch, and thresholds are those before the step.
    """

    def step(model: nn.Module, batch: Batch, random: StepRandom) -> Tensor:
        unlabelled, per = batch["unlabelled"].flatten(0, 1), batch["unlabelled"].shape[1]
        weak = _drawn(unlabelled, views.weak, random, "weak", per)
        strong = _drawn(unlabelled, views.strong, random, "strong", per)
        labelled = _drawn(batch["image"], views.weak, random, "labelled", 1)
        with torch.no_grad():
            q = model(weak).float().softmax(1)
        confidence, labels = q.max(1)
        core = _observed(model, q)
        sure = confidence >= core.threshold.thresholds()[labels]
        of_labelled, of_strong = _split(model(torch.cat([labelled, strong])), len(labelled))
        # L_u = mean 1[max q >= tau(argmax q)] CE(Q, argmax q)
        loss = torch.where(sure, F.cross_entropy(of_strong, labels, reduction="none"), 0.0).mean()
        supervised = F.cross_entropy(of_labelled, batch["label"])
        fair = _fairness(of_strong, sure, core.threshold, group * per)
        return supervised + unlabelled_weight * loss + fairness_weight * fair

    return step


def _fairness(strong: Tensor, sure: Tensor, state: AdaptiveThreshold, rows: int) -> Tensor:
    """Return the mean fairness term of groups of `rows` strong views."""
    groups = zip(strong.split(rows), sure.split(rows), strict=True)
    found = [fairness_loss(part, which, state.prediction, state.histogram) for part, which in groups]
    return torch.stack(found).mean()


def _drawn(images: Tensor, transform: nn.Module, random: StepRandom, name: str, per: int) -> Tensor:
    """Return a view of each image in network pixels."""
    return network_pixels(draw_views(images, transform, view_keys(random, name, per)))


def _observed(model: nn.Module, probabilities: Tensor) -> StudentTeacher:
    """Return the model without a wrapper, after it has observed the predictions."""
    core = unwrapped(model)
    assert isinstance(core, StudentTeacher)
    core.observe(probabilities)
    return core


def _split(logits: Tensor, labelled: int) -> tuple[Tensor, Tensor]:
    """Return the logits of the labelled images and of the others, in float32."""
    return logits[:labelled].float(), logits[labelled:].float()
