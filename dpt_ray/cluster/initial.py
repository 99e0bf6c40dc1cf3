"""Where a training starts: from given weights, or from a finished training of fewer steps."""

from __future__ import annotations

import json
import logging
from typing import Any

from fsspec.core import url_to_fs

from dpt_ray.config import ConfigError
from dpt_ray.engine.node import Task
from dpt_ray.store.artifact import Artifact, Store
from dpt_ray.store.checkpoints import CHECKPOINTS, checkpoint_names
from dpt_ray.training.log import LOG, read_log

# This project's, a published U-ViT's, and an autoencoder's in diffusers' format.
WEIGHT_FILES = ("model.safetensors", "nnet_ema.pth", "nnet.pth", "diffusion_pytorch_model.safetensors")
INITIAL = "initial.safetensors"
CONTINUED = "continued.json"


def weight_file(source: str) -> str:
    """The file that `diffusion.init_from` means: itself, or the weights in a denoiser's folder.

    Raises ValueError for a folder without any.
    """
    fs, path = url_to_fs(source, use_listings_cache=False)
    if not fs.isdir(path):
        return source
    for name in WEIGHT_FILES:
        if fs.isfile(f"{path.rstrip('/')}/{name}"):
            return f"{source.rstrip('/')}/{name}"
    raise ValueError(f"{source}: none of {', '.join(WEIGHT_FILES)} in this folder; give a denoiser's")


def publish_initial(task: Task, config: Any) -> None:
    """Checks the weights of `diffusion.init_from` against the network, and puts them where workers look.

    The label embedding of another number of classes is drawn anew but for its null row. Raises
    ConfigError naming the keys that are missing, unexpected or of another shape.
    """
    import torch

    from dpt_ray.models.published import LABEL_EMBEDDING, with_classes
    from dpt_ray.models.uvit import UViT
    from dpt_ray.models.weights import load_strict, load_weights, save_weights

    if not (source := task.settings["init_from"]):
        return
    try:
        file = weight_file(source)
        tensors = load_weights(file)
        if LABEL_EMBEDDING in tensors and len(tensors[LABEL_EMBEDDING]) != config.num_classes + 1:
            generator = torch.Generator().manual_seed(task.settings["seed"])
            tensors = with_classes(tensors, config.num_classes, generator)
        load_strict(UViT(config), tensors, file)
        _check_heads(file, config.heads)
    except ValueError as error:
        raise ConfigError(f"diffusion.init_from: {error}") from error
    with task.out.writing(INITIAL) as path:
        save_weights(tensors, path)


def _check_heads(file: str, heads: int) -> None:
    """No tensor's shape tells the number of heads, but this project's folders do."""
    folder = file.rpartition("/")[0] or "."
    fs, path = url_to_fs(f"{folder}/config.json", use_listings_cache=False)
    if file.endswith(".safetensors") and fs.isfile(path):
        given = json.loads(fs.cat_file(path))["model"]["heads"]
        if given != heads:
            raise ValueError(f"{file}: made with heads {given}; set diffusion.model.heads to it, not {heads}")


def continue_shorter(task: Task) -> dict[str, Any]:
    """Takes over the last checkpoint of a finished training that differs in having fewer steps only.

    With a constant learning rate its weights are those that this training would have at that step; with
    another schedule they are not, and all steps are made. Returns what was done, for the manifest.
    """
    out, settings = task.out, dict(task.node.settings)
    if checkpoint_names(out):
        return out.read_json(CONTINUED) if out.exists(CONTINUED) else {}
    shorter = _shorter(task)
    if not shorter:
        return {}
    steps, digest, source = max(shorter, key=lambda found: found[:2])
    if settings["lr_schedule"] != "constant":
        reason = f"lr_schedule {settings['lr_schedule']} is another one with other steps"
        logging.getLogger("dpt_ray").info("%s: the %d steps are not reused: %s", digest, steps, reason)
        return {"not_continued": f"{steps} steps of {digest} are made anew: {reason}"}
    name = checkpoint_names(source)[-1]
    every = task.settings["log_every"]  # the shorter training logged its last step in any case
    records = [r for r in read_log(source) if r["step"] <= int(name) and r["step"] % every == 0]
    out.write_bytes(LOG, "".join(json.dumps(record) + "\n" for record in records).encode())
    continued = {"continued_from": digest, "continued_at_step": int(name)}
    out.write_json(CONTINUED, continued)
    for suffix in (".safetensors", ".json"):  # the JSON last of all: with it the training begins there
        file = f"{CHECKPOINTS}/{name}{suffix}"
        with out.writing(file) as path:
            source.fs.get_file(source.path(file), str(path))
    return continued


def _shorter(task: Task) -> list[tuple[int, str, Artifact]]:
    """(steps, digest, artifact) of the finished trainings that differ in their smaller steps only."""
    node = task.node
    store = Store(task.out.uri.rstrip("/").removesuffix(f"/store/{node.stage}/{node.digest}"))
    mine = {key: value for key, value in node.settings.items() if key != "steps"}
    inputs = {key: f"{source.stage}/{source.reference}" for key, source in node.inputs.items()}
    found = []
    for digest in store.digests(node.stage):
        artifact = store.artifact(node.stage, digest)
        if not artifact.published or not checkpoint_names(artifact):
            continue
        manifest = artifact.manifest
        settings = dict(manifest["settings"])
        steps = settings.pop("steps", None)
        same = (settings, manifest["inputs"], manifest["version"]) == (mine, inputs, node.version)
        if same and steps < node.settings["steps"]:
            found.append((steps, digest, artifact))
    return found
