"""The losses of Semi-ViT (arXiv 2208.05688) and FreeMatch (arXiv 2205.07246) as step functions.

A batch has a view of each of B labelled images and of R unlabelled ones for each of them: "labelled"
(B, C, H, W) uint8, "label" (B,) int64, "weak" and "strong" (B, R, C, H, W) uint8. They are drawn by
`weak_strong.batch_views`. The images at a position stay on one worker, and whatever couples images does so
within groups of positions, so that the number of workers does not matter.

Where the teacher collapses, more and more images pass the threshold (`above_threshold` nears 1) while they
are given to few classes (`class_entropy` falls): `StudentTeacher.extra_log` tells both.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from dpt_ray.learners.adaptive_threshold import AdaptiveThreshold, fairness_loss, threshold_rows
from dpt_ray.learners.labelled_mixup import LabelledMix
from dpt_ray.learners.pseudo_mixup import CutMix, partners_within, pseudo_loss, pseudo_mixup
from dpt_ray.learners.weak_strong import network_pixels
from dpt_ray.training.random import StepRandom
from dpt_ray.training.sharding import local, unwrapped
from dpt_ray.training.workload import Batch, StepFn


class StudentTeacher(nn.Module):
    """A classifier, its moving average that makes the pseudo-labels, and the adaptive thresholds.

    `student` maps (B, C, H, W) in [-1, 1] to logits (B, num_classes). `pending` (2 num_classes + 3,) is
    what the last step adds to the thresholds, and how many images were above theirs; the same on every
    worker. In the first `supervised_steps` steps the teacher is the student, so that what follows starts
    from the fine-tuned weights, and not from an average with those before.
    """

    pending: Tensor

    def __init__(
        self,
        student: nn.Module,
        num_classes: int,
        decay: float,
        threshold_momentum: float = 0.999,
        supervised_steps: int = 0,
    ) -> None:
        super().__init__()
        if not 0 < decay < 1:
            raise ValueError(f"ema_decay {decay}: must lie between 0 and 1 for a teacher")
        self.student, self.decay, self.supervised_steps = student, decay, supervised_steps
        self.teacher = copy.deepcopy(student).requires_grad_(False)
        self.threshold = AdaptiveThreshold(num_classes, threshold_momentum)
        self.register_buffer("pending", torch.zeros(2 * num_classes + 3))

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
        rate = 1.0 if step <= self.supervised_steps else 1 - self.decay
        for name, average in self.teacher.state_dict().items():
            if average.is_floating_point():
                local(average).lerp_(local(student[name]), rate)
            else:
                average.copy_(student[name])
        self.threshold.update(self.pending[:-1])
        self.pending.zero_()

    @torch.no_grad()
    def observe(self, probabilities: Tensor, above: Tensor) -> None:
        """Add predictions (n, num_classes) of weak views to those that the next step's thresholds follow.

        above (n,) bool says which are above their threshold. A collective operation of all workers.
        """
        sums = torch.cat([threshold_rows(probabilities).sum(0), above.sum()[None]])
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
        # A step that is skipped for its loss has NaN predictions, which the averages would keep for good.
        self.pending += torch.where(sums.isfinite().all(), sums, 0.0)

    def extra_log(self) -> dict[str, Tensor]:
        """Return numbers of the last step's unlabelled images, the same on every worker; none without any.

        `above_threshold` is the share that is above its threshold, before it is mixed. `class_entropy` is
        the entropy of the mean prediction in units of log C: 1 where the classes are in balance, 0 where
        all predictions are of one class.
        """
        classes = len(self.threshold.prediction)
        _, predicted, _, rows, above = self.pending.split([1, classes, classes, 1, 1])
        if not rows:
            return {}
        entropy = torch.special.entr(predicted / rows).sum() / math.log(classes)
        return {"above_threshold": above[0] / rows[0], "class_entropy": entropy}


def supervised_step(mix: LabelledMix | None = None, smoothing: float = 0.1) -> StepFn:
    """Return the step function of cross-entropy on the views of the labelled images alone.

    With a `StudentTeacher` the teacher follows as in the semi-supervised steps. Labels are smoothed, by `mix`
    where there is one.
    """

    def step(model: nn.Module, batch: Batch, random: StepRandom) -> Tensor:
        labelled, targets = _labelled(batch, random, mix)
        return _cross_entropy(model(labelled).float(), targets, smoothing)

    return step


def supervised_first(steps: int, supervised: StepFn, then: StepFn) -> StepFn:
    """Return the step function `supervised` for the first `steps` steps of a training and `then` after them.

    Semi-ViT's supervised stage, with one schedule of the learning rate for both.
    """

    def step(model: nn.Module, batch: Batch, random: StepRandom) -> Tensor:
        return (supervised if random.step < steps else then)(model, batch, random)

    return step


def semi_vit_step(
    num_classes: int,
    group: int,
    threshold: float | None,
    unlabelled_weight: float = 5.0,
    cutmix: float = 0.5,
    smoothing: float = 0.1,
    mix: LabelledMix | None = None,
) -> StepFn:
    """Return Semi-ViT's step function for a `StudentTeacher`: L = CE + lambda_u L_u.

    Unlabelled images are mixed within `group` consecutive positions of the global batch (in the published
    code, within a GPU's batch; see `partners_within`), the labelled ones by `mix`. `threshold` None takes
    FreeMatch's adaptive thresholds; `cutmix` is the probability of CutMix for each unlabelled image.
    Labels and pseudo-labels are smoothed, the former by `mix` where there is one.
    """

    def step(model: nn.Module, batch: Batch, random: StepRandom) -> Tensor:
        per, weak, strong = _unlabelled(batch)
        labelled, targets = _labelled(batch, random, mix)
        # p = softmax(teacher(weak(u))), o = max p, y = argmax p
        with torch.no_grad():
            p = model(weak, by_teacher=True).float().softmax(1)
        confidence, labels = p.max(1)
        # o_i >= tau, or o_i / tau(y_i) >= 1
        sure, least = confidence, 1.0 if threshold is None else threshold
        if threshold is None:
            sure = confidence / _core(model).threshold.thresholds()[labels]
        _core(model).observe(p, sure >= least)
        partners = partners_within(random.uniform("partner", (per,)).flatten(), group * per)
        chosen = random.uniform("cutmix", (per,)).flatten() < cutmix
        boxes = CutMix(chosen, random.uniform("centre", (per, 2)).flatten(0, 1))
        mixed = pseudo_mixup(strong, labels, confidence, partners, num_classes, smoothing, boxes)

        of_labelled, of_mixed = _split(model(torch.cat([labelled, mixed.images])), len(labelled))
        supervised = _cross_entropy(of_labelled, targets, smoothing)
        unsupervised = pseudo_loss(of_mixed, mixed.targets, torch.maximum(sure, sure[partners]), least)
        return supervised + unlabelled_weight * unsupervised

    return step


def freematch_step(group: int, unlabelled_weight: float = 1.0, fairness_weight: float = 0.01) -> StepFn:
    """Return FreeMatch's step function for a `StudentTeacher`: L = L_s + w_u L_u + w_f L_f.

    Pseudo-labels are the student's own; the teacher is what is used after the training. The fairness term
    is that of `group` consecutive positions of the global batch, and thresholds are those before the step.
    """

    def step(model: nn.Module, batch: Batch, random: StepRandom) -> Tensor:
        per, weak, strong = _unlabelled(batch)
        labelled, targets = _labelled(batch, random)
        with torch.no_grad():
            q = model(weak).float().softmax(1)
        confidence, labels = q.max(1)
        core = _core(model)
        sure = confidence >= core.threshold.thresholds()[labels]
        core.observe(q, sure)
        of_labelled, of_strong = _split(model(torch.cat([labelled, strong])), len(labelled))
        # L_u = mean 1[max q >= tau(argmax q)] CE(Q, argmax q)
        loss = torch.where(sure, F.cross_entropy(of_strong, labels, reduction="none"), 0.0).mean()
        supervised = F.cross_entropy(of_labelled, targets)
        fair = _fairness(of_strong, sure, core.threshold, group * per)
        return supervised + unlabelled_weight * loss + fairness_weight * fair

    return step


def _fairness(strong: Tensor, sure: Tensor, state: AdaptiveThreshold, rows: int) -> Tensor:
    """Return the mean fairness term of groups of `rows` strong views."""
    groups = zip(strong.split(rows), sure.split(rows), strict=True)
    found = [fairness_loss(part, which, state.prediction, state.histogram) for part, which in groups]
    return torch.stack(found).mean()


def _unlabelled(batch: Batch) -> tuple[int, Tensor, Tensor]:
    """Return R, and the weak and strong views of all unlabelled images in network pixels (B R, C, H, W)."""
    weak, strong = (network_pixels(batch[name].flatten(0, 1)) for name in ("weak", "strong"))
    return batch["weak"].shape[1], weak, strong


def _labelled(batch: Batch, random: StepRandom, mix: LabelledMix | None = None) -> tuple[Tensor, Tensor]:
    """Return views of the labelled images in network pixels, mixed if asked, and their (soft) labels."""
    images = network_pixels(batch["labelled"])
    return mix(images, batch["label"], random) if mix else (images, batch["label"])


def _cross_entropy(logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """Return the cross-entropy with labels (B,), which are smoothed, or with soft targets (B, C)."""
    return F.cross_entropy(logits, targets, label_smoothing=0.0 if targets.ndim == 2 else smoothing)


def _core(model: nn.Module) -> StudentTeacher:
    """Return the model without a wrapper."""
    core = unwrapped(model)
    assert isinstance(core, StudentTeacher)
    return core


def _split(logits: Tensor, labelled: int) -> tuple[Tensor, Tensor]:
    """Return the logits of the labelled images and of the others, in float32."""
    return logits[:labelled].float(), logits[labelled:].float()
