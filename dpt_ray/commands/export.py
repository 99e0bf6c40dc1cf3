"""export: write a run's generated images or its denoiser for other tools, atomically."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from rich.progress import track

from dpt_ray.commands.best_classifier import best_classifier
from dpt_ray.config import Config, ConfigError
from dpt_ray.data.export import (
    count_samples,
    iterate_samples,
    write_imagefolder,
    write_npz,
    write_webdataset,
)
from dpt_ray.pipeline.output import find_store
from dpt_ray.pipeline.run_folder import sets_made

FORMATS = ("webdataset", "imagefolder", "npz")
MODEL_FORMATS = ("nnet_ema", "safetensors", "classifier", "onnx")
ONNX_FILE = "classifier.onnx"


def export_samples(config: Config, format: str, out: Path) -> int:
    """Write the run's generated images to `out` in one of `FORMATS`; return their number.

    They are the first `generate.images_per_class` of each class, without classes if the denoiser was
    trained without labels. Greyscale images stay greyscale except in npz, which is RGB. Raises ConfigError
    where they are not made yet, `out` exists or cannot be written, or the format is unknown.
    """
    if format not in FORMATS:
        raise ConfigError(f"format: {format!r} is unknown; use one of {', '.join(FORMATS)}")
    if format == "npz" and out.suffix != ".npz":
        raise ConfigError(f"out: {str(out)!r} must end in .npz for format npz")
    made = next((made for made in sets_made(config) if "samples" in made), None)
    if not made:
        raise ConfigError(
            f"the {config.generate.images_per_class} images per class of run {config.name} are not in "
            f"{find_store(config).uri}; run `dpt generate CONFIG` first"
        )
    samples = made["samples"]
    labelled = config.diffusion.condition != "none"
    classes = made["index"].read_json("classes.json") if labelled else []
    images_per_class = config.generate.images_per_class
    count = count_samples(samples, images_per_class)
    console = Console(stderr=True)
    images = track(
        iterate_samples(samples, images_per_class, labelled),
        "export",
        total=count,
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with publishing(out) as part:
        if format == "webdataset":
            write_webdataset(part, images, classes)
        elif format == "imagefolder":
            write_imagefolder(part, images, classes)
        else:
            write_npz(part, images, count)
    return count


def export_model(config: Config, format: str, out: Path, method: str | None = None) -> int:
    """Write the run's denoiser, or its best classifier, to the new folder `out`; return its parameters.

    `nnet_ema` is the published U-ViT's file, for `diffusion.weights` and the method's public code.
    `safetensors` is `model.safetensors` and `config.json`, for `diffusion.init_from` and any reader.
    `classifier` is the one that `dpt predict` uses, in the same form, with its method and its temperature in
    `config.json`. `onnx` is that classifier with its encoder as one network for onnxruntime, in float32, with
    its crop and its classes in `config.json`. Both are of the classifier of `method`, by default the best on
    validation. Raises ConfigError where it is not trained yet, `out` exists or
    cannot be written, or the format is unknown or cannot represent the network (modulation in nnet_ema).
    """
    from dpt_ray.models.denoiser import load_denoiser
    from dpt_ray.models.published import export_published_uvit
    from dpt_ray.models.saved import CONFIG, WEIGHTS

    if format not in MODEL_FORMATS:
        raise ConfigError(f"format: {format!r} is unknown; use one of {', '.join(MODEL_FORMATS)}")
    if format == "classifier":
        return _export_classifier(config, out, method)
    if format == "onnx":
        return _export_onnx(config, out, method)
    if method:
        raise ConfigError(
            f"--method {method}: is of the formats classifier and onnx, not {format}; leave it out"
        )
    denoiser = next((made["denoiser"] for made in sets_made(config) if "denoiser" in made), None)
    if not denoiser:
        raise ConfigError(
            f"the denoiser of run {config.name} is not in {find_store(config).uri}; run "
            "`dpt train-diffusion CONFIG` first"
        )
    model, _ = load_denoiser(denoiser.uri)
    if format == "nnet_ema" and model.config.modulation:
        raise ConfigError(
            "format: nnet_ema is the published U-ViT, which has no modulation; use safetensors, or train "
            "with diffusion.model.modulation=false"
        )
    with publishing(out) as part:
        if format == "nnet_ema":
            export_published_uvit(model, part)
        else:
            part.mkdir()
            for name in (WEIGHTS, CONFIG):
                shutil.copyfile(denoiser.local_file(name), part / name)
    return sum(parameter.numel() for parameter in model.parameters())


def _export_classifier(config: Config, out: Path, method: str | None) -> int:
    """Write `model.safetensors` and `config.json` of a classifier; return its parameters.

    Where its encoder was trained with it, the folder has that too, as `encoder`.
    """
    from dpt_ray.learners.linear_classifier import CONFIG, WEIGHTS, load_classifier

    made, best = best_classifier(config, method=method)
    facts = best.artifact.read_json(best.prefix + CONFIG)
    facts |= {"method": best.method, "temperature": best.temperature}
    with publishing(out) as part:
        part.mkdir()
        shutil.copyfile(best.artifact.local_file(best.prefix + WEIGHTS), part / WEIGHTS)
        (part / CONFIG).write_text(json.dumps(facts, indent=1) + "\n")
        if best.encoder != "encoder":
            (part / "encoder").mkdir()
            for name in (WEIGHTS, CONFIG):
                shutil.copyfile(made[best.encoder].local_file(name), part / "encoder" / name)
    return int(load_classifier(best.artifact, best.prefix).size)


def _export_onnx(config: Config, out: Path, method: str | None) -> int:
    """Write encoder and classifier as an ONNX file, and what its input is; return their parameters."""
    from dpt_ray.learners.linear_classifier import CONFIG, load_classifier
    from dpt_ray.models.encoder import load_encoder
    from dpt_ray.models.served import INPUT, OUTPUT, Served, write_onnx

    if not find_spec("onnxscript"):
        raise ConfigError(
            "format: onnx needs the package onnxscript: install the project with its extra, "
            "pip install -e '.[onnx]'"
        )
    made, best = best_classifier(config, method=method)
    encoder, W = load_encoder(made[best.encoder].uri), load_classifier(best.artifact, best.prefix)
    size = encoder.crop.size
    facts = {
        "input": f"{INPUT}: uint8 (batch, {size}, {size}, {len(encoder.spec.mean)}), cropped",
        "output": f"{OUTPUT}: float32 (batch, {len(W)})",
        "crop": encoder.crop.facts(),
        "mode": config.data.mode,
        "classes": best.artifact.read_json(best.prefix + CONFIG)["classes"],
        "method": best.method,
        "temperature": best.temperature,
    }
    with publishing(out) as part:
        part.mkdir()
        write_onnx(Served(encoder, W, best.temperature), part / ONNX_FILE)
        (part / CONFIG).write_text(json.dumps(facts, indent=1) + "\n")
    return int(W.size) + sum(parameter.numel() for parameter in encoder.parameters())


@contextmanager
def publishing(out: Path) -> Iterator[Path]:
    """Yield a temporary path beside `out` to write; rename it to `out` when the block ends without error."""
    if out.exists() or out.is_symlink():
        raise ConfigError(f"out: {str(out)!r} exists; remove it or choose another name")
    part = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        yield part
        part.rename(out)
    except (OSError, ValueError) as error:
        raise ConfigError(f"out: {str(out)!r} was not written: {error}") from error
    finally:
        if part.is_dir():
            shutil.rmtree(part, ignore_errors=True)
        elif part.exists():
            part.unlink()
