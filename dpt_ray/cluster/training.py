"""Training stages: Ray Train around the plain loop, with the project's own checkpoints.

Every start of a training (a restarted worker, the same command again) resumes from the checkpoints in the
artifact's folder and from nothing else. Ray's report carries metrics only.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from dpt_ray.cluster import session as cluster
from dpt_ray.cluster.continuation import continue_shorter
from dpt_ray.cluster.preemption import Notices
from dpt_ray.cluster.ray_internals import trainer
from dpt_ray.cluster.resources import check_training
from dpt_ray.config.sections import Compute, Optimisation
from dpt_ray.engine.errors import StageError
from dpt_ray.engine.node import Task
from dpt_ray.engine.progress import POLL, REMOTE_POLL, Reached, following, silent
from dpt_ray.store.artifact import Artifact
from dpt_ray.store.checkpoints import (
    check_room,
    checkpoint_names,
    load_checkpoint,
    remove_copies,
    save_checkpoint,
)
from dpt_ray.store.records import CheckpointMeta, Facts
from dpt_ray.training.log import TrainingLog, read_log

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dpt_ray.training.loop import TrainSettings
    from dpt_ray.training.workload import Worker, Workload

STOPPED = "stopped.json"  # the reason of a failure that a restart would repeat
SPENT = "spent.json"  # the driver, whose clock counts, tells the workers that the allowance is over
ROLLBACK = "rollback.json"  # the one rollback that a training may make, once it is made
# How long workers wait for each other at most (Ray: half an hour): rank 0 alone samples `preview_every` and
# `frechet_every`. A worker that dies is noticed at once.
WAIT_SECONDS = 6 * 3600


S = TypeVar("S", bound=Optimisation)
# (task, worker) -> None; rank 0 publishes the files of the trained model
TrainFunction = Callable[[Task[S], "Worker"], None]
# (step, averaged weights) -> numbers for the log
OnWatch = Callable[[int, Mapping[str, "Tensor"]], Mapping[str, float]]


def run(task: Task[S], function: TrainFunction[S]) -> Facts:
    """Run `function` on the configured number of workers; return start-up time, memory and loss.

    Raises StageError, one line, for what a restart would repeat: a loss that stays non-finite or far too
    high, a GPU with too little memory, a checkpoint of another model. Raises ConfigError for more workers
    than the cluster has room for.
    """
    started, clock, steps = time.time(), time.monotonic(), int(task.settings.steps)
    _remove(task.out, STOPPED, SPENT)  # of an earlier attempt
    continued = continue_shorter(task)

    def reached() -> Reached:
        if task.allowance.is_over:
            task.out.write_json(SPENT, {})
        records = read_log(task.out)
        return Reached(int(records[-1]["step"]), records[-1]) if records else Reached(0)

    remote = replace(task, progress=silent)  # the display stays in the driver
    every = POLL if task.out.is_local else REMOTE_POLL
    try:
        if task.compute.train_workers == 0:
            import torch

            from dpt_ray.training.workload import Worker

            torch.set_num_threads(cluster.threads(task.compute))
            device = "cuda" if torch.cuda.is_available() else "cpu"
            with following(task.progress, steps, "steps", reached, every):
                _guarded(remote, Worker(0, 1, device), function)
        else:
            cluster.connect(task.compute)
            check_training(task.compute)
            with following(task.progress, steps, "steps", reached, every):
                _fit(remote, function)
    finally:
        if task.out.exists(STOPPED):
            raise StageError(task.out.read_json(STOPPED)["reason"])
    _remove(task.out, SPENT)
    records = read_log(task.out)
    facts = task.out.read_json("started.json")
    found: Facts = {
        "startup_seconds": cluster.startup_seconds(facts["time"] - started, time.monotonic() - clock),
        "peak_memory_bytes": max(int(record["memory"]) for record in records),
        # The last step may have been a bad one, which changed no weight.
        "loss": next((r["loss"] for r in reversed(records) if math.isfinite(r["loss"])), None),
        "threads": facts["threads"],
    }
    if "matmul_flops_per_s" in facts:
        found["matmul_flops_per_s"] = facts["matmul_flops_per_s"]
    return {**found, **continued}


def _remove(out: Artifact, *names: str) -> None:
    for name in names:
        if out.exists(name):
            out.fs.rm_file(out.path(name))


class _AllowanceOver(RuntimeError):  # noqa: N818
    """The run has spent what it may; the checkpoint is saved."""


def _guarded(task: Task[S], worker: Worker, function: TrainFunction[S]) -> None:
    """Call `function`; record the errors that every attempt would repeat, so that Ray does not retry them."""
    import torch

    from dpt_ray.training.guards import UnstableTraining

    if task.out.exists(STOPPED):  # recorded by another worker, whose failure restarted all of them
        return
    try:
        function(task, worker)
    except (UnstableTraining, _AllowanceOver) as error:  # on all workers at the same step, so none waits
        task.out.write_json(STOPPED, {"reason": str(error)})
    except torch.cuda.OutOfMemoryError as error:
        said = str(error).splitlines()[0][:200]
        reason = f"the GPU has too little memory for this training ({said}); {_SMALLER[task.name]}"
        task.out.write_json(STOPPED, {"reason": reason})
        raise  # the other workers wait for this one
    except ValueError as error:
        task.out.write_json(STOPPED, {"reason": " ".join(str(error).split())})
        raise


# How to need less memory, by node.
_SMALLER = {
    "denoiser": "set compute.gradient_accumulation (the same batch in parts), "
    "compute.gradient_checkpointing=true, compute.fsdp=true (with several training workers) or a smaller "
    "diffusion.batch_size",
    "feature_denoiser": "set a smaller feature_diffusion.batch_size",
    "encoder": "set a smaller pretrain.batch_size",
    "referee": "set a smaller evaluate.referee.batch_size",
    "student": "set a smaller student.batch_size",
    "learner": "set a smaller semi_supervised.batch_size or unlabelled_ratio",
    "retrained_learner": "set a smaller semi_supervised.batch_size or unlabelled_ratio",
}


def _fit(task: Task[S], function: TrainFunction[S]) -> None:
    """Run `function` under Ray Train; restart it if it gave up after a new checkpoint.

    Ray counts the failures of a whole training. On preemptible machines only consecutive failures without
    a new checkpoint mean that something is wrong.
    """
    import ray.train

    while True:
        before = checkpoint_names(task.out)
        try:
            _attempt(task, function)
            return
        except ray.train.TrainingFailedError:
            if task.out.exists(STOPPED) or checkpoint_names(task.out) == before:
                raise


def _attempt(task: Task[S], function: TrainFunction[S]) -> None:
    """Run `function` under TorchTrainer once. Ray's own state goes into a temporary folder."""
    import tempfile

    import ray.train
    from ray.train.torch import TorchConfig

    compute = task.compute
    gpu = compute.train_gpus
    most, least = compute.train_workers, compute.min_train_workers

    def loop() -> None:
        import torch

        from dpt_ray.training.workload import Worker

        context = ray.train.get_context()
        torch.set_num_threads(cluster.threads_here(compute, context.get_local_world_size()))
        device = "cuda" if gpu else "cpu"
        worker = Worker(context.get_world_rank(), context.get_world_size(), device, in_ray_train=True)
        _guarded(task, worker, function)
        ray.train.report({"done": True})

    with tempfile.TemporaryDirectory(prefix="dpt_ray-train-") as scratch:
        trainer()(
            loop,
            torch_config=TorchConfig(timeout_s=WAIT_SECONDS),
            scaling_config=ray.train.ScalingConfig(
                num_workers=(least, most) if least else most,
                use_gpu=gpu,
                elastic_resize_monitor_interval_s=compute.resize_seconds,
            ),
            run_config=ray.train.RunConfig(
                name=task.node.digest,
                storage_path=scratch,
                failure_config=ray.train.FailureConfig(max_failures=compute.max_failures),
            ),
        ).fit()


def fit(
    task: Task[Optimisation],
    worker: Worker,
    workload: Workload,
    watch_every: int | None = None,
    on_watch: OnWatch = lambda step, ema: {},
) -> dict[str, Tensor] | None:
    """Train on this worker, from the newest published checkpoint on; return rank 0's EMA weights by name.

    With fewer workers than `compute.train_workers` each accumulates more parts, so that it needs no more
    memory, or twice as much at most where the units do not divide among the workers.
    `on_watch(step, ema)` is called on rank 0 every `watch_every` steps; the numbers it returns are added to
    the log record of that step.
    """
    from dpt_ray.training.guards import UnstableTraining
    from dpt_ray.training.loop import train
    from dpt_ray.training.workload import Hooks

    settings = _train_settings(task)
    peak = _begin(task, worker, workload, settings.precision)
    workload = _prepared(task.compute, worker, workload, settings.batch_size)
    # Read before the first step, at which all workers meet: all of them see the same.
    rollbacks_left = 0 if task.out.exists(ROLLBACK) else 1
    resume = [load_checkpoint(task.out)]  # taken out when used, so that no variable holds its tensors
    with closing(TrainingLog(task.out, resume[0][1]["step"] if resume[0] else 0)) as log:
        reporter = _Reporter(task, worker, log, workload.flops_per_image, peak, on_watch)
        hooks = Hooks(
            reporter.log, reporter.checkpoint, reporter.wants_checkpoint, watch_every, reporter.watch
        )
        while True:
            try:
                result = train(workload, settings, worker, hooks, resume.pop())
                remove_copies(task.out)
                return result.ema if worker.rank == 0 else None
            except UnstableTraining as error:
                found = load_checkpoint(task.out)
                if found is None or not rollbacks_left:
                    tried = "after a rollback" if found else "before the first checkpoint"
                    raise type(error)(error.step, error.what, f", {tried}") from error
                rollbacks_left -= 1
                if worker.rank == 0:
                    reporter.rolled_back(error.step, found[1]["step"])
                resume.append(found)
                del found


def _train_settings(task: Task[Optimisation]) -> TrainSettings:
    from dpt_ray.training.loop import TrainSettings

    return TrainSettings(**{key: getattr(task.settings, key) for key in Optimisation.model_fields})


def _begin(task: Task[Optimisation], worker: Worker, workload: Workload, precision: str) -> float:
    """Check the free disk space and publish the start time; return the matmul peak if MFU is logged."""
    import torch

    from dpt_ray.training.throughput import matmul_peak

    if worker.rank != 0:
        return 0.0
    check_room(task.out, workload.model)
    started = {"time": time.time(), "threads": torch.get_num_threads()}
    if workload.flops_per_image:
        started["matmul_flops_per_s"] = matmul_peak(worker.device, getattr(torch, precision))
    task.out.write_json("started.json", started)
    return started.get("matmul_flops_per_s", 0.0)


def _prepared(compute: Compute, worker: Worker, workload: Workload, batch_size: int) -> Workload:
    """Return the workload compiled, distributed, and with the accumulated parts of each worker."""
    model, unit = workload.model, workload.unit
    if compute.compile:
        for part in workload.blocks or [model]:  # equal blocks are compiled once
            part.compile()  # in place: the weights keep their names
    distributed = _distributed(model, workload.blocks, worker, compute.fsdp)
    asked = workload.gradient_accumulation * max(1, compute.train_workers)
    parts = min(-(-asked // worker.world_size), batch_size // unit // worker.world_size)
    return replace(workload, model=distributed, gradient_accumulation=max(1, parts))


def _distributed(model: nn.Module, blocks: Sequence[nn.Module], worker: Worker, fsdp: bool) -> nn.Module:
    """Return the model on this worker's device; with several workers as a DDP replica or sharded (FSDP2).

    Sharded are networks that name their blocks, whose stage takes the whole averages as they are; the others
    are small, or read their averages back into the model.
    """
    from torch.nn.parallel import DistributedDataParallel

    from dpt_ray.training.sharding import shard

    if fsdp and blocks and worker.world_size > 1:
        shard(model, blocks, worker.device)
        return model
    model = model.to(worker.device)
    return DistributedDataParallel(model) if worker.world_size > 1 else model


class _Reporter:
    """Publish the records and checkpoints of the loop, and report metrics to Ray."""

    def __init__(
        self,
        task: Task[Optimisation],
        worker: Worker,
        log: TrainingLog,
        flops_per_image: float | None,
        peak: float,
        on_watch: OnWatch,
    ) -> None:
        self._task, self._worker, self._log, self._on_watch = task, worker, log, on_watch
        self._mfu = flops_per_image / (peak * worker.world_size) if flops_per_image and peak else None
        self._notices = Notices(worker.rank)

    def wants_checkpoint(self) -> bool:
        """Return whether this node is being taken away, or the run has spent what it may."""
        noticed = self._worker.in_ray_train and self._notices()  # a barrier of all workers
        return noticed or self._is_spent()

    def _is_spent(self) -> bool:
        """Return whether rank 0 was told that the allowance is over; on other ranks False."""
        limited = self._worker.rank == 0 and self._task.allowance.is_limited
        return limited and self._task.out.exists(SPENT)

    def log(self, record: dict[str, float]) -> None:
        """Add a record to the log."""
        record |= {"workers": self._worker.world_size}
        if self._mfu:
            record |= {"mfu": record["images_per_s"] * self._mfu}
        self._log.add(record)

    def checkpoint(self, step: int, tensors: dict[str, Tensor] | None, meta: CheckpointMeta) -> None:
        """Publish the checkpoint, which only rank 0 has; under Ray Train a barrier of all workers."""
        if tensors is not None:
            self._log.flush()
            # A checkpoint amid bad steps would be useless for a rollback.
            if not meta["bad_in_a_row"] and not meta["losses"]["high"]:
                save_checkpoint(self._task.out, step, tensors, meta)
        remove_copies(self._task.out)  # a step has passed, so no worker is still loading them
        self._notices.saved()
        if self._worker.in_ray_train:
            import ray.train

            ray.train.report({"step": step, **self._log.last})
        if step < self._task.settings.steps and self._is_over():
            raise _AllowanceOver(self._task.allowance.error)

    def _is_over(self) -> bool:
        """Return whether the allowance is over: the same on all workers."""
        import torch

        over = torch.tensor(float(self._is_spent()), device=self._worker.device)
        if self._worker.world_size > 1 and self._task.allowance.is_limited:
            torch.distributed.all_reduce(over, torch.distributed.ReduceOp.MAX)
        return bool(over)

    def watch(self, step: int, ema: Mapping[str, Tensor]) -> None:
        """Add the measurements of the averaged weights to the newest record."""
        self._log.amend(self._on_watch(step, ema))

    def rolled_back(self, bad: int, good: int) -> None:
        """Record the rollback from step `bad` to the checkpoint of step `good`."""
        self._task.out.write_json(ROLLBACK, {"from": bad, "to": good})
        self._log.cut(good, {"rolled_back_from": bad})
