"""What a result file says of where it was measured, and the photographs that image benchmarks read."""

from __future__ import annotations

import io
import os
import platform
import re
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

WIDTH, HEIGHT, QUALITY = 500, 375, 97  # about ImageNet's usual size and bytes


def machine(*packages: str) -> str:
    """Cores, processor with its matrix units, GPU, Python, versions of packages, and the load."""
    import torch

    info = Path("/proc/cpuinfo").read_text()
    cpu = re.search(r"model name\s*: (.*)", info)
    units = [flag for flag in ("amx_bf16", "avx512_bf16") if f" {flag} " in info]
    parts = [
        f"{len(os.sched_getaffinity(0))} cores of {cpu[1] if cpu else platform.machine()}",
        f"({', '.join(units) or 'no bf16 units'})",
        *([f"and {torch.cuda.get_device_name()}"] if torch.cuda.is_available() else []),
    ]
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    load = f"load average at the end {os.getloadavg()[0]:.1f}"
    return f"{' '.join(parts)}; Python {platform.python_version()}, {versions}; {load}"


def photographs(count: int) -> Iterator[bytes]:
    """JPEGs of the size of ImageNet's, each another part of one of scikit-learn's photographs."""
    random = np.random.default_rng(0)
    sources = [Image.fromarray(image) for image in load_sample_images().images]
    for n in range(count):
        source = sources[n % len(sources)]
        width = random.uniform(0.7, 0.88) * source.width
        height = width * HEIGHT / WIDTH
        left, top = random.uniform(0, source.width - width), random.uniform(0, source.height - height)
        box = (left, top, left + width, top + height)
        buffer = io.BytesIO()
        source.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC, box).save(buffer, "JPEG", quality=QUALITY)
        yield buffer.getvalue()


def write_photographs(folder: Path, count: int, distinct: int) -> int:
    """Writes `count` JPEGs, of which so many are distinct, into a class folder; their mean bytes."""
    folder.mkdir(parents=True)
    files = []
    for n, data in enumerate(photographs(min(count, distinct))):
        files.append(folder / f"{n:06d}.jpg")
        files[-1].write_bytes(data)
    for n in range(len(files), count):
        (folder / f"{n:06d}.jpg").hardlink_to(files[n % len(files)])
    return sum(file.stat().st_size for file in files) // len(files)
