"""What the training stages share: Ray Train around the plain loop, and checkpoints that are ours.

The published checkpoints in the artifact's folder are the only truth: whoever starts the training (a
restarted worker, the same command again) looks there. Ray's report carries metrics and restarts.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

from dpt_ray.cluster import session as cluster
from dpt_ray.cluster.initial import continue_shorter
from dpt_ray.cluster.preemption import Notices
from dpt_ray.config.sections import Optimisation
from dpt_ray.engine.execute import StageError
from dpt_ray.engine.node import Task
from dpt_ray.engine.progress import POLL, REMOTE_POLL, Reached, following, silent
from dpt_ray.store.checkpoints import (
    check_room,
    checkpoint_names,
    load_checkpoint,
    remove_copies,
    save_checkpoint,
)
from dpt_ray.training.log import TrainingLog, ray_gauges, read_log

STOPPED = "stopped.json"  # why a training cannot go on, however often it is started
ROLLBACK = "rollback.json"  # that the one rollback has been spent, and on which step


@dataclass(frozen=True)
class Worker:
    """Where a training function runs."""

    rank: int
    world_size: int
    device: str
    in_ray_train: bool = False


# (task, worker) -> the trained model's files are written by rank 0
TrainFunction = Callable[[Task, Worker], None]


def run(task: Task, function: TrainFunction) -> dict[str, Any]:
    """Runs `function` on the configured number of workers; returns startup and memory facts.

    Raises StageError, one line, for what no restart can mend: a loss that stays not finite or far too
    high, a GPU whose memory is too small, a checkpoint of another model. Raises ConfigError for more
    workers than the cluster has room for.
    """
    started, steps = time.time(), int(task.settings["steps"])
    if task.out.exists(STOPPED):  # of an earlier attempt
        task.out.fs.rm_file(task.out.path(STOPPED))
    continued = continue_shorter(task)

    def reached() -> Reached:
        records = read_log(task.out)
        return Reached(int(records[-1]["step"]), records[-1]["loss"]) if records else Reached(0)

    remote = replace(task, progress=silent)  # the display stays in the driver
    every = POLL if task.out.is_local else REMOTE_POLL
    try:
        if task.compute.train_workers == 0:
            import torch

            torch.set_num_threads(task.compute.threads)
            device = "cuda" if torch.cuda.is_available() else "cpu"
            with following(task.progress, steps, "steps", reached, every):
                _guarded(remote, Worker(0, 1, device), function)
        else:
            cluster.connect(task.compute)
            cluster.check_training(task.compute)
            with following(task.progress, steps, "steps", reached, every):
                _fit(remote, function)
    finally:
        if task.out.exists(STOPPED):
            raise StageError(task.out.read_json(STOPPED)["reason"])
    records = read_log(task.out)
    facts = task.out.read_json("started.json")
    return {
        "startup_seconds": round(facts["time"] - started, 3),
        "peak_memory_bytes": max(int(record["memory"]) for record in records),
        # A last step may have been a bad one, which has changed no weight.
        "loss": next((r["loss"] for r in reversed(records) if math.isfinite(r["loss"])), None),
        **continued,
        **{key: facts[key] for key in ("matmul_flops_per_s",) if key in facts},
    }


def _guarded(task: Task, worker: Worker, function: TrainFunction) -> None:
    """`function`, whose errors that every attempt would meet again are written down, not retried."""
    import torch

    from dpt_ray.training.guards import UnstableTraining

    if task.out.exists(STOPPED):  # another worker's reason made Ray start all of them again
        return
    try:
        function(task, worker)
    except UnstableTraining as error:  # on all workers at the same step: none waits for another
        task.out.write_json(STOPPED, {"reason": str(error)})
    except torch.cuda.OutOfMemoryError as error:
        said = str(error).splitlines()[0][:200]
        reason = f"the GPU's memory is too small for this training ({said}); {_SMALLER[task.node.name]}"
        task.out.write_json(STOPPED, {"reason": reason})
        raise  # the other workers wait for this one
    except ValueError as error:
        task.out.write_json(STOPPED, {"reason": " ".join(str(error).split())})
        raise


# What needs less memory, by the trained node.
_SMALLER = {
    "denoiser": "set compute.gradient_accumulation (the same batch in parts), "
    "compute.gradient_checkpointing=true, compute.fsdp=true (with several training workers) or a smaller "
    "diffusion.batch_size",
    "encoder": "set a smaller pretrain.batch_size",
    "referee": "set a smaller evaluate.referee.batch_size",
}


def _fit(task: Task, function: TrainFunction) -> None:
    """`function` under Ray Train, which is started again where it gives up after some progress.

    Ray counts the failures of a whole training; among machines that come and go only those in a row
    without a new checkpoint say that something is wrong.
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


def _attempt(task: Task, function: TrainFunction) -> None:
    """`function` under TorchTrainer. Its runs folder is scratch: Ray keeps its own state there."""
    import tempfile

    import ray.train
    from ray.train.torch import TorchTrainer

    compute = task.compute
    gpu = compute.train_gpus
    most, least = compute.train_workers, compute.min_train_workers

    def loop() -> None:
        import torch

        torch.set_num_threads(compute.threads)
        context = ray.train.get_context()
        device = "cuda" if gpu else "cpu"
        worker = Worker(context.get_world_rank(), context.get_world_size(), device, in_ray_train=True)
        _guarded(task, worker, function)
        ray.train.report({"done": True})

    class Trainer(TorchTrainer):
        def _register_sigint_handler(self, controller: Any) -> None:
            """Leaves Ctrl-C to `dpt`: Ray's handler says nothing, and stays after the training."""

    with tempfile.TemporaryDirectory(prefix="dpt_ray-train-") as scratch:
        Trainer(
            loop,
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
    task: Task,
    worker: Worker,
    model: Any,
    step_fn: Any,
    load_batch: Any,
    n_rows: int,
    *,
    flops_per_image: float | None = None,
    gradient_accumulation: int = 1,
    unit: int | None = None,
    watch_every: int | None = None,
    on_watch: Any = None,
    blocks: Sequence[Any] = (),
    order: Any = None,
) -> dict[str, Any] | None:
    """Trains on this worker, from the newest published checkpoint on; the EMA weights by name.

    `unit` neighbouring positions of the batch (8) stay on one worker. Where there are fewer workers than
    `compute.train_workers`, each accumulates more parts, so that none needs more memory for it.
    `flops_per_image`, of a whole training step, makes the log tell the MFU: the share of the device's
    measured matmul peak that these are. `on_watch(step, ema)` is called on rank 0 every `watch_every`
    steps; the numbers it returns go into the log's record of that step. `blocks` are the parts of the
    model that are compiled, and gathered from shards, one by one.
    """
    from dpt_ray.training.guards import UnstableTraining
    from dpt_ray.training.loop import TrainSettings, train
    from dpt_ray.training.random import GROUP

    values = {key: task.settings[key] for key in Optimisation.model_fields}
    settings = TrainSettings(**{**values, "betas": tuple(values["betas"])})
    if worker.rank == 0:
        check_room(task.out, model)
    peak = _announce(task, worker, settings.precision, bool(flops_per_image)) if worker.rank == 0 else 0.0
    if task.compute.compile:
        for part in blocks or [model]:  # equal blocks are compiled once
            part.compile()  # in place: the names of the weights stay
    distributed = _distributed(model, blocks, worker, task.compute.fsdp)
    # Looked up before the first step, which no worker takes alone: all of them see the same.
    rollbacks_left = 0 if task.out.exists(ROLLBACK) else 1
    resume = load_checkpoint(task.out)
    gauges = ray_gauges(task.node.name) if worker.in_ray_train and worker.rank == 0 else {}
    log = TrainingLog(task.out, resume[1]["step"] if resume else 0, gauges)
    notices = Notices(worker.rank)
    parts = -(-gradient_accumulation * max(1, task.compute.train_workers) // worker.world_size)
    unit = unit or GROUP
    parts = max(1, min(parts, settings.batch_size // unit // worker.world_size))

    def on_log(record: dict[str, float]) -> None:
        record |= {"workers": worker.world_size}
        if flops_per_image:
            record |= {"mfu": record["images_per_s"] * flops_per_image / (peak * worker.world_size)}
        log.add(record)

    def on_checkpoint(step: int, tensors: dict[str, Any] | None, meta: dict[str, Any]) -> None:
        if tensors is not None:
            log.flush()
            # One amid bad steps would be none to go back to.
            if not meta["bad_in_a_row"] and not meta["losses"]["high"]:
                save_checkpoint(task.out, step, tensors, meta)
        remove_copies(task.out)  # a step has been made since, so no worker is still loading them
        notices.saved()
        if worker.in_ray_train:
            import ray.train

            ray.train.report({"step": step, **log.last})  # all workers wait here for each other

    def watch(step: int, ema: Any) -> None:
        log.amend(on_watch(step, ema))

    with closing(log):
        while True:
            try:
                result = train(
                    distributed,
                    step_fn,
                    load_batch,
                    settings,
                    n_rows,
                    rank=worker.rank,
                    world_size=worker.world_size,
                    device=worker.device,
                    resume=resume,
                    on_log=on_log,
                    on_checkpoint=on_checkpoint,
                    gradient_accumulation=parts,
                    unit=unit,
                    save_asked=notices if worker.in_ray_train else lambda: False,
                    watch_every=watch_every,
                    on_watch=watch,
                    order=order,
                )
                remove_copies(task.out)
                return result.ema if worker.rank == 0 else None
            except UnstableTraining as error:
                resume = load_checkpoint(task.out)
                if resume is None or not rollbacks_left:
                    tried = "after a rollback" if resume else "before the first checkpoint"
                    raise type(error)(error.step, error.what, f", {tried}") from error
                rollbacks_left -= 1
                if worker.rank == 0:
                    step = resume[1]["step"]
                    task.out.write_json(ROLLBACK, {"from": error.step, "to": step})
                    log.cut(step, {"rolled_back_from": error.step})


def _distributed(model: Any, blocks: Sequence[Any], worker: Worker, fsdp: bool) -> Any:
    """The model on this worker's device and, with several workers, as a replica or in shards."""
    from torch.nn.parallel import DistributedDataParallel

    from dpt_ray.training.sharding import shard

    if fsdp and worker.world_size > 1:
        shard(model, blocks, worker.device)
        return model
    model = model.to(worker.device)
    return DistributedDataParallel(model) if worker.world_size > 1 else model


def _announce(task: Task, worker: Worker, precision: str, counted: bool) -> float:
    """Publishes when the training starts and, where its FLOPs are counted, the peak; returns that."""
    import torch

    from dpt_ray.training.throughput import matmul_peak

    started: dict[str, Any] = {"time": time.time()}
    peak = matmul_peak(worker.device, getattr(torch, precision)) if counted else 0.0
    task.out.write_json("started.json", started | ({"matmul_flops_per_s": peak} if counted else {}))
    return peak
