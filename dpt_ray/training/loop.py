"""The training loop. It knows no learner: it is handed a step function that returns a loss."""

from __future__ import annotations

import contextlib
import math
import resource
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from dpt_ray.training.ema import EMA
from dpt_ray.training.guards import BadSteps, Divergence
from dpt_ray.training.optimizer import Schedule, adamw, learning_rate
from dpt_ray.training.order import Order, batch_rows, share
from dpt_ray.training.random import GROUP, StepRandom
from dpt_ray.training.sharding import averaging, gather, unwrapped, whole
from dpt_ray.training.state import pack, restore

Batch = dict[str, Tensor]
Checkpoint = tuple[Mapping[str, Tensor], Mapping[str, Any]]
StepFn = Callable[[nn.Module, Batch, StepRandom], Tensor]
LoadBatch = Callable[[np.ndarray, int], Batch]


@dataclass(frozen=True)
class TrainSettings:
    """What a training run is; `batch_size` is the global batch, over all workers."""

    steps: int
    batch_size: int
    learning_rate: float
    seed: int = 0
    weight_decay: float = 0.03
    betas: tuple[float, float] = (0.9, 0.99)
    warmup_steps: int = 0
    lr_schedule: Schedule = "constant"
    ema_decay: float = 0.999
    grad_clip: float | None = None
    precision: Literal["float32", "bfloat16"] = "float32"
    log_every: int = 20
    checkpoint_every: int = 200
    max_bad_steps: int = 10
    diverged_above: float = 5.0


@dataclass(frozen=True)
class TrainResult:
    """The averaged weights under the model's state-dict names, and how many steps were skipped.

    The weights are whole and on the CPU; only rank 0 has them.
    """

    ema: dict[str, Tensor]
    skipped_steps: int


def train(
    model: nn.Module,
    step_fn: StepFn,
    load_batch: LoadBatch,
    settings: TrainSettings,
    n_rows: int,
    *,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
    resume: Checkpoint | None = None,
    on_log: Callable[[dict[str, float]], None] = lambda record: None,
    on_checkpoint: Callable[[int, dict[str, Tensor] | None, dict[str, Any]], None] = (
        lambda step, tensors, meta: None
    ),
    gradient_accumulation: int = 1,
    unit: int = GROUP,
    save_asked: Callable[[], bool] = lambda: False,
    watch_every: int | None = None,
    on_watch: Callable[[int, Mapping[str, Tensor]], None] = lambda step, ema: None,
    order: Order | None = None,
) -> TrainResult:
    """Trains `model` (in place, on `device`; where world_size > 1, made DDP or sharded by the caller).

    `load_batch(rows, step)` returns this worker's tensors on the CPU, first dimension len(rows);
    it runs in a background thread, one step ahead. The rows are those of `order(step)`, the shuffle of
    all `n_rows` where it is not given. `step_fn(model, batch, random)` returns the mean
    loss over exactly the positions random.lo..random.hi. `on_log` is called on rank 0 every
    `log_every` steps and at the end; `on_checkpoint(step, tensors, meta)` on every rank every
    `checkpoint_every` steps and at the end, where only rank 0 gets tensors. With such a pair
    (tensors, meta) given as `resume` to every rank, the run goes on as if it had never stopped.
    `save_asked` is called on every rank every `log_every` steps: where one says True, all come to a
    checkpoint. `on_watch(step, ema)` may look at the averages on rank 0 every `watch_every` steps. A
    step counts from 1 in all. The batch is shared out in groups of `unit` neighbouring positions (a
    multiple of 8), as equally as they go; the gradient is that of the whole batch in any case.
    A step whose loss or gradient is not finite changes no weight. Raises NonFiniteLoss after
    `max_bad_steps` of them in a row, and Diverged where the loss stays high (`guards.Divergence`).
    """
    parts = world_size * gradient_accumulation
    if settings.batch_size % unit or settings.batch_size < parts * unit:
        raise ValueError(
            f"batch_size {settings.batch_size} must be a multiple of {unit} and at least {parts * unit}: "
            f"{unit} x {world_size} workers x {gradient_accumulation} accumulated parts"
        )
    device = torch.device(device)
    core = unwrapped(model)
    ema = EMA(core, settings.ema_decay)
    optimizer = adamw(core, settings.learning_rate, settings.weight_decay, settings.betas)
    first, bad_steps = 0, BadSteps(settings.max_bad_steps)
    divergence = Divergence(settings.diverged_above)
    if resume:
        tensors, meta = resume
        restore(core, ema, optimizer, tensors)
        first = meta["step"]
        bad_steps = BadSteps(settings.max_bad_steps, meta["skipped_steps"], meta["bad_in_a_row"])
        divergence = Divergence(settings.diverged_above, **meta.get("losses", {}))  # older ones have none

    lo, hi = share(settings.batch_size, rank, world_size, unit)
    pieces = [share(hi - lo, part, gradient_accumulation, unit) for part in range(gradient_accumulation)]
    # The mean over the workers of their sums over pieces is the mean over the global batch.
    weights = [world_size * (b - a) / settings.batch_size for a, b in pieces]

    def load(step: int) -> Batch:
        rows = order(step) if order else batch_rows(settings.seed, step, settings.batch_size, n_rows)
        batch = load_batch(rows[lo:hi], step)
        return {k: v.pin_memory() if device.type == "cuda" else v for k, v in batch.items()}

    model.train()
    meter = Meter(settings.batch_size)
    with contextlib.closing(prefetch(load, range(first, settings.steps))) as batches:
        for step, (batch, waited) in enumerate(batches, start=first):
            batch = {k: v.to(device, non_blocking=True) for k, v in batch.items()}
            loss = _accumulate_gradients(model, step_fn, batch, settings, step, lo, pieces, weights)
            lr = learning_rate(
                step,
                settings.learning_rate,
                settings.warmup_steps,
                settings.steps,
                settings.lr_schedule,
            )
            grad_norm = _update_weights(optimizer, lr, settings.grad_clip)
            ema.update(core)
            bad_steps.add(step + 1, ~grad_norm.isfinite())
            meter.add(waited)

            done, last = step + 1, step + 1 == settings.steps
            save = last or done % settings.checkpoint_every == 0
            if last or done % settings.log_every == 0:
                bad_steps.settle()
                mean_loss, asked = _over_workers(loss, save_asked(), world_size)
                save |= asked
                if rank == 0:
                    on_log(
                        {
                            "step": done,
                            "loss": mean_loss,
                            "lr": lr,
                            "grad_norm": grad_norm.item(),
                            "skipped_steps": bad_steps.skipped,
                            **meter.read(device),
                        }
                    )
                divergence.add(done, mean_loss)
            if watch_every and done % watch_every == 0:
                with meter.paused():
                    averages = gather(ema.tensors, rank == 0)
                    if rank == 0:
                        on_watch(done, averages)
            if save:
                bad_steps.settle()
                with meter.paused():
                    meta = {
                        "step": done,
                        "skipped_steps": bad_steps.skipped,
                        "bad_in_a_row": bad_steps.in_a_row,
                        "losses": divergence.state(),
                    }
                    packed = pack(core, ema, optimizer, keep=rank == 0)
                    on_checkpoint(done, packed if rank == 0 else None, meta)
    return TrainResult(gather(ema.tensors, rank == 0), bad_steps.skipped)


def _accumulate_gradients(
    model: nn.Module,
    step_fn: StepFn,
    batch: Batch,
    settings: TrainSettings,
    step: int,
    lo: int,
    pieces: list[tuple[int, int]],
    weights: list[float],
) -> Tensor:
    """Adds the gradient of the weighted sum of the pieces' losses to `.grad`; returns that sum."""
    device = next(v.device for v in batch.values())
    total = torch.zeros((), device=device)
    for (a, b), weight in zip(pieces, weights, strict=True):
        random = StepRandom(settings.seed, step, lo + a, lo + b, device)
        with averaging(model, now=(a, b) == pieces[-1]):
            with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bfloat16"):
                loss = step_fn(model, {k: v[a:b] for k, v in batch.items()}, random)
            loss = loss.float() * weight
            # A loss that is not finite makes all its gradients NaN, and the average carries them to
            # every worker: all skip the step without asking each other.
            loss.backward(torch.where(loss.isfinite(), 1.0, math.nan))
        total += loss.detach()
    return total


def _update_weights(optimizer: torch.optim.AdamW, learning_rate: float, grad_clip: float | None) -> Tensor:
    """Takes one step, unless the gradient's norm (returned, before clipping) is not finite."""
    [group] = optimizer.param_groups
    grads = [p.grad for p in group["params"] if p.grad is not None]
    grad_norm = whole(torch.nn.utils.get_total_norm(grads))
    if grad_clip is not None:
        torch.nn.utils.clip_grads_with_norm_(group["params"], grad_clip, grad_norm)
    group["lr"] = learning_rate
    # Fused AdamW reads this flag on the device (it is there for loss scaling): where it is 1,
    # weights, moments and their step count stay as they are, and the host need not wait to know.
    vars(optimizer)["found_inf"] = (~grad_norm.isfinite()).float()
    optimizer.step()
    optimizer.zero_grad()
    return grad_norm


def _over_workers(loss: Tensor, asked: bool, world_size: int) -> tuple[float, bool]:
    """The mean of the workers' losses, and whether any of them has asked."""
    both = torch.stack([loss, torch.full_like(loss, asked)])
    if world_size > 1:
        torch.distributed.all_reduce(both)
    total, asking = both.tolist()
    return total / world_size, asking > 0


def prefetch(load: Callable[[int], Batch], steps: range) -> Generator[tuple[Batch, float], None, None]:
    """Yields `load(step)` for each step, loaded one ahead, and the seconds it was waited for."""
    if not steps:
        return
    with ThreadPoolExecutor(max_workers=1) as thread:
        ahead = thread.submit(load, steps.start)
        for step in steps:
            start = time.perf_counter()
            batch = ahead.result()
            waited = time.perf_counter() - start
            if step + 1 in steps:
                ahead = thread.submit(load, step + 1)
            yield batch, waited


class Meter:
    """Speed since the last reading."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self._restart()

    def _restart(self) -> None:
        self.start, self.steps, self.waited = time.perf_counter(), 0, 0.0

    def add(self, waited: float) -> None:
        """Counts one step that waited so many seconds for its data."""
        self.steps += 1
        self.waited += waited

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves out the time of the block (writing a checkpoint is not training)."""
        begin = time.perf_counter()
        yield
        self.start += time.perf_counter() - begin

    def read(self, device: torch.device) -> dict[str, float]:
        """`images_per_s`, `data_wait` (share of the time, 0..1), peak `memory` in bytes."""
        seconds = time.perf_counter() - self.start
        record = {
            "images_per_s": self.steps * self.batch_size / seconds,
            "data_wait": self.waited / seconds,
            "memory": torch.cuda.max_memory_allocated(device)
            if device.type == "cuda"
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }
        self._restart()
        return record
