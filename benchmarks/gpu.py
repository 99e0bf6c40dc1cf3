"""All that only a GPU can tell, in one call of less than nine minutes on a bare machine with one GPU.

    python benchmarks/gpu.py [--sections ceilings denoiser ...] [--small]

It needs neither Ray nor the network. Sections: the tests that need CUDA; the ceilings that the rest is held
against; U-ViT-L/2 training at 256; MSN ViT-B/4 features and Stable Diffusion's autoencoder; sampling at the
paper's and at the fast setting; a batch that does not fit into memory; training at 32 pixels. Weights and
images are random, in the published sizes. A section that fails is named, and the others run.
`--small` tries the script itself with networks that a CPU computes in a minute: its numbers mean nothing.
Writes benchmarks/results/gpu_DATE.md and .json, after each section.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from gpu_actors import actors
from gpu_common import (
    CUDA,
    DEVICE,
    ROOT,
    SMALL,
    Row,
    Sizes,
    fresh,
    peak,
    seconds,
    training_options,
    used,
    vae_arguments,
    wait,
)
from machine import machine
from train_loops import LOOPS, Options, network

from dpt_ray.data.crops import Crop

# Sections -----------------------------------------------------------------------------------------


def tests(sizes: Sizes, folder: Path) -> Iterator[Row]:
    """The tests that are skipped without CUDA."""
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "tests/learners/test_linear_probe.py"]
    done = subprocess.run([*command, "-k", "gpu"], cwd=ROOT, capture_output=True, text=True)
    last = done.stdout.strip().splitlines()[-1]
    yield Row("tests", "exit code of the tests that need CUDA", done.returncode, "", note=last)


def ceilings(sizes: Sizes, folder: Path) -> Iterator[Row]:
    """The fastest matrix products, and a copy that reads and writes."""
    from dpt_ray.training.throughput import matmul_peak

    yield Row("ceilings", "bfloat16 matmul", peak() / 1e12, "TFLOP/s")
    yield Row("ceilings", "float32 matmul", matmul_peak(DEVICE, torch.float32) / 1e12, "TFLOP/s")
    source = torch.randn(2**28 if CUDA else 2**22, device=DEVICE)
    target = torch.empty_like(source)
    spent = seconds(lambda: target.copy_(source), 1.0)
    yield Row("ceilings", "copy, read and written", 2 * source.nbytes / spent / 1e12, "TB/s")


def denoiser(sizes: Sizes, folder: Path) -> Iterator[Row]:
    """U-ViT-L/2 training: the training loop over the bare one, compiled and not, and other batches."""
    from dpt_ray.models.uvit import flops

    config = training_options(sizes, folder) | {"preset": sizes.preset}
    step_flops = 3 * flops(network(Options(**config)))
    variants = [
        ("bare", sizes.batch, False, False),
        ("ours", sizes.batch, False, False),
        ("bare", sizes.batch, True, False),
        ("ours", sizes.batch, True, False),
        ("published", sizes.batch, False, True),
        ("ours", 2 * sizes.batch, True, False),
        ("ours", 2 * sizes.batch, True, True),
    ]
    for loop, batch, compiled, checkpointing in variants:
        fresh()
        told = {"batch": batch, "compile": compiled and CUDA, "checkpointing": checkpointing}
        facts = LOOPS[loop](Options(**config, **told), folder)
        kind = ", compiled" if compiled else ""
        kind += ", gradient checkpointing" if checkpointing else ""
        waited = f"data wait {100 * facts['data_wait']:.2f}%" if "data_wait" in facts else ""
        speed = facts["images_per_s"]
        mfu = speed * step_flops / peak()
        yield Row("denoiser", f"{loop}, batch {batch}{kind}", speed, "images/s", mfu, facts["memory"], waited)


def features(sizes: Sizes, folder: Path) -> Iterator[Row]:
    """ViT-B/4 features: as the stage computes them, with variants, and as the public code does."""
    from dpt_ray.models.encoder import IMAGENET_MEAN, IMAGENET_STD, Encoder
    from dpt_ray.models.encoder_spec import EncoderSpec
    from dpt_ray.models.msn import MsnVit
    from dpt_ray.training.throughput import forward_flops

    side, patch, dim, depth, heads = sizes.vit
    torch.manual_seed(0)
    network = MsnVit(side, patch, 3, dim, depth, heads).eval().requires_grad_(False).to(DEVICE)
    spec = EncoderSpec("msn", "vitb4", dim, Crop("eval", side, side), IMAGENET_MEAN, IMAGENET_STD)
    each = forward_flops(network, torch.zeros(1, 3, side, side))
    count = 64 if CUDA else 2
    pixels = torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8, device=DEVICE)

    def row(what: str, precision: Any, batch: int) -> Row:
        fresh()
        encoder = Encoder(network, spec, precision).to(DEVICE)
        part = pixels[:batch]
        with torch.no_grad():
            spent = seconds(lambda: encoder(part))
        speed = batch / spent
        return Row("features", what, speed, "images/s", speed * each / peak(), used())

    for batch in (count, count // 2):
        yield row(f"bfloat16, batch {batch}", "bfloat16" if CUDA else "float32", batch)
    yield row("float32", "float32", count // 4 or 1)
    network.compile()
    yield row(f"bfloat16, compiled, batch {count}", "bfloat16" if CUDA else "float32", count)
    network._compiled_call_impl = None
    for block in network.blocks:
        block.attn.fused_attn = False
    yield row("float32, materialised attention, batch 16 (the public code)", "float32", count // 4 or 1)


def autoencoder(sizes: Sizes, folder: Path) -> Iterator[Row]:
    """Encode and decode with an untrained autoencoder of Stable Diffusion's size."""
    from diffusers import AutoencoderKL

    from dpt_ray.models.autoencoder import KLAutoencoder
    from dpt_ray.training.throughput import forward_flops

    levels, side, batch = len(sizes.vae), sizes.side, 32 if CUDA else 2
    torch.manual_seed(0)
    vae = AutoencoderKL(**vae_arguments(sizes)).to(DEVICE)
    small = side // 2 ** (levels - 1)
    flops = {
        "encode": forward_flops(vae.encoder, torch.zeros(1, 3, side, side)),
        "decode": forward_flops(vae.decoder, torch.zeros(1, 4, small, small)),
    }
    pixels = torch.randint(0, 256, (batch, side, side, 3), dtype=torch.uint8, device=DEVICE)
    latents = torch.randn(batch, 4, small, small, device=DEVICE)
    for compiled in (False, True):
        for precision in ("bfloat16", "float32") if not compiled else ("bfloat16",):
            fresh()
            model = KLAutoencoder(vae, side, precision).to(DEVICE)  # type: ignore[arg-type]
            if compiled and CUDA:
                vae.encoder.compile()
                vae.decoder.compile()
            works = {
                "encode": lambda model=model: model.encode_moments(pixels),
                "decode": lambda model=model: model.decode(latents),
            }
            for what, work in works.items():
                speed = batch / seconds(work)
                kind = f"{what}, {precision}, batch {batch}{', compiled' if compiled else ''}"
                yield Row("autoencoder", kind, speed, "images/s", speed * flops[what] / peak(), used())


def sampling(sizes: Sizes, folder: Path) -> Iterator[Row]:
    """Latents of U-ViT-L/2 at the paper's setting and at the fast one (decoding is in `autoencoder`)."""
    from dpt_ray.diffusion.sampling import Sampling, sample
    from dpt_ray.models.uvit import UViT

    torch.manual_seed(0)
    config = network(Options(preset=sizes.preset, dim=sizes.dim, depth=sizes.depth))
    model = UViT(config).eval().requires_grad_(False).to(DEVICE)
    shape = (config.in_channels, config.image_size, config.image_size)

    def speed(setting: Sampling, batch: int) -> float:
        noise = torch.randn(batch, *shape, device=DEVICE)
        labels = torch.zeros(batch, dtype=torch.long, device=DEVICE)
        started = time.perf_counter()
        sample(model, noise, labels, config.null_class, setting)
        wait()
        return batch / (time.perf_counter() - started)

    few = ("vp", "noise", "dpm_solver_fast", 2)
    paper: tuple[Any, ...] = ("vp", "noise", "dpm_solver_fast", 50, 1.4, None)
    fast: tuple[Any, ...] = ("vp", "noise", "dpm_solver_pp_2m", 25, 1.4, (0.0, 0.5))
    bf16 = "bfloat16" if CUDA else "float32"
    variants = [
        ("the paper's setting: float32, 50 steps", Sampling(*paper, "float32"), 20),
        ("50 steps, bfloat16", Sampling(*paper, bf16), 20),
        ("50 steps, bfloat16", Sampling(*paper, bf16), sizes.samples),
        ("25 steps, guidance on half of them, bfloat16", Sampling(*fast, bf16), sizes.samples),
    ]
    for compiled in (False, True):
        if compiled:
            for block in model.modules():
                if type(block).__name__ == "Block":
                    block.compile()
        for what, setting, batch in variants if not compiled else variants[2:]:
            fresh()
            batch = min(batch, sizes.samples)
            speed(Sampling(*few, 1.4, None, setting.precision), batch)
            if compiled:  # without guidance the batch is half as large: another graph
                speed(Sampling(*few, 1.0, None, setting.precision), batch)
            found = speed(setting, batch)
            name = f"{what}, not decoded, batch {batch}{', compiled' if compiled else ''}"
            yield Row("sampling", name, found, "images/s", memory=used())


def out_of_memory(sizes: Sizes, folder: Path) -> Iterator[Row]:
    """A batch beyond the GPU's memory is halved until it fits, and gives the same values."""
    from dpt_ray.models.batches import Batches

    free = torch.cuda.mem_get_info()[0] if CUDA else 2**24
    items = 64
    # Each item takes a sixteenth of the free memory for a moment: 64 do not fit, 8 do.
    floats = free // 4 // 16

    def compute(start: int, stop: int) -> torch.Tensor:
        block = torch.ones(stop - start, floats, device=DEVICE)
        return (block[:, 0] * torch.arange(start, stop, device=DEVICE)).cpu()

    fresh()
    batches = Batches(items)
    found = batches(compute, items)
    right = bool((found == torch.arange(items)).all())
    yield Row("out_of_memory", "batch of 64 reduced to", batches.size, "items", note=f"right: {right}")


def cifar(sizes: Sizes, folder: Path) -> Iterator[Row]:
    """A U-ViT on images of 32 x 32 x 3 as latents, patch 2: images/s of the training loop."""
    from dpt_ray.models.uvit import flops

    for compiled in (False, True):
        fresh()
        told = {"batch": sizes.small_batch, "compile": compiled and CUDA, "checkpointing": False}
        told |= training_options(sizes, folder)
        facts = LOOPS["ours"](Options(**told), folder)
        speed, wait_share = facts["images_per_s"], f"data wait {100 * facts['data_wait']:.2f}%"
        mfu = 3 * speed * flops(network(Options(**told))) / peak()
        kind = f"U-ViT dim {sizes.dim}, depth {sizes.depth} at 32 x 32, batch {sizes.small_batch}"
        kind += ", compiled" if compiled else ""
        yield Row("cifar", kind, speed, "images/s", mfu, facts["memory"], wait_share)


def profile(sizes: Sizes, folder: Path) -> Iterator[Row]:
    """Where the time of a compiled training step goes: the ten kernels that take most of it."""
    from torch.profiler import ProfilerActivity, schedule
    from torch.profiler import profile as profiler

    fresh()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if CUDA else [])]
    told = training_options(sizes, folder) | {"preset": sizes.preset, "checkpointing": False}
    told |= {"batch": sizes.batch, "compile": CUDA}
    with profiler(activities=activities, schedule=schedule(wait=12, warmup=2, active=5, repeat=1)) as found:
        LOOPS["bare"](Options(**told | {"each": found.step}), folder)
    kernels = [
        (event.self_device_time_total if CUDA else event.self_cpu_time_total, event.key)
        for event in found.key_averages()
    ]
    kernels = [(spent, name) for spent, name in kernels if not name.startswith("ProfilerStep")]
    total = sum(spent for spent, _ in kernels)
    for spent, name in sorted(kernels, reverse=True)[:10]:
        yield Row("profile", name[:100], 100 * spent / total, "% of the step")


SECTIONS = {
    one.__name__: one
    for one in (
        tests,
        ceilings,
        denoiser,
        features,
        autoencoder,
        sampling,
        actors,
        cifar,
        out_of_memory,
        profile,
    )
}


# ---------------------------------------------------------------------------------------------------


def page(rows: list[Row], spent: dict[str, float], failed: dict[str, str]) -> str:
    """The rows as Markdown, with where they were measured."""
    lines = [f"# On a GPU, {datetime.now(UTC):%Y-%m-%d}", "", f"`python benchmarks/gpu.py`. {where()}", ""]
    lines += ["MFU: counted operations over the measured bfloat16 matmul peak.", ""]
    lines += ["| | | | MFU | memory | |", "|---|---|---|---|---|---|"]
    for row in rows:
        mfu = "" if row.mfu is None else f"{100 * row.mfu:.1f}%"
        memory = "" if row.memory is None else f"{row.memory / 1e9:.1f} GB"
        value = f"{row.value:.4g} {row.unit}"
        lines.append(f"| {row.section} | {row.what} | {value} | {mfu} | {memory} | {row.note} |")
    lines += ["", "Seconds: " + ", ".join(f"{name} {took:.0f}" for name, took in spent.items()) + "."]
    lines += [f"\n{name} failed: {error}" for name, error in failed.items()]
    return "\n".join(lines) + "\n"


def where() -> str:
    return machine("torch", "timm")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    if not CUDA and not options.small:
        raise SystemExit("no GPU that torch can use: run it where there is one, or try it with --small")
    sizes, rows = SMALL if options.small else Sizes(), []
    spent: dict[str, float] = {}
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in options.sections:
            started = time.perf_counter()
            try:
                for row in SECTIONS[name](sizes, Path(folder)):
                    rows.append(row)
                    print(json.dumps(asdict(row)), flush=True)
            except Exception as error:
                traceback.print_exc()
                failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
            spent[name] = time.perf_counter() - started
            stem = options.out / f"gpu_{datetime.now(UTC):%Y-%m-%d}"
            stem.with_suffix(".md").write_text(page(rows, spent, failed))
            told = {"machine": where(), "rows": [asdict(row) for row in rows], "seconds": spent}
            stem.with_suffix(".json").write_text(json.dumps({**told, "failed": failed}, indent=1) + "\n")


if __name__ == "__main__":
    main()
