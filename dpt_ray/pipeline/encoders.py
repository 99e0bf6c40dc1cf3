"""The encoder of a run, as the flow needs it: its settings, and whether timm knows its network."""

from __future__ import annotations

from dpt_ray.config import Config, ConfigError
from dpt_ray.config.training import NetworkTraining
from dpt_ray.stages.imported_encoder import EncoderSettings


def encoder_settings(config: Config) -> EncoderSettings:
    """Return the settings of a brought encoder; its weights are by default timm's."""
    encoder = config.encoder
    assert encoder.kind != "pretrain"
    weights = encoder.weights
    if encoder.kind == "timm" and not weights:
        weights = _timm_weights(str(encoder.name))
    return EncoderSettings(
        kind=encoder.kind,
        name=encoder.name,
        weights=weights,
        heads=encoder.heads,
        blocks=encoder.blocks,
        image_size=encoder.image_size,
    )


def check_network(key: str, section: NetworkTraining, size: int) -> None:
    """Raise ConfigError where timm has no such vision transformer."""
    import torch

    from dpt_ray.models.own_networks import vision_transformer

    assert section.patch_size is not None
    try:
        with torch.device("meta"):
            vision_transformer(section.network, 3, size, section.patch_size)
    except ValueError as error:
        raise ConfigError(f"{key}: {error}") from error


def _timm_weights(name: str) -> str:
    from dpt_ray.models.encoder import timm_weights

    try:
        return timm_weights(name)
    except ValueError as error:
        raise ConfigError(f"encoder.name: {error}") from error
