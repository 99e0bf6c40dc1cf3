"""The part of gpu.py on the stages' actors: features, moments and samples with all that an actor does."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict as fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_common import CUDA, Row, Sizes, fresh, used, vae_arguments, wait
from train_loops import Options, network

from dpt_ray.data.crops import Crop


def actors(sizes: Sizes, folder: Path) -> Iterator[Row]:
    """The actors of the stages on units of decoded images and of classes, publication included.

    Compiled and not; the difference is that of the compiled outputs from the others, in norm.
    """
    from dpt_ray.stages.extract import Output
    from dpt_ray.store.artifact import Store

    store = Store(str(folder / "store"))
    encoder, autoencoder, denoiser = write_models(sizes, store)
    precision: Any = "bfloat16" if CUDA else "float32"
    kept: dict[str, np.ndarray] = {}
    for compiled in (False, True):
        kind = ", compute.compile" if compiled else ""
        for name, model, is_encoder in (("features", encoder, True), ("moments", autoencoder, False)):
            fresh()
            out = store.artifact(name, str(compiled))
            crop = Crop(**model.manifest["crop"])
            told = (precision, 0.0, True, compiled and CUDA)
            speed, made = extracting(Output(name, out, model.uri, crop, is_encoder, *told), sizes)
            yield Row(
                "actors", f"{name}{kind}", speed, "images/s", memory=used(), note=differs(kept, name, made)
            )
        fresh()
        out = store.artifact("samples", str(compiled))
        speed, made = generating(out, denoiser, autoencoder, compiled and CUDA, sizes)
        what = f"samples, 25 steps, guidance on half of them, decoded{kind}"
        yield Row("actors", what, speed, "images/s", memory=used(), note=differs(kept, "samples", made))


def differs(kept: dict[str, np.ndarray], name: str, made: np.ndarray) -> str:
    first = kept.setdefault(name, made)
    if first is made:
        return ""
    return f"differs by {np.linalg.norm(first - made) / np.linalg.norm(first):.2g}"


def write_models(sizes: Sizes, store: Any) -> list[Any]:
    """Artifacts of untrained networks as runs publish them: encoder, autoencoder, denoiser."""
    from diffusers import AutoencoderKL

    from dpt_ray.models.autoencoder import KLAutoencoder
    from dpt_ray.models.denoiser import save_denoiser
    from dpt_ray.models.encoder import IMAGENET_MEAN, IMAGENET_STD, Encoder, save_encoder
    from dpt_ray.models.encoder_spec import EncoderSpec
    from dpt_ray.models.msn import MsnVit
    from dpt_ray.models.uvit import UViT

    torch.manual_seed(0)
    found = [store.artifact(name, "benchmark") for name in ("encoder", "autoencoder", "denoiser")]
    encoder, autoencoder, denoiser = found
    side, patch, dim, depth, heads = sizes.vit
    spec = EncoderSpec(
        "msn", "vitb4", dim, Crop("eval", side, side), IMAGENET_MEAN, IMAGENET_STD, heads=heads
    )
    vit = MsnVit(side, patch, 3, dim, depth, heads)
    encoder.publish_files(lambda path: save_encoder(path, Encoder(vit, spec)))
    encoder.publish({"crop": fields(spec.crop)})
    vae = AutoencoderKL(**vae_arguments(sizes))
    autoencoder.publish_files(lambda path: KLAutoencoder(vae, sizes.side).save(path))
    autoencoder.publish({"crop": fields(Crop("adm", sizes.side))})
    config = network(Options(preset=sizes.preset, dim=sizes.dim, depth=sizes.depth))
    told: Any = {"schedule": "vp", "prediction": "noise", "latent_scale": 0.18215}
    told |= {"condition": "pseudo_labels", "steps": 1}
    weights = UViT(config).state_dict()
    denoiser.publish_files(lambda path: save_denoiser(path, weights, config, told))
    return found


UNITS = 4  # of which the first half are not counted


def extracting(output: Any, sizes: Sizes) -> tuple[float, np.ndarray]:
    """Images/s of an actor, and what it computes of some images."""
    from dpt_ray.stages.extract import ExtractUnit

    actor = ExtractUnit([output], sizes.batch if output.is_encoder else 64, 16)
    count, side = sizes.batch, output.crop.size
    pixels = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), np.uint8)
    for n in range(UNITS):
        if n == UNITS // 2:
            wait()
            started = time.perf_counter()
        unit: Any = {"shard": f"{n}", "wanted": [output.name], "ids": [f"{n}-{i}" for i in range(count)]}
        actor(unit | {"bad": [], "peak_memory_bytes": 0, repr(output.crop): pixels})
    speed = count * (UNITS - UNITS // 2) / (time.perf_counter() - started)
    return speed, actor._compute(output, pixels[:16])


def generating(out: Any, denoiser: Any, autoencoder: Any, compiled: bool, sizes: Sizes) -> tuple[float, Any]:
    """Images/s of an actor that samples, and some of its images."""
    from dpt_ray.config.sections import SampleSettings
    from dpt_ray.data.class_ranges import class_ranges
    from dpt_ray.stages.samples import GenerateUnit, Sampler

    precision: Any = "bfloat16" if CUDA else "float32"
    settings = SampleSettings(precision=precision, guidance=1.4, guidance_interval=(0.0, 0.5), nfe=25)
    identity = "benchmark"
    told = (denoiser.uri, autoencoder.uri, identity, sizes.samples, 16, settings, compiled)
    actor = GenerateUnit(Sampler(out, *told))
    per_class = max(1, sizes.samples // 8)
    units = class_ranges(2 * per_class, per_class, 10)
    made = 0
    for n, unit in enumerate(units[:2]):
        if n == 1:
            started = time.perf_counter()
        made = actor(unit)["images"]
    return made / (time.perf_counter() - started), actor._sample([(k, 0) for k in range(8)]).astype(
        np.float32
    )
