"""import: FID's Inception-v3, published where every actor can read it."""

from __future__ import annotations

from typing import Annotated

from dpt_ray.config import ConfigError
from dpt_ray.config.hashing import HashedFile, Settings
from dpt_ray.engine.node import Stage, Task
from dpt_ray.models.saved import WEIGHTS
from dpt_ray.store.records import Facts


class InceptionSettings(Settings):
    """The file of weights."""

    inception: Annotated[str, HashedFile(key="evaluate.inception")]


class Inception(Stage[InceptionSettings]):
    """The Inception-v3 that FID is defined with."""

    artifact = "inception"
    settings = InceptionSettings

    @classmethod
    def make(cls, task: Task[InceptionSettings]) -> Facts:
        """Publish the weights. Raises ConfigError for an unreadable file."""
        from dpt_ray.evaluation.inception import load_inception
        from dpt_ray.models.weights import save_weights

        try:
            weights = load_inception(task.settings.inception).state_dict()
        except ValueError as error:
            raise ConfigError(f"inception: {error}") from error
        task.out.publish_files(lambda folder: save_weights(weights, folder / WEIGHTS))
        return {"parameters": sum(value.numel() for value in weights.values())}
