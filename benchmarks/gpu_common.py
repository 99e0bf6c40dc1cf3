"""What the parts of gpu.py share: sizes, rows, and how seconds and memory are measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from train_loops import write_latents

ROOT = Path(__file__).parents[1]
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
Pass = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """A measured number; `mfu` is of the measured bfloat16 matmul peak, `memory` in bytes."""

    section: str
    what: str
    value: float
    unit: str
    mfu: float | None = None
    memory: int | None = None
    note: str = ""


@dataclass(frozen=True)
class Sizes:
    """What is computed: the published sizes, or small ones that only try the script."""

    batch: int = 256
    steps: int = 40
    vit: tuple[int, ...] = (224, 4, 768, 12, 12)
    vae: tuple[int, ...] = (128, 256, 512, 512)
    side: int = 256
    preset: str | None = "uvit_l_256"
    samples: int = 128
    small_batch: int = 512
    dim: int = 512
    depth: int = 12


SMALL = Sizes(8, 40, (32, 8, 64, 2, 1), (32, 32), 64, None, 4, 16, 32, 2)


def peak() -> float:
    from dpt_ray.training.throughput import matmul_peak

    return matmul_peak(DEVICE, torch.bfloat16 if CUDA else torch.float32)


def seconds(work: Pass, least: float = 1.5) -> float:
    """Mean seconds of a call, after two that are not counted; calls for at least so many seconds."""
    for _ in range(2):
        work()
    wait()
    calls, started = 0, time.perf_counter()
    while calls < 3 or time.perf_counter() - started < least:
        work()
        wait()
        calls += 1
    return (time.perf_counter() - started) / calls


def wait() -> None:
    if CUDA:
        torch.cuda.synchronize()


def fresh() -> None:
    torch.compiler.reset()
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def used() -> int | None:
    return torch.cuda.max_memory_allocated() if CUDA else None


def training_options(sizes: Sizes, folder: Path) -> dict[str, Any]:
    """What every training has in common; the moments are written once."""
    if not (folder / "moments.npy").exists():
        write_latents(folder)
    told = {"preset": None, "dim": sizes.dim, "depth": sizes.depth, "device": DEVICE}
    return told | {
        "precision": "bfloat16" if CUDA else "float32",
        "steps": sizes.steps,
        "each": lambda: None,
    }


def vae_arguments(sizes: Sizes) -> dict[str, Any]:
    levels = len(sizes.vae)
    return {
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": sizes.vae,
        "layers_per_block": 2,
        "latent_channels": 4,
        "sample_size": sizes.side,
        "scaling_factor": 0.18215,
    }
