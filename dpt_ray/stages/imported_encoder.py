"""import: convert a published encoder to this project's format (safetensors and JSON)."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, cast

from dpt_ray.config import ConfigError
from dpt_ray.config.hashing import Hashed, HashedFile, HashedIfSet, Settings
from dpt_ray.config.sections import Count
from dpt_ray.engine.node import Stage, Task
from dpt_ray.store.records import CropFields, Facts


class EncoderSettings(Settings):
    """The encoder; its weights are hashed by content."""

    kind: str
    name: Annotated[str | None, Hashed] = None
    weights: Annotated[str | None, HashedFile(key="encoder.weights")] = None
    heads: Annotated[Count | None, HashedIfSet] = None
    blocks: Annotated[Count | None, HashedIfSet] = None
    image_size: Annotated[Count | None, HashedIfSet] = None


class ImportedEncoder(Stage[EncoderSettings]):
    """A frozen encoder with published weights."""

    artifact = "encoder"
    settings = EncoderSettings

    @classmethod
    def make(cls, task: Task[EncoderSettings]) -> Facts:
        """Publish the encoder's folder. Raises ConfigError for unreadable weights."""
        from dpt_ray.models.encoder import open_encoder, save_encoder

        settings = task.settings
        try:
            encoder = open_encoder(
                settings.kind,
                name=settings.name,
                weights=settings.weights,
                heads=settings.heads,
                blocks=settings.blocks or 1,
                image_size=settings.image_size,
            )
        except ValueError as error:
            raise ConfigError(f"encoder: {error}") from error
        task.out.publish_files(lambda folder: save_encoder(folder, encoder))
        return {"crop": cast(CropFields, asdict(encoder.crop))}
