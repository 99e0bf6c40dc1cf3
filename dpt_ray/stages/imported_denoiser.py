"""import: convert a published U-ViT to this project's format."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Literal

from dpt_ray.config import ConfigError
from dpt_ray.config.hashing import HashedFile, Settings
from dpt_ray.config.sections import Denoiser, Prediction, ScheduleName
from dpt_ray.engine.node import Stage, Task, one_of, reads
from dpt_ray.models.saved import check_heads
from dpt_ray.store.records import Facts


class ImportedDenoiserSettings(Settings):
    """The file of weights and how it was trained."""

    weights: Annotated[str, HashedFile(key="diffusion.weights")]
    model: Denoiser
    schedule: ScheduleName
    prediction: Prediction
    condition: Literal["true_labels", "none"]


class ImportedDenoiser(Stage[ImportedDenoiserSettings]):
    """A published denoiser, trained on true labels of the same classes or without labels."""

    artifact = "denoiser"
    settings = ImportedDenoiserSettings
    inputs = reads({"index": one_of("index"), "autoencoder": one_of("autoencoder")})

    @classmethod
    def make(cls, task: Task[ImportedDenoiserSettings]) -> Facts:
        """Publish the denoiser's folder. Raises ConfigError for weights of another network."""
        try:
            return _make(task)
        except ValueError as error:
            raise ConfigError(f"denoiser: {error}") from error


def _make(task: Task[ImportedDenoiserSettings]) -> Facts:
    from dpt_ray.models.denoiser import save_denoiser
    from dpt_ray.models.published import load_published_uvit
    from dpt_ray.models.uvit import UViTConfig

    settings, autoencoder = task.settings, task.inputs["autoencoder"].manifest
    channels, size, _ = autoencoder["latent_shape"]
    classes = task.inputs["index"].manifest["classes"]
    network = load_published_uvit(settings.weights, settings.model.heads)
    check_heads(settings.weights, settings.model.heads)
    found = asdict(network.config)
    without_labels = settings.condition == "none" and not network.config.num_classes
    wanted = UViTConfig(
        size,
        in_channels=channels,
        num_classes=0 if without_labels else classes,
        **settings.model.model_dump(),
        **{key: found[key] for key in ("mlp_ratio", "time_mlp", "qkv_bias")},  # no settings for these
    )
    if differing := [key for key, value in asdict(wanted).items() if found[key] != value]:
        named = ", ".join(f"{key} {found[key]} (here {getattr(wanted, key)})" for key in differing)
        raise ValueError(
            f"{settings.weights} has {named}; correct diffusion.model or .condition, or the data"
        )
    weights = network.state_dict()
    task.out.publish_files(
        lambda folder: save_denoiser(
            folder,
            weights,
            wanted,
            {
                "schedule": settings.schedule,
                "prediction": settings.prediction,
                "latent_scale": autoencoder["scale"],
                "condition": settings.condition,
                "steps": None,  # unknown for an imported denoiser
                "classes": classes,
            },
        )
    )
    return {"parameters": sum(value.numel() for value in weights.values())}
