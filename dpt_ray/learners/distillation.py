"""Distillation: a small network learns a teacher's probabilities (SimCLRv2, arXiv 2006.10029, Sec. 2)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from dpt_ray.config.values import ViewsName
from dpt_ray.learners.encoder_learners import VIEWS
from dpt_ray.learners.fine_tuned import FineTuned
from dpt_ray.learners.weak_strong import Draw, draw_views, network_pixels, view_keys
from dpt_ray.models.encoder import Encoder
from dpt_ray.training.random import StepRandom
from dpt_ray.training.throughput import forward_flops
from dpt_ray.training.workload import Batch, StepFn


def distillation_step(temperature: float) -> StepFn:
    """Return the step function for batches {"image" (B, C, H, W) uint8, "target" (B, classes)}.

    The targets are the teacher's probabilities at that temperature. They stand for all images, the few
    labelled ones among them, as in the paper's loss without labels.
    """

    def step(model: nn.Module, batch: Batch, random: StepRandom) -> Tensor:
        logits = model(network_pixels(batch["image"])).float()
        # L = -1/B sum_i sum_y P_T(y | x_i; tau) log P_S(y | x_i; tau),  P(y | x; tau) = softmax(f(x) / tau)_y
        return F.cross_entropy(logits / temperature, batch["target"])

    return step


def draw_weak(views: ViewsName, size: int) -> Draw:
    """Return what puts a weak view of `size` pixels in the place of each "image" of a batch."""
    weak = VIEWS[views](size).weak

    def draw(batch: Batch, random: StepRandom) -> Batch:
        return batch | {"image": draw_views(batch["image"], weak, view_keys(random, "view"))}

    return draw


def parameters_and_flops(encoder: Encoder, weights: np.ndarray) -> tuple[int, int]:
    """Return the parameters of an encoder with a classifier (classes, dim), and its FLOPs for an image."""
    network, size = FineTuned(encoder, weights), encoder.crop.size
    flops = forward_flops(network, torch.empty(1, len(encoder.spec.mean), size, size))
    return sum(parameter.numel() for parameter in network.parameters()), flops
