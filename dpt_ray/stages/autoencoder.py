"""import: convert a published autoencoder, or the identity, to this project's format."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Literal, cast

from dpt_ray.config import ConfigError
from dpt_ray.config.hashing import HashedFile, Settings
from dpt_ray.config.sections import Count
from dpt_ray.data.crops import Crop
from dpt_ray.engine.node import Stage, Task
from dpt_ray.store.records import CropFields, Facts


class AutoencoderSettings(Settings):
    """The autoencoder and the shape of its images; weights are hashed by content."""

    kind: Literal["identity", "kl"]
    weights: Annotated[str | None, HashedFile(key="autoencoder.weights")] = None
    channels: Count
    size: Count


class ImportedAutoencoder(Stage[AutoencoderSettings]):
    """A frozen autoencoder; with the identity the denoiser trains on pixels."""

    artifact = "autoencoder"
    settings = AutoencoderSettings

    @classmethod
    def make(cls, task: Task[AutoencoderSettings]) -> Facts:
        """Publish the autoencoder's folder. Raises ConfigError for unreadable weights."""
        from dpt_ray.models.autoencoder import open_autoencoder

        settings = task.settings
        try:
            autoencoder = open_autoencoder(
                settings.kind, settings.weights, channels=settings.channels, size=settings.size
            )
        except ValueError as error:
            raise ConfigError(f"autoencoder: {error}") from error
        task.out.publish_files(autoencoder.save)
        return {
            "crop": cast(CropFields, asdict(Crop("adm", autoencoder.image_shape[1]))),
            "latent_shape": list(autoencoder.latent_shape),
            "scale": autoencoder.scale,
        }
