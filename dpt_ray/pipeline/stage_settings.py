"""Settings of stages that are more than one section of the configuration."""

from __future__ import annotations

import hashlib

from dpt_ray.config import Config, ConfigError
from dpt_ray.config.sections import SampleSettings, Sampling
from dpt_ray.config.student import StudentTraining
from dpt_ray.data.fingerprint import fingerprint
from dpt_ray.data.listing import canonical
from dpt_ray.evaluation.inception_files import WHERE, check_reference
from dpt_ray.models.precision import resolved
from dpt_ray.models.saved import config_beside, weight_file
from dpt_ray.pipeline.encoders import check_network
from dpt_ray.stages.augmented import AugmentSettings
from dpt_ray.stages.autoencoder import AutoencoderSettings
from dpt_ray.stages.extract import MomentSettings
from dpt_ray.stages.index import IndexSettings
from dpt_ray.stages.student import StudentSettings
from dpt_ray.stages.sweep import SweepSettings
from dpt_ray.store.artifact import sha256


def sweep_settings(config: Config) -> SweepSettings | None:
    """Return the settings of the sweep; without sweep and controls nothing is chosen: None.

    Where no images are generated the sweep is that of the controls alone.
    """
    if not ((config.sweep and config.generates_images) or config.evaluate.controls):
        return None
    settings = (config.sweep or config.retrain_grid).model_dump()
    if config.evaluate.controls:
        # lambda = l2 / n, and n of stage 3 is hundreds of times the probe's: let the probe reach it.
        settings["probe_l2"] = tuple(config.classifier.l2 / 10**decade for decade in range(4))
    return SweepSettings(**settings, further_seeds=config.further_seeds)


def autoencoder_settings(config: Config) -> AutoencoderSettings:
    """Return the settings of the autoencoder, with the shape of its images."""
    return AutoencoderSettings(
        kind=config.autoencoder.kind,
        weights=config.autoencoder.weights,
        channels=1 if config.data.mode == "L" else 3,
        size=config.data.image_size,
    )


def moment_settings(config: Config) -> MomentSettings:
    """Return the settings of the moments."""
    return MomentSettings(
        flips=config.autoencoder.flips,
        precision=resolved(config.autoencoder.precision),
        max_bad_fraction=config.data.max_bad_fraction,
    )


def sample_settings(config: Config) -> SampleSettings:
    """Return the settings of the generated images, which have the autoencoder's precision by default."""
    judged = config.generate.resample is not None
    return SampleSettings(
        **config.generate.model_dump(include=set(Sampling.model_fields)),
        precision=resolved(config.generate.precision or config.autoencoder.precision),
        features_precision=resolved(config.encoder.precision) if judged else None,
    )


def augment_settings(config: Config, seed: int | None = None) -> AugmentSettings:
    """Return the settings of the augmented images, which are as many and have the seed of generated ones.

    `seed` is another one.
    """
    return AugmentSettings(
        augmentation=config.evaluate.augmentation,
        strength=config.evaluate.augment_strength,
        image_size=config.data.image_size,
        indices_per_shard=config.generate.indices_per_shard,
        seed=config.generate.seed if seed is None else seed,
    )


def student_settings(config: Config) -> StudentSettings:
    """Return the settings of the student. Raises ConfigError for a network that timm does not know."""
    section, teacher = config.student, config.teacher
    assert section is not None and teacher is not None  # checked by Config
    if section.patch_size:
        check_network("student.network", section, config.data.image_size)
    return StudentSettings(
        **section.model_dump(include=set(StudentTraining.model_fields)),
        image_size=config.data.image_size,
        teacher=teacher,
        max_bad_fraction=config.data.max_bad_fraction,
    )


def index_settings(config: Config) -> IndexSettings:
    """Return the settings of the index, with the digests of what it is read from."""
    data, lists = config.data, config.data.keep_in_train
    # The index holds absolute places: however the folder is written, it is the same one, and from another
    # folder another one.
    where = {"uri": canonical(data.uri)} if data.uri else {}
    return IndexSettings(
        **data.model_dump() | where,
        fingerprint=fingerprint(data),
        lists=tuple(content("data.keep_in_train", uri) for uri in lists) if lists else None,
        list_format=config.labels.format if lists else None,
    )


def content(key: str, source: str) -> str:
    """Return the digest of a user's file. Raises ConfigError where it cannot be used."""
    try:
        file = weight_file(source)
        digest = sha256(file)
        if key == "autoencoder.weights" and (described := config_beside(source, file)):
            # Its scale and layout decide the latents, and no tensor's shape has them.
            digest = hashlib.sha256(f"{digest} {sha256(described)}".encode()).hexdigest()
        if key == "evaluate.reference":
            check_reference(source)
    except Exception as error:  # each storage raises errors of its own
        said = " ".join(str(error).split()) or type(error).__name__
        hint = f". {WHERE}" if key == "evaluate.inception" else ""
        raise ConfigError(f"{key}: {source}: {said.removeprefix(f'{source}: ')}{hint}") from error
    return digest
