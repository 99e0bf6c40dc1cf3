"""The training loop, independent of learners: a step function returns the loss."""

from __future__ import annotations

import contextlib
import math
import resource
import time
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dpt_ray.store.records import CheckpointMeta
from dpt_ray.training.ema import EMA
from dpt_ray.training.guards import BadSteps, Divergence
from dpt_ray.training.optimizer import Schedule, adamw, learning_rate
from dpt_ray.training.order import batch_rows, share
from dpt_ray.training.prefetch import prefetch
from dpt_ray.training.random import StepRandom
from dpt_ray.training.sharding import averaging, gather, unwrapped, whole
from dpt_ray.training.state import pack, restore
from dpt_ray.training.workload import Batch, Checkpoint, Hooks, Worker, Workload

SAVING_SHARE = 0.05  # largest share of the time spent on checkpoints by time


@dataclass(frozen=True)
class TrainSettings:
    """The settings of a training; `batch_size` is the global batch over all workers."""

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
    checkpoint_seconds: float = 120.0
    max_bad_steps: int = 10
    diverged_above: float = 5.0


@dataclass(frozen=True)
class TrainResult:
    """The EMA weights by state-dict name and the number of skipped steps.

    The weights are whole and on the CPU; only rank 0 has them.
    """

    ema: dict[str, Tensor]
    skipped_steps: int


def train(
    workload: Workload,
    settings: TrainSettings,
    worker: Worker,
    hooks: Hooks,
    resume: Checkpoint | None = None,
) -> TrainResult:
    """Train the model in place on the worker's device; with several workers it is DDP or sharded.

    Records are logged every `log_every` steps and at the end. Checkpoints are made every `checkpoint_every`
    steps or about every `checkpoint_seconds`, whichever is sooner, at the end, and when a worker asks for
    one. Given a checkpoint (tensors, meta) as `resume` on every rank, the training continues as if it had
    never stopped.
    A step with a non-finite loss or gradient changes no weight. Raises NonFiniteLoss after `max_bad_steps`
    consecutive ones, and Diverged if the loss stays high (`guards.Divergence`).
    """
    run = _Run(workload, settings, worker, hooks, resume)
    del resume  # its file is mapped into memory, and would be held for the whole training
    workload.model.train()
    with contextlib.closing(run.batches()) as batches:
        for step, (batch, waited) in enumerate(batches, start=run.first):
            made = run.step(step, batch, waited)
            done, last = step + 1, step + 1 == settings.steps
            save = last or done % settings.checkpoint_every == 0
            if last or done % settings.log_every == 0:
                save |= run.log(done, made)
            elif done == run.first + 1:
                run.agree(made.loss)
            save |= run.is_save_due(done)
            if hooks.watch_every and done % hooks.watch_every == 0:
                run.watch(done)
            if save:
                run.save(done)
                run.agree(made.loss)
    return TrainResult(gather(run.ema.tensors, worker.rank == 0), run.bad_steps.skipped)


@dataclass(frozen=True)
class _Step:
    """The result of one step."""

    loss: Tensor
    grad_norm: Tensor
    lr: float


class _Run:
    """The state of a training on one worker."""

    def __init__(
        self,
        workload: Workload,
        settings: TrainSettings,
        worker: Worker,
        hooks: Hooks,
        resume: Checkpoint | None,
    ) -> None:
        self.workload, self.settings, self.worker, self.hooks = workload, settings, worker, hooks
        self.device = torch.device(worker.device)
        self._share_out()
        self.core = unwrapped(workload.model)
        self.ema = EMA(self.core, settings.ema_decay)
        rate, decay, groups = settings.learning_rate, settings.weight_decay, workload.parameter_groups
        self.optimizer = adamw(self.core, rate, decay, settings.betas, groups)
        self.first, self.bad_steps = 0, BadSteps(settings.max_bad_steps)
        self.divergence = Divergence(settings.diverged_above)
        if resume:
            self._restore(*resume)
        self.meter = Meter(settings.batch_size)
        self.saved_at, self.save_seconds, self.steps_between_saves = self.first, 0.0, settings.steps

    def _share_out(self) -> None:
        """Set this worker's positions in the global batch and those of its accumulated parts."""
        batch_size, unit = self.settings.batch_size, self.workload.unit
        parts, workers = self.workload.gradient_accumulation, self.worker.world_size
        least = workers * parts * unit
        if batch_size % unit or batch_size < least:
            raise ValueError(
                f"batch_size {batch_size} must be a multiple of {unit} and at least {least}: "
                f"{unit} x {workers} workers x {parts} accumulated parts"
            )
        self.lo, self.hi = share(batch_size, self.worker.rank, workers, unit)
        self.pieces = [share(self.hi - self.lo, part, parts, unit) for part in range(parts)]
        # With these weights the mean over workers of the sums over pieces is the mean over the global batch.
        self.weights = [workers * (b - a) / batch_size for a, b in self.pieces]

    def _restore(self, tensors: Mapping[str, Tensor], meta: CheckpointMeta) -> None:
        restore(self.core, self.ema, self.optimizer, tensors)
        self.first = meta["step"]
        limits = self.settings.max_bad_steps, self.settings.diverged_above
        self.bad_steps = BadSteps(limits[0], meta["skipped_steps"], meta["bad_in_a_row"])
        self.divergence = Divergence(limits[1], **meta.get("losses", {}))  # absent in older checkpoints

    def batches(self) -> Generator[tuple[Batch, float], None, None]:
        """Yield this worker's batch of each step that is left, and the seconds spent waiting for it."""
        steps, pin = range(self.first, self.settings.steps), self.device.type == "cuda"
        return prefetch(self.load, steps, self.workload.load_processes, pin)

    def load(self, step: int) -> Batch:
        """Load this worker's part of the batch of `step`; processes prepare it too."""
        settings, workload = self.settings, self.workload
        if workload.order:
            rows = workload.order(step)
        else:
            rows = batch_rows(settings.seed, step, settings.batch_size, workload.n_rows)
        batch = workload.load_batch(rows[self.lo : self.hi], step)
        return self._prepared(step, batch) if workload.load_processes else batch

    def _prepared(self, step: int, batch: Batch) -> Batch:
        return self.workload.prepare(batch, StepRandom(self.settings.seed, step, self.lo, self.hi))

    def step(self, step: int, batch: Batch, waited: float) -> _Step:
        """Take one step on a batch; `waited` is the seconds spent waiting for it."""
        settings = self.settings
        if not self.workload.load_processes:
            batch = self._prepared(step, batch)
        batch = {k: v.to(self.device, non_blocking=True) for k, v in batch.items()}
        self.workload.before_step(step)
        loss = self._accumulate_gradients(step, batch)
        lr = learning_rate(
            step, settings.learning_rate, settings.warmup_steps, settings.steps, settings.lr_schedule
        )
        grad_norm = _update_weights(self.optimizer, lr, settings.grad_clip)
        self.ema.update(self.core, copying=step < self.workload.copied_steps)
        self.bad_steps.add(step + 1, ~grad_norm.isfinite())
        self.meter.add(waited)
        return _Step(loss, grad_norm, lr)

    def _accumulate_gradients(self, step: int, batch: Batch) -> Tensor:
        """Add the gradient of the weighted sum of the pieces' losses to `.grad`; return that sum."""
        model, device, settings = self.workload.model, self.device, self.settings
        total = torch.zeros((), device=device)
        for (a, b), weight in zip(self.pieces, self.weights, strict=True):
            random = StepRandom(settings.seed, step, self.lo + a, self.lo + b, device)
            with averaging(model, now=(a, b) == self.pieces[-1]):
                with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bfloat16"):
                    loss = self.workload.step_fn(model, {k: v[a:b] for k, v in batch.items()}, random)
                loss = loss.float() * weight
                # A non-finite loss makes all gradients NaN, and averaging spreads them to every worker: all
                # skip the step without further communication.
                loss.backward(torch.where(loss.isfinite(), 1.0, math.nan))
            total += loss.detach()
        return total

    def log(self, done: int, made: _Step) -> bool:
        """Log the last step; return whether a worker asks for a checkpoint."""
        loss, asked = self.agree(made.loss, self.hooks.save_asked())
        if self.worker.rank == 0:
            record = {"step": done, "loss": loss, "lr": made.lr, "grad_norm": made.grad_norm.item()}
            record |= {"skipped_steps": self.bad_steps.skipped, **self.meter.read(self.device)}
            record |= {name: value.item() for name, value in self.workload.extra_log().items()}
            self.hooks.on_log(record)
        self.divergence.add(done, loss)
        return asked

    def agree(self, loss: Tensor, asked: bool = False) -> tuple[float, bool]:
        """Synchronise the workers; return their mean loss and whether one asks for a checkpoint.

        Rank 0 broadcasts how many steps take `checkpoint_seconds` at its current speed, so that all save
        at the same step without communicating at each one. Slow checkpoints are made less often.
        """
        self.bad_steps.settle()  # waits for the device, so that its speed is measured
        seconds = max(self.settings.checkpoint_seconds, self.save_seconds / SAVING_SHARE)
        steps = self.meter.steps_in(seconds) if self.worker.rank == 0 else 0
        mean, asked, self.steps_between_saves = _over_workers(loss, asked, steps, self.worker.world_size)
        return mean, asked

    def is_save_due(self, done: int) -> bool:
        """Return whether a checkpoint is due by time; the same on all workers."""
        return done - self.saved_at >= self.steps_between_saves

    def watch(self, done: int) -> None:
        """Pass the EMA weights to `on_watch`."""
        with self.meter.paused():
            averages = gather(self.ema.tensors, self.worker.rank == 0)
            if self.worker.rank == 0:
                self.hooks.on_watch(done, averages)

    def save(self, done: int) -> None:
        """Pass a checkpoint to `on_checkpoint`."""
        self.bad_steps.settle()
        started = time.perf_counter()
        with self.meter.paused():
            meta: CheckpointMeta = {
                "step": done,
                "skipped_steps": self.bad_steps.skipped,
                "bad_in_a_row": self.bad_steps.in_a_row,
                "losses": self.divergence.state(),
            }
            tensors = pack(self.core, self.ema, self.optimizer, keep=self.worker.rank == 0)
            self.hooks.on_checkpoint(done, tensors if self.worker.rank == 0 else None, meta)
        self.saved_at, self.save_seconds = done, time.perf_counter() - started


def _update_weights(optimizer: torch.optim.AdamW, learning_rate: float, grad_clip: float | None) -> Tensor:
    """Take one step unless the gradient norm is not finite; return the norm before clipping."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    grads = [p.grad for p in parameters if p.grad is not None]
    grad_norm = whole(torch.nn.utils.get_total_norm(grads))
    if grad_clip is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, grad_clip, grad_norm)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["scale"]
    # Fused AdamW reads this flag on the device (it exists for loss scaling). Where it is 1, weights, moments
    # and step counts are unchanged, and the host need not wait for the result.
    vars(optimizer)["found_inf"] = (~grad_norm.isfinite()).float()
    optimizer.step()
    optimizer.zero_grad()
    return grad_norm


def _over_workers(loss: Tensor, asked: bool, number: int, world_size: int) -> tuple[float, bool, int]:
    """Return the mean loss over workers, whether any asked, and the sum of their numbers."""
    values = torch.stack([loss, torch.full_like(loss, asked), torch.full_like(loss, number)])
    if world_size > 1:
        torch.distributed.all_reduce(values)
    total, asking, numbers = values.tolist()
    return total / world_size, asking > 0, int(numbers)


MOST_STEPS = 1 << 24  # float32 represents integers exactly up to it


class Meter:
    """Measures training speed since the last reading."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size, self.speed = batch_size, math.inf
        self._restart()

    def _restart(self) -> None:
        self.start, self.steps, self.waited = time.perf_counter(), 0, 0.0

    def add(self, waited: float) -> None:
        """Count a step that waited `waited` seconds for its data."""
        self.steps += 1
        self.waited += waited

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time of the block, for example writing a checkpoint."""
        begin = time.perf_counter()
        yield
        self.start += time.perf_counter() - begin

    def steps_in(self, seconds: float) -> int:
        """Return how many steps fit into `seconds` at the latest speed, at least 1."""
        if self.steps:  # else keep the last speed
            self.speed = self.steps / max(time.perf_counter() - self.start, 1e-9)
        return max(1, int(min(MOST_STEPS, seconds * self.speed)))

    def read(self, device: torch.device) -> dict[str, float]:
        """Return `images_per_s`, `data_wait` (share of the time, 0..1) and peak `memory` in bytes."""
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
