"""The files in a model's folder (no torch: the driver hashes them before anything is computed)."""

from __future__ import annotations

import json

from dpt_ray.store.filesystem import url_to_fs

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
# This project's, a published U-ViT's, and an autoencoder's in diffusers' format.
WEIGHT_FILES = (WEIGHTS, "nnet_ema.pth", "nnet.pth", "diffusion_pytorch_model.safetensors")


def weight_file(source: str) -> str:
    """Return the file of weights that a path or URI means: itself, or the one in a denoiser's folder.

    Raises ValueError for a folder without any.
    """
    fs, path = url_to_fs(source, use_listings_cache=False)
    if not fs.isdir(path):
        return source
    for name in WEIGHT_FILES:
        if fs.isfile(f"{path.rstrip('/')}/{name}"):
            return f"{source.rstrip('/')}/{name}"
    raise ValueError(f"{source}: none of {', '.join(WEIGHT_FILES)} in this folder; give a denoiser's")


def config_beside(source: str, file: str) -> str | None:
    """Return the config.json of the folder `source`, whose weights are `file`; None for a file of its own."""
    if source == file:
        return None
    found = f"{source.rstrip('/')}/{CONFIG}"
    fs, path = url_to_fs(found, use_listings_cache=False)
    return found if fs.isfile(path) else None


def check_heads(file: str, heads: int) -> None:
    """Raise ValueError where the folder of `file` says another number of heads: no tensor's shape does."""
    folder = file.rpartition("/")[0] or "."
    fs, path = url_to_fs(f"{folder}/{CONFIG}", use_listings_cache=False)
    if file.endswith(".safetensors") and fs.isfile(path):
        given = json.loads(fs.cat_file(path)).get("model", {}).get("heads", heads)
        if given != heads:
            raise ValueError(f"{file}: made with heads {given}; set diffusion.model.heads to it, not {heads}")
