"""A denoiser's folder: averaged weights, and what is needed to sample from them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Literal, NotRequired, TypedDict

from safetensors.torch import save_file
from torch import Tensor

from dpt_ray.models.saved import CONFIG, WEIGHTS
from dpt_ray.models.uvit import UViT, UViTConfig
from dpt_ray.models.weights import load_strict, load_weights
from dpt_ray.store.artifact import Artifact


class Description(TypedDict):
    """What `config.json` says of a denoiser beside its network; `steps` is None where it was imported.

    `classes` is how many classes images are sampled for, where that is not the network's number of them.
    """

    schedule: str
    prediction: Literal["noise", "v", "flow"]
    latent_scale: float
    condition: Literal["pseudo_labels", "true_labels", "none"]
    steps: int | None
    classes: NotRequired[int]


class DenoiserConfig(Description):
    """All of `config.json`: `model` are the fields of a `UViTConfig`."""

    model: dict[str, int | bool]


def save_denoiser(
    folder: Path, weights: Mapping[str, Tensor], config: UViTConfig, description: Description
) -> None:
    """Write the weights by name and `config.json`."""
    save_file({name: value.contiguous() for name, value in weights.items()}, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps({"model": asdict(config), **description}, indent=1) + "\n")


def load_denoiser(folder: str) -> tuple[UViT, DenoiserConfig]:
    """Return the network of a denoiser's folder, local or a URI, on the CPU, and its `config.json`."""
    config: DenoiserConfig = Artifact(folder).read_json(CONFIG)
    model = UViT(UViTConfig(**config["model"]))  # type: ignore[arg-type]
    weights = f"{folder}/{WEIGHTS}"
    load_strict(model, load_weights(weights), weights)
    return model.eval().requires_grad_(False), config
