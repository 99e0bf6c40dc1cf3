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
from dpt_ray.training.optimizer import Schedule, adamw, learning_rate
from dpt_ray.training.order import Order, batch_rows
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


@dataclass(frozen=True)
class TrainResult:
    """The averaged weights under the model's state-dict names, and how many steps were skipped.

    The weights are whole and on the CPU; only rank 0 has them.
    """

    ema: dict[str, Tensor]
    skipped_steps: int


class NonFiniteLoss(RuntimeError):  # noqa: N818
    """Too many steps in a row had a loss or gradient that is not finite; `step` is the last one."""

    def __init__(self, step: int, in_a_row: int, when: str = "") -> None:
        super().__init__(
            f"loss or gradient not finite at step {step}, the last of {in_a_row} in a row{when}: "
            "lower learning_rate, set grad_clip, or look for bad values in the data"
        )
        self.step, self.in_a_row = step, in_a_row


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
    `on_watch(step, ema)` may look at the averages on rank 0 every `watch_every` steps. A step counts
    from 1 in all. A step whose loss or gradient is not finite changes no weight.
    Raises NonFiniteLoss after `max_bad_steps` of them in a row.
    """
    parts = world_size * gradient_accumulation
    if settings.batch_size % (parts * GROUP):
        raise ValueError(
            f"batch_size {settings.batch_size} must be a multiple of {parts * GROUP}: {GROUP} x "
            f"{world_size} workers x {gradient_accumulation} accumulated parts"
        )
    device = torch.device(device)
    core = unwrapped(model)
    ema = EMA(core, settings.ema_decay)
    optimizer = adamw(core, settings.learning_rate, settings.weight_decay, settings.betas)
    first, bad_steps = 0, BadSteps(settings.max_bad_steps)
    if resume:
        tensors, meta = resume
        restore(core, ema, optimizer, tensors)
        first = meta["step"]
        bad_steps = BadSteps(settings.max_bad_steps, meta["skipped_steps"], meta["bad_in_a_row"])

    size = settings.batch_size // world_size
    lo = rank * size

    def load(step: int) -> Batch:
        rows = order(step) if order else batch_rows(settings.seed, step, settings.batch_size, n_rows)
        batch = load_batch(rows[lo : lo + size], step)
        return {k: v.pin_memory() if device.type == "cuda" else v for k, v in batch.items()}

    model.train()
    meter = Meter(settings.batch_size)
    with contextlib.closing(prefetch(load, range(first, settings.steps))) as batches:
        for step, (batch, waited) in enumerate(batches, start=first):
            batch = {k: v.to(device, non_blocking=True) for k, v in batch.items()}
            loss = _accumulate_gradients(model, step_fn, batch, settings, step, lo, gradient_accumulation)
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
            if last or done % settings.log_every == 0:
                bad_steps.settle()
                mean_loss = _mean_over_workers(loss, world_size)
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
            if watch_every and done % watch_every == 0:
                with meter.paused():
                    averages = gather(ema.tensors, rank == 0)
                    if rank == 0:
                        on_watch(done, averages)
            if last or done % settings.checkpoint_every == 0:
                bad_steps.settle()
                with meter.paused():
                    meta = {
                        "step": done,
                        "skipped_steps": bad_steps.skipped,
                        "bad_in_a_row": bad_steps.in_a_row,
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
    parts: int,
) -> Tensor:
    """Adds the gradient of this worker's mean loss to the weights' `.grad`; returns that loss."""
    rows, device = next((len(v), v.device) for v in batch.values())
    size = rows // parts
    mean_loss = torch.zeros((), device=device)
    for part in range(parts):
        a, b = part * size, (part + 1) * size
        random = StepRandom(settings.seed, step, lo + a, lo + b, device)
        with averaging(model, now=part == parts - 1):
            with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bfloat16"):
                loss = step_fn(model, {k: v[a:b] for k, v in batch.items()}, random)
            loss = loss.float() / parts
            # A loss that is not finite makes all its gradients NaN, and the average carries them to
            # every worker: all skip the step without asking each other.
            loss.backward(torch.where(loss.isfinite(), 1.0, math.nan))
        mean_loss += loss.detach()
    return mean_loss


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


def _mean_over_workers(loss: Tensor, world_size: int) -> float:
    if world_size > 1:
        torch.distributed.all_reduce(loss)
    return loss.item() / world_size


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


class BadSteps:
    """Counts the skipped steps, each one step late: the host never waits for the running step."""

    def __init__(self, limit: int, skipped: int = 0, in_a_row: int = 0) -> None:
        self.limit, self.skipped, self.in_a_row = limit, skipped, in_a_row
        self._pending: tuple[int, Tensor, torch.cuda.Event | None] | None = None

    def add(self, step: int, bad: Tensor) -> None:
        """Takes the flag of `step` and counts the one before it."""
        flag, ready = bad.to("cpu", non_blocking=True), None
        if bad.is_cuda:
            ready = torch.cuda.Event()
            ready.record()
        self.settle()
        self._pending = step, flag, ready

    def settle(self) -> None:
        """Counts what is pending; raises NonFiniteLoss at `limit` bad steps in a row."""
        if self._pending is None:
            return
        step, flag, ready = self._pending
        self._pending = None
        if ready is not None:
            ready.synchronize()
        bad = bool(flag)
        self.skipped += bad
        self.in_a_row = self.in_a_row + 1 if bad else 0
        if self.in_a_row >= self.limit:
            raise NonFiniteLoss(step, self.in_a_row)


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
