"""What a training is handed: what to train, on which worker, and whom to tell of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from dpt_ray.store.records import CheckpointMeta
from dpt_ray.training.optimizer import ParameterGroup
from dpt_ray.training.order import GROUP, Order
from dpt_ray.training.random import StepRandom

Batch = dict[str, Tensor]
StepFn = Callable[[nn.Module, Batch, StepRandom], Tensor]
LoadBatch = Callable[[np.ndarray, int], Batch]
# The tensors of a training at one step, and the counts that belong to them.
Checkpoint = tuple[Mapping[str, Tensor], CheckpointMeta]


@dataclass(frozen=True)
class Workload:
    """A model, its loss and its data.

    `load_batch(rows, step)` returns this worker's tensors on the CPU, first dimension len(rows); it runs
    in a background thread, one step ahead. `prepare(batch, random)` then changes the batch on the CPU, with
    the random numbers of its positions. It may use torch's global generator, and therefore runs in the
    thread that trains, before the step. With `load_processes` so many processes of each worker do both,
    ahead of the training.

    `step_fn(model, batch, random)` returns the mean loss over exactly the positions random.lo..random.hi.
    `before_step(step)` is called before each step, from 0, on every worker. The rows of a step are
    `order(step)`, by default those of the shuffle of all `n_rows`.

    The batch is shared out in groups of `unit` neighbouring positions (a multiple of 8), as equally as
    possible, and a worker computes its share in `gradient_accumulation` parts; the gradient is that of
    the whole batch in any case. `blocks` are the parts of the model that are compiled, and gathered from
    shards, one by one. With `flops_per_image`, of a whole training step, the log states the MFU.
    `parameter_groups` name the model's parameters without a wrapper; by default all are one group with the
    settings' weight decay. The log also states the numbers of `extra_log()`, which is called on rank 0 at
    each log step: scalars of the last step that are the same on every worker. The averages of the weights
    start after the first `copied_steps` steps, and are the weights until then.
    """

    model: nn.Module
    step_fn: StepFn
    load_batch: LoadBatch
    n_rows: int
    unit: int = GROUP
    gradient_accumulation: int = 1
    order: Order | None = None
    blocks: Sequence[nn.Module] = ()
    flops_per_image: float | None = None
    before_step: Callable[[int], None] = lambda step: None
    parameter_groups: Sequence[ParameterGroup] | None = None
    extra_log: Callable[[], Mapping[str, Tensor]] = dict
    prepare: Callable[[Batch, StepRandom], Batch] = lambda batch, random: batch
    load_processes: int = 0
    copied_steps: int = 0


@dataclass(frozen=True)
class Worker:
    """Where a training function runs."""

    rank: int = 0
    world_size: int = 1
    device: str = "cpu"
    in_ray_train: bool = False


@dataclass(frozen=True)
class Hooks:
    """Whom a training tells what happens; by default nobody.

    `on_log(record)` is called on rank 0 at each log step. `on_checkpoint(step, tensors, meta)` is called
    on every rank, and only rank 0 gets tensors. `save_asked()` is called on every rank at each log step:
    if it returns True on one of them, all save a checkpoint. `on_watch(step, ema)` is called on rank 0
    every `watch_every` steps and may look at the averages. Steps count from 1.
    """

    on_log: Callable[[dict[str, float]], None] = lambda record: None
    on_checkpoint: Callable[[int, dict[str, Tensor] | None, CheckpointMeta], None] = (
        lambda step, tensors, meta: None
    )
    save_asked: Callable[[], bool] = lambda: False
    watch_every: int | None = None
    on_watch: Callable[[int, Mapping[str, Tensor]], None] = lambda step, ema: None
