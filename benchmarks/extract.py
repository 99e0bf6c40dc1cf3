"""The extract stage against a bare loop, our model passes against the public code's, and peak memory.

    python benchmarks/extract.py [--parts models pipeline memory] [--threads 2]

models: MSN ViT-B/4 and Stable Diffusion's autoencoder as the stage runs them (fused attention, bfloat16
where the device is faster with it) against one float32 pass with materialised attention, both in batches
of 16; such attention takes 16 GB then (--public-batch 2 needs 2). pipeline: images/s of the stage through
Ray (decoding tasks, one actor with both models) against a bare loop over the same units, models and batches
that decodes as well, start-up apart; the models are smaller ones on a CPU, the same as above on a GPU.
memory: peaks of the driver, of a reading task and of the actor on 2,000 and on 20,000 small images.
Everything is measured in a process of its own; weights are random, in the published formats. Writes
benchmarks/results/extract_DATE.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import machine, write_photographs
from PIL import Image
from rich.console import Console

from dpt_ray.cluster.session import ALLOCATOR
from dpt_ray.config import load_config
from dpt_ray.data.decoded import decode_unit
from dpt_ray.data.units import list_units
from dpt_ray.engine.progress import Display
from dpt_ray.models.autoencoder import KLAutoencoder, load_autoencoder
from dpt_ray.models.encoder import Encoder, load_encoder
from dpt_ray.models.precision import bfloat16_gain
from dpt_ray.pipeline.flow import flow
from dpt_ray.pipeline.network_cost import KL_ENCODE, MSN
from dpt_ray.pipeline.run import run
from dpt_ray.store.artifact import Store
from dpt_ray.training.throughput import matmul_peak

RESULTS = Path(__file__).parent / "results"
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
# (image side, patch, dim, depth, heads) of an MSN ViT, and the channels of an autoencoder's levels.
VITB4, SD_VAE = (224, 4, 768, 12, 12), (128, 256, 512, 512)
VITS16, SMALL_VAE = (224, 16, 384, 12, 6), (32, 32, 64, 64)
TINY_VIT, TINY_VAE = (32, 8, 64, 2, 1), (32, 32)
CONFIG = """
name: extract
output: {folder}/out
data: {{source: folder, uri: {folder}/images, image_size: {size}}}
labels: {{per_class: 1}}
encoder: {{kind: msn, weights: {folder}/msn.pth.tar, precision: {precision}}}
autoencoder: {{kind: kl, weights: {folder}/vae, precision: {precision}}}
diffusion:
  model: {{dim: 64, depth: 2, heads: 1}}
  steps: 1
  batch_size: 8
  learning_rate: 1e-4
generate: {{images_per_class: 1}}
retrain: {{images_per_class: 1}}
compute: {{cpus: {threads}, threads: {threads}, actors: 1, actor_gpus: {gpus}, batch_size: {batch}}}
"""


def fast_precision() -> str:
    """Return bfloat16 on a GPU and on a processor that is faster with it, else float32."""
    return "bfloat16" if CUDA or bfloat16_gain() > 1 else "float32"


def write_weights(folder: Path, vit: tuple[int, ...], channels: tuple[int, ...], size: int) -> None:
    """An MSN checkpoint and a folder of an AutoencoderKL, as they are published, with random weights."""
    from diffusers import AutoencoderKL

    from dpt_ray.models.msn import MsnVit

    torch.manual_seed(0)
    side, patch, dim, depth, heads = vit
    network = MsnVit(side, patch, 3, dim, depth, heads)
    named = {f"module.{name}": value for name, value in network.state_dict().items()}
    torch.save({"target_encoder": named}, folder / "msn.pth.tar")
    levels = len(channels)
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=channels,
        layers_per_block=2,
        latent_channels=4,
        sample_size=size,
    ).save_pretrained(folder / "vae")


def prepare(
    folder: Path, vit: tuple[int, ...], channels: tuple[int, ...], size: int, options: argparse.Namespace
) -> None:
    """Writes the weights and the configuration of a run that extracts with them."""
    write_weights(folder, vit, channels, size)
    fast = "float32" if vit is TINY_VIT else fast_precision()
    values = {"precision": fast, "threads": options.threads, "gpus": int(CUDA), "batch": options.batch}
    (folder / "extract.yaml").write_text(CONFIG.format(folder=folder, size=size, **values))


def make(folder: Path, *targets: str) -> dict[str, Any]:
    """Makes nodes of the run in `folder` with this process as the driver; the manifest of each."""
    config = load_config(folder / "extract.yaml")
    run(config, Display(Console(quiet=True)), targets)
    return {name: flow(config)[name].artifact(Store(config.output)).manifest for name in targets}


def open_models(folder: Path) -> tuple[Encoder, KLAutoencoder]:
    """The imported models of the run in `folder`, on the device, as the stage's actor opens them."""
    config = load_config(folder / "extract.yaml")
    nodes, store = flow(config), Store(config.output)
    encoder = load_encoder(nodes["encoder"].artifact(store).uri, config.encoder.precision)
    autoencoder = load_autoencoder(nodes["autoencoder"].artifact(store).uri, config.autoencoder.precision)
    return encoder.to(DEVICE), autoencoder.to(DEVICE)


# The stage against a bare loop -------------------------------------------------------------------


EDGE = 4  # units at either end that are not counted


def stage(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """What the stage's manifest says of a pass through Ray, and the images/s amid it.

    Units are decoded while the actor starts, and none are any more while it works on the last ones: from
    the publication of one unit in the middle to that of another, as many are decoded as are worked on.
    """
    facts = make(folder, "features", "moments")["features"]
    config = load_config(folder / "extract.yaml")
    features = flow(config)["features"].artifact(Store(config.output))
    shards = features.listed_shards()
    written = sorted(Path(features.path(shard["file"])).stat().st_mtime for shard in shards)
    found = {name: facts[name] for name in facts if name.endswith("peak_memory_bytes")}
    if len(written) > 2 * EDGE + 1:
        middle = written[EDGE:-EDGE]
        rows = facts["rows"] / len(shards) * (len(middle) - 1)  # units are equally large
        found |= {"images_per_s": rows / (middle[-1] - middle[0]), "startup": facts["startup_seconds"]}
    return found


def bare(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The same work without Ray: units read, decoded, and given to both models one after the other."""
    torch.set_num_threads(options.threads)
    encoder, autoencoder = open_models(folder)
    config = load_config(folder / "extract.yaml")
    index = flow(config)["index"].artifact(Store(config.output))
    crops = {"encoder": encoder.crop, "latent": _latent_crop(folder)}
    rows, units = 0, list_units(index)[: options.units // 2]
    _ = decode_unit(index, units[0], crops, "RGB")  # the libraries warm up
    started = time.perf_counter()
    for unit in units:
        ids, pixels, _ = decode_unit(index, unit, crops, "RGB")
        for batch in torch.from_numpy(pixels["encoder"]).split(options.batch):
            encoder(batch.to(DEVICE)).cpu()
        for batch in torch.from_numpy(pixels["latent"]).split(options.batch):
            batch = batch.to(DEVICE)
            torch.stack([autoencoder.encode_moments(batch, flip) for flip in (False, True)], 1).cpu()
        rows += len(ids)
    return {"images_per_s": rows / (time.perf_counter() - started)}


def _latent_crop(folder: Path) -> Any:
    from dpt_ray.data.crops import Crop

    config = load_config(folder / "extract.yaml")
    return Crop(**flow(config)["autoencoder"].artifact(Store(config.output)).manifest["crop"])


def pipeline(folder: Path, options: argparse.Namespace) -> str:
    """The stage's images/s over those of the bare loop, one before it and one after."""
    vit, channels, size = (VITB4, SD_VAE, 256) if CUDA else (VITS16, SMALL_VAE, 128)
    prepare(folder, vit, channels, size, options)
    write_photographs(folder / "images" / "class", options.units * 256, 256)
    make(folder, "index", "encoder", "autoencoder")
    before, ours, after = (apart(what, folder, options) for what in ("bare", "stage", "bare"))
    loop = (before["images_per_s"] + after["images_per_s"]) / 2
    named = "ViT-B/4, Stable Diffusion's autoencoder" if CUDA else "A ViT-S/16, a small autoencoder at 128"
    return f"""## The stage over a bare loop

{named}: features and moments with mirror images in {fast_precision()}, {options.units * 256} JPEGs in \
batches of {options.batch}, decoding included on both sides. The stage's speed is that from its unit \
{EDGE + 1} to its unit {options.units - EDGE} of 256 images; start-up ({ours["startup"]:.1f} s) is apart.

| | images/s |
|---|---|
| bare loop, before and after | {before["images_per_s"]:.2f}, {after["images_per_s"]:.2f} |
| `extract` through Ray | {ours["images_per_s"]:.2f} |
| **ratio** (target 0.95) | **{ours["images_per_s"] / loop:.2f}** |

Peak memory: {_peaks(ours)}.
"""


# Our passes against the public code's ------------------------------------------------------------


def models(folder: Path, options: argparse.Namespace) -> str:
    """Images/s and MFU of both models, ours and as the public code runs them."""
    prepare(folder, VITB4, SD_VAE, 256, options)
    write_photographs(folder / "images" / "class", 2, 2)
    make(folder, "encoder", "autoencoder")
    slow, fast = (apart(who, folder, options) for who in ("public", "ours"))
    lines = []
    for name, flops in (("encoder", MSN["vitb4"][0]), ("autoencoder", KL_ENCODE)):
        found, expected = (np.load(folder / f"{who}_{name}.npy") for who in ("ours", "public"))
        error = np.linalg.norm(found[: len(expected)] - expected) / np.linalg.norm(expected)
        lines.append(
            f"| {name} | {slow[name]:.3g} | {fast[name]:.3g} | **{fast[name] / slow[name]:.1f}** "
            f"| {fast[name] * flops / fast['peak']:.0%} | {error:.1%} |"
        )
    memory = f" Peak memory {fast['memory'] / 1e9:.1f} GB." if CUDA else ""
    return f"""## Ours over a float32 pass with materialised attention

{options.threads} threads; batches of {options.public_batch} and, ours, {fast["batch"]}. MFU: operations \
counted by formula over this device's measured {fast_precision()} matmul peak, {fast["peak"] / 1e12:.2f} \
TFLOP/s. Difference: of our output from the float32 one, in norm, with random weights.{memory}

| | float32, materialised (images/s) | ours (images/s) | ratio | MFU of ours | difference |
|---|---|---|---|---|---|
{chr(10).join(lines)}
"""


def public(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Images/s of the public code's passes."""
    few = 64 if CUDA else 16
    return _speeds(folder, "public", _public, few, options.public_batch, options.threads)


def ours(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Images/s of our passes, and this device's matmul peak."""
    count, batch = (512, 64) if CUDA else (16, 16)
    found = _speeds(folder, "ours", _ours, count, batch, options.threads)
    memory = torch.cuda.max_memory_allocated() if CUDA else 0
    peak = matmul_peak(DEVICE, getattr(torch, fast_precision()))
    return {**found, "batch": batch, "memory": memory, "peak": peak}


def _speeds(
    folder: Path, who: str, opened: Callable[[Path, str], Pass], count: int, batch: int, threads: int
) -> dict[str, Any]:
    torch.set_num_threads(threads)
    found = {}
    for name, side in (("encoder", 224), ("autoencoder", 256)):
        random = torch.Generator().manual_seed(0)
        pixels = torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8, generator=random)
        found[name], outputs = _speed(opened(folder, name), pixels, batch)
        np.save(folder / f"{who}_{name}.npy", outputs.numpy())
    return found


Pass = Callable[[torch.Tensor], torch.Tensor]


def _ours(folder: Path, name: str) -> Pass:
    encoder, autoencoder = open_models(folder)
    return encoder if name == "encoder" else autoencoder.encode_moments


def _public(folder: Path, name: str) -> Pass:
    from diffusers.models.attention_processor import AttnProcessor

    config = load_config(folder / "extract.yaml")
    uri = flow(config)[name].artifact(Store(config.output)).uri
    if name == "encoder":
        encoder = load_encoder(uri).to(DEVICE)
        for block in encoder.network.blocks:
            block.attn.fused_attn = False
        return encoder
    autoencoder = load_autoencoder(uri).to(DEVICE)
    autoencoder.vae.set_attn_processor(AttnProcessor())
    return autoencoder.encode_moments


def _speed(model: Pass, pixels: torch.Tensor, batch: int) -> tuple[float, torch.Tensor]:
    """Images/s, and the outputs, after one image (on a GPU: one batch) that is not counted."""
    with torch.no_grad():
        model(pixels[: batch if CUDA else 1].to(DEVICE)).cpu()
        started = time.perf_counter()
        found = torch.cat([model(part.to(DEVICE)).cpu() for part in pixels.split(batch)])
        return len(pixels) / (time.perf_counter() - started), found


# Peak memory and the number of images ------------------------------------------------------------


def memory(folder: Path, options: argparse.Namespace) -> str:
    """The peaks of the stage's processes on few and on many images."""
    lines = []
    for count in (2_000, 20_000):
        run = folder / str(count)
        images = run / "images" / "class"
        images.mkdir(parents=True)
        prepare(run, TINY_VIT, TINY_VAE, 32, options)
        noise = np.random.default_rng(0).integers(0, 256, (64, 40, 40, 3), np.uint8)
        for n in range(count):
            if n < len(noise):
                Image.fromarray(noise[n]).save(images / f"{n:06d}.png")
            else:
                (images / f"{n:06d}.png").hardlink_to(images / f"{n % len(noise):06d}.png")
        lines.append(f"| {count:,} | {' | '.join(_peaks(apart('stage', run, options)).split(', '))} |")
    return f"""## Peak memory and the number of images

Images of 40 x 40 pixels, tiny models; peak resident memory as the stage's manifest has it.

| images | | | |
|---|---|---|---|
{chr(10).join(lines)}
"""


def _peaks(facts: dict[str, Any]) -> str:
    named = {"driver": "driver_", "reading task": "reader_", "actor": ""}
    return ", ".join(f"{who} {facts[f'{key}peak_memory_bytes'] / 1e6:.0f} MB" for who, key in named.items())


# ------------------------------------------------------------------------------------------------

PARTS = {"models": models, "pipeline": pipeline, "memory": memory}
APART = {"bare": bare, "stage": stage, "public": public, "ours": ours}


def apart(what: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """What a process of its own measures, all but the public code with the actors' allocator."""
    words = [f"--only={what}", f"--folder={folder}"]
    names = ("threads", "batch", "units", "public_batch")
    words += [f"--{name.replace('_', '-')}={getattr(options, name)}" for name in names]
    command = [sys.executable, __file__, *words]
    env = os.environ | ({} if what == "public" else ALLOCATOR)
    return json.loads(subprocess.run(command, env=env, stdout=subprocess.PIPE, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--public-batch", type=int, default=16, help="of the float32 pass")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--units", type=int, default=16, help="of 256 images, of pipeline")
    parser.add_argument("--only", choices=APART, help="one measurement in this process, as JSON")
    parser.add_argument("--folder", type=Path, help="of the run, with --only")
    options = parser.parse_args()
    if options.only:
        sys.stdout.write(json.dumps(APART[options.only](options.folder, options)))
        return
    texts = []
    for part in options.parts:
        with tempfile.TemporaryDirectory() as scratch:
            texts.append(PARTS[part](Path(scratch), options))
    where = machine("torch", "ray", "diffusers", "timm")
    command = f"python benchmarks/extract.py --parts {' '.join(options.parts)} --threads {options.threads}"
    head = f"# The extract stage, {datetime.now(UTC):%Y-%m-%d}\n\n`{command}`\n\nOn {where}.\n"
    text = "\n".join([head, *texts])
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"extract_{datetime.now(UTC):%Y-%m-%d}.md").write_text(text)
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
