"""The loops of train_step.py: the same U-ViT on the same moments, bare, ours, through Ray and as published.

Each takes (options, folder of `write_latents`) and returns `images_per_s`, the median of readings every few
steps, peak `memory` in bytes, and where known `data_wait` and `startup` in seconds. Only `through_ray`
needs Ray and pyarrow.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
from processes import CommunicationHook, Facts, replica, world

ROOT = Path(__file__).parents[1]
ROWS, SHARDS, CLASSES = 2048, 8, 10
SHAPE = (2, 8, 32, 32)  # both flips; mean and log-variance of latents of 4 x 32 x 32
SCALE, DROPOUT, DECAY = 0.18215, 0.15, 0.9999
EVERY = 10  # steps of one reading of the speed
SETTLED = 2  # readings left out at the start
FORWARD = "forward and loss"  # its name in a profile


class Options(argparse.Namespace):
    """The arguments of a script, and what only some of them set."""

    every = EVERY
    hook: CommunicationHook | None = None  # averages gradients in DDP's place

    @staticmethod
    def each() -> None:
        """Be called after each step."""


def labels_of(rows: np.ndarray) -> np.ndarray:
    return rows % CLASSES


def write_latents(folder: Path) -> None:
    """Random moments as one array and as a file each."""
    values = np.random.default_rng(0).standard_normal((ROWS, *SHAPE), np.float32).astype(np.float16)
    np.save(folder / "moments.npy", values)
    (folder / "latents").mkdir()
    for row, value in enumerate(values):
        np.save(folder / "latents" / f"{row}.npy", value)


def network(options: Options) -> Any:
    """The network's configuration: that of a preset's name, or of `dim` and `depth`."""
    from dpt_ray.models.uvit import PRESETS, UViTConfig

    if options.preset:
        return PRESETS[options.preset]
    return UViTConfig(32, 2, 4, options.dim, options.depth, max(1, options.dim // 64), num_classes=CLASSES)


def build(options: Options) -> Any:
    import torch

    from dpt_ray.models.uvit import UViT

    torch.manual_seed(0)
    if options.device == "cpu":
        torch.set_num_threads(1)
    model = UViT(network(options)).to(options.device)
    model.gradient_checkpointing = options.checkpointing
    if options.compile:
        model.compile()
    return model


def plain_loss(model: Any, moments: Any, labels: Any, options: Options) -> Any:
    """The loss of learners/denoise.py with torch's own random numbers."""
    import torch

    from dpt_ray.diffusion.loss import latents_from_moments, training_loss
    from dpt_ray.diffusion.schedules import SCHEDULES

    n, device, schedule = len(moments), moments.device, SCHEDULES["vp"]
    with torch.autocast(device.type, torch.bfloat16, enabled=options.precision == "bfloat16"):
        flipped = torch.randint(2, (n,), device=device)
        moments = moments.float()[torch.arange(n, device=device), flipped]
        encoding, noise = torch.randn(2, n, 4, 32, 32, device=device)
        latents = latents_from_moments(moments, encoding, SCALE)
        dropped = torch.rand(n, device=device) < DROPOUT
        labels = torch.where(dropped, network(options).num_classes, labels)
        t = schedule.training_times(torch.rand(n, device=device))
        return training_loss(model, latents, labels, t, noise, schedule, "noise").mean()


# The loops ---------------------------------------------------------------------------------------


def bare(options: Options, folder: Path) -> Facts:
    """Data in memory, fused AdamW, foreach EMA; as one of several workers with DDP, on a batch of its own."""
    import torch
    from torch.profiler import record_function

    model = replica(build(options), options.hook)
    moments = torch.from_numpy(np.load(folder / "moments.npy")).to(options.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4, fused=True)
    weights = [p.detach() for p in model.parameters()]
    averages = [p.clone() for p in weights]

    def steps() -> Iterator[Any]:
        while True:
            rows = torch.randint(ROWS, (options.batch,), device=options.device)
            with record_function(FORWARD):
                loss = plain_loss(model, moments[rows], rows % CLASSES, options)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            torch._foreach_lerp_(averages, weights, 1 - DECAY)
            yield loss

    return timed(steps(), options)


class LatentFiles:
    """A data set of one file for each latent, as the published code reads it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "latents"

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, row: int) -> tuple[np.ndarray, int]:
        return np.load(self.folder / f"{row}.npy"), row % CLASSES


def published(options: Options, folder: Path) -> Facts:
    import torch
    from torch.utils.data import DataLoader

    model = build(Options(**{**vars(options), "checkpointing": True}))
    workers = 1 if options.device == "cpu" else 8
    loader = DataLoader(
        LatentFiles(folder),  # type: ignore[arg-type]
        options.batch,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        pin_memory=options.device != "cpu",
        persistent_workers=True,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4)
    averages = {name: p.detach().clone() for name, p in model.named_parameters()}

    def steps() -> Iterator[Any]:
        while True:
            for moments, labels in loader:
                optimizer.zero_grad()
                moments, labels = moments.to(options.device), labels.to(options.device)
                loss = plain_loss(model, moments, labels, options)
                loss.backward()
                optimizer.step()
                for name, p in model.named_parameters():
                    averages[name].mul_(DECAY).add_(p.detach(), alpha=1 - DECAY)
                loss.item()
                yield loss

    return timed(steps(), options)


def timed(steps: Iterator[Any], options: Options) -> Facts:
    """Runs the steps and reads their speed every `options.every`."""
    import torch

    readings, since = [], time.perf_counter()
    for step in range(1, options.steps + 1):
        loss = next(steps)
        options.each()
        if step % options.every == 0:
            loss.item()
            now = time.perf_counter()
            readings.append(options.every * options.batch / (now - since))
            since = now
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    memory = torch.cuda.max_memory_allocated() if options.device == "cuda" else peak
    return {"images_per_s": median(readings[SETTLED:]), "memory": memory}


def ours(options: Options, folder: Path) -> Facts:
    """`training.loop` on `options.batch` images of each worker; rank 0 alone knows the speed, of all."""
    import torch
    from torch.profiler import record_function

    from dpt_ray.diffusion.schedules import SCHEDULES
    from dpt_ray.learners.denoise import denoise_step
    from dpt_ray.training.loop import TrainSettings, train
    from dpt_ray.training.random import StepRandom
    from dpt_ray.training.workload import Hooks, Worker, Workload

    moments, (rank, size) = np.load(folder / "moments.npy", mmap_mode="r"), world()
    records: list[Facts] = []

    def load_batch(rows: np.ndarray, step: int) -> dict[str, Any]:
        return {"moments": torch.from_numpy(moments[rows]), "label": torch.from_numpy(labels_of(rows))}

    denoise = denoise_step(SCHEDULES["vp"], "noise", SCALE, network(options).num_classes, DROPOUT)

    def step_fn(model: Any, batch: dict[str, Any], random: StepRandom) -> Any:
        with record_function(FORWARD):
            return denoise(model, batch, random)

    settings = TrainSettings(
        options.steps,
        options.batch * size,
        2e-4,
        ema_decay=DECAY,
        precision=options.precision,
        log_every=EVERY,
        checkpoint_every=options.steps,
    )
    model, worker = replica(build(options), options.hook), Worker(rank, size, options.device)
    workload = Workload(model, step_fn, load_batch, ROWS, before_step=lambda step: options.each())
    train(workload, settings, worker, Hooks(on_log=records.append))
    return of_log(records) if records else {}


def of_log(records: list[Facts]) -> Facts:
    settled = records[SETTLED:]
    return {
        "images_per_s": median(record["images_per_s"] for record in settled),
        "data_wait": mean(record["data_wait"] for record in settled),
        "memory": max(record["memory"] for record in records),
    }


def through_ray(options: Options, folder: Path) -> Facts:
    """The stage, on inputs published as a run publishes them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from dpt_ray.config import load_config
    from dpt_ray.data.shards import write_moments
    from dpt_ray.engine.node import Task
    from dpt_ray.pipeline.flow import flow
    from dpt_ray.stages.denoiser import Denoiser
    from dpt_ray.store.artifact import Store
    from dpt_ray.training.log import read_log

    model = network(options)
    config = load_config(
        ROOT / "configs" / "digits.yaml",
        [
            "data.image_size=32",
            "pretrain.contrast_group=8",  # no encoder is trained; any number of workers could share its batch
            f"diffusion.model={{patch_size: 2, dim: {model.dim}, depth: {model.depth}, "
            f"heads: {model.heads}}}",
            *("diffusion.schedule=vp", "diffusion.prediction=noise", f"diffusion.ema_decay={DECAY}"),
            *(f"diffusion.steps={options.steps}", f"diffusion.batch_size={options.batch}"),
            *(f"diffusion.log_every={EVERY}", f"diffusion.checkpoint_every={options.steps}"),
            *(f"compute.train_workers={options.workers}", "compute.cpus=2", "compute.threads=1"),
        ],
    )
    node, store = flow(config)["denoiser"], Store(str(folder / "store"))
    inputs = {key: store.artifact(key, "benchmark") for key in node.inputs}
    if not inputs["moments"].published:
        inputs["index"].write_json("classes.json", [f"class-{k}" for k in range(CLASSES)])
        inputs["index"].publish({"classes": CLASSES})
        inputs["autoencoder"].publish({"latent_shape": [4, 32, 32], "scale": SCALE})
        ids, labels = [str(row) for row in range(ROWS)], labels_of(np.arange(ROWS, dtype=np.int32))
        table = pa.table({"id": ids, "label": labels, "confidence": np.ones(ROWS, np.float32)})
        with inputs["pseudo_labels"].writing("pseudo_labels.parquet") as path:
            pq.write_table(table, path)
        moments, shards = np.load(folder / "moments.npy"), []
        for rows in np.array_split(np.arange(ROWS), SHARDS):

            def write(path: Path, rows: np.ndarray = rows) -> None:
                write_moments(path, [str(row) for row in rows], moments[rows])

            shards.append(inputs["moments"].publish_shard(f"{rows[0]}", ".arrow", len(rows), write))
        inputs["moments"].publish({"shape": list(SHAPE), "shards": shards})
    out = store.artifact("denoiser", f"workers-{time.time_ns()}")
    facts = Denoiser.make(Task(node, node.settings, out, inputs, config.compute, ""))
    return of_log(read_log(out)) | {"startup": facts["startup_seconds"]}


LOOPS: dict[str, Callable[[Options, Path], Facts]] = {
    "bare": bare,
    "ours": ours,
    "ray": through_ray,
    "published": published,
}
