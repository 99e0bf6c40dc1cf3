"""import-model: published weights become a folder of this project's own (safetensors and JSON)."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from dpt_ray.config import ConfigError
from dpt_ray.data.crops import Crop
from dpt_ray.engine.node import Task


def make(task: Task) -> dict[str, Any]:
    """Publishes the configured encoder, autoencoder or denoiser; what cannot be read is a ConfigError."""
    from dpt_ray.models.autoencoder import open_autoencoder
    from dpt_ray.models.encoder import open_encoder, save_encoder

    settings = task.settings
    try:
        if task.node.stage == "denoiser":
            return _import_denoiser(task)
        if task.node.stage == "inception":
            return _import_inception(task)
        if task.node.stage == "encoder":
            encoder = open_encoder(
                settings["kind"],
                name=settings["name"],
                weights=settings["weights"],
                heads=settings["heads"],
                blocks=settings["blocks"] or 1,
            )
            task.out.publish_files(lambda folder: save_encoder(folder, encoder))
            return {"crop": asdict(encoder.crop)}
        autoencoder = open_autoencoder(
            settings["kind"],
            settings["weights"],
            channels=settings["channels"],
            size=settings["size"],
        )
    except ValueError as error:
        raise ConfigError(f"{task.node.stage}: {error}") from error
    task.out.publish_files(lambda folder: autoencoder.save(Path(folder)))
    return {
        "crop": asdict(Crop("adm", autoencoder.image_shape[1])),
        "latent_shape": list(autoencoder.latent_shape),
        "scale": autoencoder.scale,
    }


def _import_inception(task: Task) -> dict[str, Any]:
    """Publishes FID's Inception, where every actor reaches it."""
    from dpt_ray.evaluation.inception import load_inception
    from dpt_ray.models.weights import save_weights

    weights = load_inception(task.settings["inception"]).state_dict()
    task.out.publish_files(lambda folder: save_weights(weights, folder / "model.safetensors"))
    return {"parameters": sum(value.numel() for value in weights.values())}


def _import_denoiser(task: Task) -> dict[str, Any]:
    """Publishes a published U-ViT. Raises ValueError where it is not the configured one."""
    from dpt_ray.models.published import load_published_uvit
    from dpt_ray.models.uvit import UViTConfig
    from dpt_ray.stages.denoiser import save_denoiser

    settings, autoencoder = task.settings, task.inputs["autoencoder"].manifest
    channels, size, _ = autoencoder["latent_shape"]
    classes = task.inputs["index"].manifest["classes"]
    wanted = UViTConfig(size, in_channels=channels, num_classes=classes, **settings["model"])
    network = load_published_uvit(settings["weights"], wanted.heads)
    found = asdict(network.config)
    if differing := [key for key, value in asdict(wanted).items() if found[key] != value]:
        named = ", ".join(f"{key} {found[key]} (here {getattr(wanted, key)})" for key in differing)
        raise ValueError(f"{settings['weights']} has {named}; correct diffusion.model, or the data")
    weights = network.state_dict()
    task.out.publish_files(lambda folder: save_denoiser(folder, weights, wanted, task, autoencoder["scale"]))
    return {"parameters": sum(value.numel() for value in weights.values())}
