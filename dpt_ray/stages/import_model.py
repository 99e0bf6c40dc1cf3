"""import-model: published weights become a folder of this project's own (safetensors and JSON)."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from dpt_ray.config import ConfigError
from dpt_ray.data.crops import Crop
from dpt_ray.stages.node import Task


def make(task: Task) -> dict[str, Any]:
    """Publishes the configured encoder or autoencoder; what cannot be read is a ConfigError."""
    from dpt_ray.models.autoencoder import open_autoencoder
    from dpt_ray.models.encoder import open_encoder, save_encoder

    settings = task.settings
    try:
        if task.node.stage == "encoder":
            encoder = open_encoder(settings["kind"], name=settings["name"], weights=settings["weights"])
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
