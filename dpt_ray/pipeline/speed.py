"""Measure how fast this machine trains the networks of a run and fits its classifiers, by real steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dpt_ray.cluster import session as cluster
from dpt_ray.config import Config
from dpt_ray.config.sections import Denoiser
from dpt_ray.config.training import Pretrain
from dpt_ray.models.precision import resolved

if TYPE_CHECKING:
    import torch

    from dpt_ray.models.precision import Precision

SECONDS = 0.1  # target of one measured step; on a busy machine short steps are less disturbed
ALL_SECONDS, STEPS = 1.0, 10  # measured per network, at most, with all threads and with one
GUESS = {"cpu": 120e9, "cuda": 30e12, "fit": 30e9}  # FLOP/s that the size of the first step is chosen by
LARGEST_SIDE = 32  # of the images for a convolutional network
VIEWED = 32  # images whose views are drawn to measure
SHALLOW = 2  # depth of the measured transformer, whose layers are alike


@dataclass(frozen=True)
class Rates:
    """FLOP/s of training steps on `device` with a convolutional network and with a transformer.

    They are the network's operations over the whole time of a step: augmentation and the overhead of small
    networks lower the rate, as in the training itself. `fit` is the rate of the linear classifier's fits, on
    the CPU; None where it was not measured.
    """

    conv: float
    transformer: float
    device: str
    fit: float | None = None


@dataclass(frozen=True)
class FitShape:
    """The rows, the length of a feature row and the classes of a fit of the linear classifier."""

    rows: int
    dim: int
    classes: int


def machine_rates(config: Config, threads: int, fit: FitShape | None = None) -> Rates:
    """Return the rates of this machine for a run's networks and fits; precisions must be resolved."""
    device = training_device(config)
    channels = 1 if config.data.mode == "L" else 3
    encoder = config.pretrain or Pretrain(steps=1, batch_size=128, learning_rate=1e-3)
    conv = measure_encoder(encoder, config.data.image_size, channels, threads, device)
    diffusion = config.diffusion
    if config.autoencoder.kind == "identity":
        side = config.data.image_size
    else:
        side, channels = config.data.image_size // 8, 4
    transformer = measure_denoiser(
        diffusion.model, side, channels, resolved(diffusion.precision), threads, device
    )
    return Rates(conv, transformer, device, measure_fit(fit, threads) if fit else None)


def training_device(config: Config) -> str:
    """Return where this machine would train the run's networks."""
    import torch

    wanted = config.compute.train_gpus or not config.compute.train_workers
    return "cuda" if wanted and torch.cuda.is_available() else "cpu"


def measure_encoder(section: Pretrain, side: int, channels: int, threads: int, device: str) -> float:
    """Return the FLOP/s of SimCLR steps with the network of `section` on square images."""
    import torch

    from dpt_ray.learners.objectives import OBJECTIVES
    from dpt_ray.models.own_networks import own_network
    from dpt_ray.training.random import GROUP, StepRandom
    from dpt_ray.training.throughput import forward_flops

    side = side if section.patch_size else min(side, LARGEST_SIDE)
    generator = torch.Generator().manual_seed(0)
    network, _ = own_network(section, channels, side, generator)
    # Two views, and a backward pass of twice the forward one.
    flops = 6 * forward_flops(network, torch.empty(1, channels, side, side))
    images = _images_of(flops, section.batch_size, device, GROUP)
    section = section.model_copy(update={"contrast_group": images})
    objective = OBJECTIVES["simclr"](network, section, 1, generator)
    model = objective.model.to(device)
    batch = {"image": torch.rand(images, channels, side, side, generator=generator).to(device)}

    def loss() -> torch.Tensor:
        return objective.step_fn(model, batch, StepRandom(0, 0, 0, images, device))

    return flops * images / _seconds(loss, resolved(section.precision), threads, device)


def measure_denoiser(
    section: Denoiser, side: int, channels: int, precision: Precision, threads: int, device: str
) -> float:
    """Return the FLOP/s of training steps with a shallow network of the denoiser's width and tokens."""
    import torch

    from dpt_ray.models.uvit import UViT, UViTConfig, flops

    values = section.model_dump() | {"depth": min(section.depth, SHALLOW)}
    side = max(section.patch_size, side - side % section.patch_size)
    config = UViTConfig(side, in_channels=channels, num_classes=1, **values)
    model = UViT(config).to(device)
    per_image = 3 * flops(config)
    images = _images_of(per_image, 64, device, 1)
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(images, channels, side, side, generator=generator).to(device)
    t, y = torch.full((images,), 500.0, device=device), torch.zeros(images, dtype=torch.long, device=device)

    def loss() -> torch.Tensor:
        return model(x, t, y).square().mean()

    return per_image * images / _seconds(loss, precision, threads, device)


def measure_fit(shape: FitShape, threads: int) -> float:
    """Return the FLOP/s of passes over rows of this shape, or over some of them, in a fit on the CPU."""
    import torch

    from dpt_ray.data.rows import Rows
    from dpt_ray.learners.linear_probe import problem_of

    per_row = 4 * shape.dim * shape.classes
    rows = max(1, min(shape.rows, int(SECONDS * GUESS["fit"] / per_row)))
    features = torch.rand(rows, shape.dim, generator=torch.Generator().manual_seed(0)).numpy()
    labels = torch.arange(rows).remainder(shape.classes).numpy()
    problem = problem_of([Rows(features, labels)], shape.classes, 0.0025, torch.device("cpu"))
    W = torch.zeros(shape.classes, shape.dim, dtype=torch.float64)
    return per_row * rows / _fastest(lambda: problem.objective_and_gradient(W), _tried(threads, "cpu"))


def measure_view(views: str, side: int) -> float:
    """Return the seconds in which one core draws a view of `side` pixels, the mean of weak and strong ones.

    `views` is one of `semi_supervised.views`.
    """
    import torch

    from dpt_ray.learners.encoder_learners import VIEWS
    from dpt_ray.learners.weak_strong import draw_views

    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (VIEWED, 3, side, side), dtype=torch.uint8, generator=generator)
    both = VIEWS[views](side)
    drawn = _fastest(lambda: [draw_views(images, view, range(VIEWED)) for view in both], (1,))
    return drawn / (len(both) * VIEWED)


def _images_of(flops: float, batch_size: int, device: str, multiple: int) -> int:
    """Return the number of images of a measured step: a batch, or fewer if it would take too long."""
    affordable = int(SECONDS * GUESS[device] / flops)
    return max(multiple, min(batch_size, affordable) // multiple * multiple)


def _seconds(loss: Callable[[], torch.Tensor], precision: Precision, threads: int, device: str) -> float:
    """Return the seconds of the fastest step, forward and backward."""
    import torch

    from dpt_ray.models.precision import autocast, bfloat16_gain

    gain = bfloat16_gain() if (device, precision) == ("cpu", "bfloat16") else 1.0
    if gain < 1:  # emulated: a step of a large network would take minutes
        return _seconds(loss, "float32", threads, device) / gain

    def step() -> None:
        with autocast(torch.device(device), precision):
            value = loss()
        value.backward()
        if device == "cuda":
            torch.cuda.synchronize()

    return _fastest(step, _tried(threads, device))


def _tried(threads: int, device: str) -> tuple[int, ...]:
    """Return the numbers of threads to measure with.

    Threads that wait for each other on a busy machine make single steps many times slower, and hardly a
    whole training: then the rate of one of them says more.
    """
    return (threads, 1) if threads > 1 and device == "cpu" else (threads,)


def _fastest(step: Callable[[], object], tried: Sequence[int]) -> float:
    """Return the seconds of the fastest of up to STEPS steps with each number of threads."""
    import torch

    before = torch.get_num_threads()
    try:
        return min(_with_threads(step, count) for count in tried)
    finally:
        torch.set_num_threads(before)


def _with_threads(step: Callable[[], object], threads: int) -> float:
    import torch

    torch.set_num_threads(threads)
    best, spent = float("inf"), 0.0
    for _ in range(STEPS):
        started = time.perf_counter()
        step()
        seconds = time.perf_counter() - started
        best, spent = min(best, seconds), spent + seconds
        if spent > ALL_SECONDS:
            break
    return best


def training_threads(config: Config) -> int:
    """Return the threads of this machine that a training uses, over all its workers."""
    compute = config.compute
    if not compute.threads:  # the workers share all of them
        return cluster.threads(compute)
    return min(cluster.usable_cpus(), compute.threads * max(1, compute.train_workers))
