"""What the training stages share: Ray Train around the plain loop, and checkpoints that are ours.

The published checkpoints in the artifact's folder are the only truth: whoever starts the training (a
restarted worker, the same command again) looks there. Ray's report carries metrics and restarts.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dpt_ray.artifacts import Artifact
from dpt_ray.config import Optimisation
from dpt_ray.stages import cluster
from dpt_ray.stages.display import following
from dpt_ray.stages.node import Task

CHECKPOINTS = "checkpoints"
LOG = "log.jsonl"
KEPT = 2


@dataclass(frozen=True)
class Worker:
    """Where a training function runs."""

    rank: int
    world_size: int
    device: str


# (task, worker) -> the trained model's files are written by rank 0
TrainFunction = Callable[[Task, Worker], None]


def run(task: Task, function: TrainFunction) -> dict[str, Any]:
    """Runs `function` on the configured number of workers; returns startup and memory facts."""
    started, steps = time.time(), int(task.settings["steps"])

    def reached() -> int:
        records = read_log(task.out)
        return int(records[-1]["step"]) if records else 0

    remote = replace(task, progress=_silent)  # the display stays in the driver
    if task.compute.train_workers == 0:
        import torch

        torch.set_num_threads(task.compute.threads)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        with following(task.progress, steps, reached):
            function(remote, Worker(0, 1, device))
    else:
        cluster.connect(task.compute)
        with following(task.progress, steps, reached):
            _fit(remote, function)
    records = read_log(task.out)
    facts = task.out.read_json("started.json")
    return {
        "startup_seconds": round(facts["time"] - started, 3),
        "peak_memory_bytes": max(int(record["memory"]) for record in records),
        "loss": records[-1]["loss"],
    }


def _silent(done: int, total: int) -> None:
    """Progress that nobody sees."""


def _fit(task: Task, function: TrainFunction) -> None:
    """`function` under TorchTrainer. Its runs folder is scratch: Ray keeps its own state there."""
    import tempfile

    import ray.train
    from ray.train.torch import TorchTrainer

    compute = task.compute
    gpu = compute.train_gpus

    def loop() -> None:
        import torch

        torch.set_num_threads(compute.threads)
        context = ray.train.get_context()
        device = "cuda" if gpu else "cpu"
        function(task, Worker(context.get_world_rank(), context.get_world_size(), device))
        ray.train.report({"done": True})

    with tempfile.TemporaryDirectory(prefix="dpt_ray-train-") as scratch:
        TorchTrainer(
            loop,
            scaling_config=ray.train.ScalingConfig(num_workers=compute.train_workers, use_gpu=gpu),
            run_config=ray.train.RunConfig(
                name=task.node.digest,
                storage_path=scratch,
                failure_config=ray.train.FailureConfig(max_failures=compute.max_failures),
            ),
        ).fit()


def read_log(out: Artifact) -> list[dict[str, float]]:
    """The logged records of a training, by step."""
    if not out.exists(LOG):
        return []
    return [json.loads(line) for line in out.read_bytes(LOG).decode().splitlines()]


def fit(
    task: Task,
    worker: Worker,
    model: Any,
    step_fn: Any,
    load_batch: Any,
    n_rows: int,
) -> dict[str, Any] | None:
    """Trains on this worker, from the newest published checkpoint on; the EMA weights by name."""
    import torch
    from torch.nn.parallel import DistributedDataParallel

    from dpt_ray.training.loop import TrainSettings, train

    values = {key: task.settings[key] for key in Optimisation.model_fields}
    settings = TrainSettings(**{**values, "betas": tuple(values["betas"])})
    if worker.rank == 0:
        task.out.write_json("started.json", {"time": time.time()})
    resume = load_checkpoint(task.out)
    log = _Log(task.out, resume[1]["step"] if resume else 0)
    model = model.to(worker.device)
    wrapped = DistributedDataParallel(model) if worker.world_size > 1 else model

    def on_checkpoint(step: int, tensors: dict[str, Any] | None, meta: dict[str, Any]) -> None:
        if tensors is not None:
            log.flush()
            save_checkpoint(task.out, step, tensors, meta)
        if worker.world_size > 1:
            torch.distributed.barrier()

    result = train(
        wrapped,
        step_fn,
        load_batch,
        settings,
        n_rows,
        rank=worker.rank,
        world_size=worker.world_size,
        device=worker.device,
        resume=resume,
        on_log=log.add,
        on_checkpoint=on_checkpoint,
    )
    return result.ema if worker.rank == 0 else None


class _Log:
    """The training log, rewritten whole: lines after the step that is resumed from are cut."""

    EVERY = 1.0  # seconds between writes

    def __init__(self, out: Artifact, step: int) -> None:
        self._out, self._written = out, 0.0
        self._records = [record for record in read_log(out) if record["step"] <= step]

    def add(self, record: dict[str, float]) -> None:
        self._records.append(record)
        if time.monotonic() - self._written > self.EVERY:
            self.flush()

    def flush(self) -> None:
        lines = "".join(json.dumps(record) + "\n" for record in self._records)
        self._out.write_bytes(LOG, lines.encode())
        self._written = time.monotonic()


def save_checkpoint(out: Artifact, step: int, tensors: dict[str, Any], meta: dict[str, Any]) -> None:
    """Publishes a checkpoint (tensors first, then its JSON) and removes all but the newest two."""
    from safetensors.torch import save_file

    name = f"{CHECKPOINTS}/{step:09d}"
    with out.writing(f"{name}.safetensors") as path:
        save_file(tensors, path)
    out.write_json(f"{name}.json", meta)
    for old in _checkpoints(out)[:-KEPT]:
        out.fs.rm_file(out.path(f"{CHECKPOINTS}/{old}.json"))
        out.fs.rm_file(out.path(f"{CHECKPOINTS}/{old}.safetensors"))


def load_checkpoint(out: Artifact) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """The newest complete checkpoint, if there is one."""
    from safetensors.torch import load_file

    names = _checkpoints(out)
    if not names:
        return None
    name = f"{CHECKPOINTS}/{names[-1]}"
    return load_file(out.local_file(f"{name}.safetensors")), out.read_json(f"{name}.json")


def _checkpoints(out: Artifact) -> list[str]:
    if not out.exists(CHECKPOINTS):
        return []
    files = out.fs.ls(out.path(CHECKPOINTS), detail=False)
    return sorted(Path(file).stem for file in files if file.endswith(".json"))
