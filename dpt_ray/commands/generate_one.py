"""generate --only: sample one image of a run again, in the batch that it is sampled in."""

from __future__ import annotations

import io
from pathlib import Path
from typing import cast

import numpy as np
from PIL import Image

from dpt_ray.cluster.session import usable_cpus
from dpt_ray.commands.export import publishing
from dpt_ray.config import Config, ConfigError
from dpt_ray.config.sections import SampleSettings
from dpt_ray.data.class_ranges import class_range_of
from dpt_ray.data.shards import encode_png, read_image_shard
from dpt_ray.engine.code_version import code_version
from dpt_ray.pipeline.flow import flow
from dpt_ray.pipeline.output import find_store
from dpt_ray.pipeline.run_folder import is_published
from dpt_ray.stages.samples import GenerateUnit, Sampler
from dpt_ray.store.artifact import Artifact


def generate_one(config: Config, which: str, out: Path | None) -> tuple[Path, str]:
    """Write image "CLASS/INDEX" of a run as PNG, with its provenance as text in the file.

    Return the file, by default CLASS-INDEX.png, and how the image compares with the published one. On the
    same hardware, with the same batch size and threads, the pixels are the same bit by bit. Raises
    ConfigError where the denoiser is not trained, there is no such class, or the file exists.
    """
    nodes, store = flow(config), find_store(config)
    if "samples" not in nodes:
        raise ConfigError("--only: this configuration generates no images; set generate_in=images or both")
    node = nodes["samples"]
    for source in node.inputs.values():
        if not is_published(source, store):
            raise ConfigError(
                f"--only: the {source.name} of run {config.name} is not in {store.uri}; run "
                "`dpt train-diffusion CONFIG` first"
            )
    label, index = _which(which, nodes["index"].artifact(store).read_json("classes.json"))
    settings, samples, compute = cast(SampleSettings, node.settings), node.artifact(store), config.compute
    inputs = {key: source.artifact(store) for key, source in node.inputs.items()}
    threads = compute.threads or max(1, usable_cpus() // compute.actors)
    worker = GenerateUnit(Sampler.of(node, samples, inputs, compute, threads))
    unit = class_range_of(label, index, settings.indices_per_shard, worker.classes)
    image = worker.sample_one(unit, (label, index))
    provenance = {
        "Software": f"dpt_ray {code_version()}",
        "Source": f"run {config.name}, class {label}, index {index}",
        "Description": f"denoiser {node.inputs['denoiser'].digest}; {settings.model_dump_json()}",
    }
    out = out or Path(f"{which.replace('/', '-')}.png")
    with publishing(out) as part:
        part.write_bytes(encode_png(image, provenance))
    return out, _compared(samples, unit["shard"], (label, index), image)


def _which(which: str, classes: list[str]) -> tuple[int, int]:
    """Return class id and index of "CLASS/INDEX"; the class by its name or its id."""
    name, sign, text = which.rpartition("/")
    if not sign or not text.isdecimal():
        raise ConfigError(f"--only: {which!r}: write CLASS/INDEX, such as {classes[0]}/0")
    if name in classes:
        return classes.index(name), int(text)
    if name.isdecimal() and int(name) < len(classes):
        return int(name), int(text)
    raise ConfigError(f"--only: {name!r} is no class of this run: {', '.join(classes[:5])}, ...")


def _compared(samples: Artifact, shard: str, item: tuple[int, int], image: np.ndarray) -> str:
    """Return how an image compares with the published one."""
    published = samples.shards()
    if shard not in published:
        return "not published before"
    rows = read_image_shard(samples, published[shard])
    labels, indices = rows["class"].to_numpy(), rows["index"].to_numpy()
    [row] = np.flatnonzero((labels == item[0]) & (indices == item[1]))
    published_image = Image.open(io.BytesIO(rows["image"][int(row)].as_py()))
    same = np.array_equal(np.asarray(published_image).reshape(image.shape), image)
    return "identical to the published one" if same else "not identical to the published one"
