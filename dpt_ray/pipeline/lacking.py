"""Why a configuration lacks a stage, and the setting that brings it."""

from __future__ import annotations

from dpt_ray.config import Config
from dpt_ray.config.ladder import RUNGS
from dpt_ray.evaluation.inception_files import NOT_COMPUTED

# What there is only where images are generated.
OF_IMAGES = ("autoencoder", "moments", "denoiser", "samples", "sample_features", "retrained", "image_metrics")


def remedy(config: Config, name: str) -> str:
    """Return how a node that the flow of `config` lacks comes into it; "" where nothing is known of it."""
    if name in OF_IMAGES and not config.generates_images:
        return "with generate_in features no images are generated: set generate_in=both"
    if name == "image_metrics":
        return NOT_COMPUTED
    if name in ("retrained", "sweep", "augmented") and config.diffusion.condition == "none":
        return "it comes with diffusion.condition=pseudo_labels"
    if name == "sweep" and config.generates_images:
        return f"it comes with sweep={{images_per_class: [{config.retrain.images_per_class}]}}"
    if name in ("sweep", "augmented"):
        return "it comes with evaluate.controls=true"
    if name == "pilot":
        # Without the ladder there is no control that its gain could be held against.
        return f"it comes with {'' if config.ladder else 'ladder={} '}generate_in=both"
    if name in ("ladder", *RUNGS):
        return f"it comes with ladder.rungs=[{name}]" if config.ladder else "it comes with ladder={}"
    return ""


def unused_note(config: Config) -> str:
    """Return what to say of settings of FID that measure nothing without its network; else ""."""
    evaluate = config.evaluate
    if evaluate.inception or not config.generates_images:
        return ""
    given = {
        "evaluate.reference": evaluate.reference,
        "evaluate.images": evaluate.images,
        "evaluate.labels": evaluate.labels == "uniform",
    }
    keys = " ".join(key for key, value in given.items() if value)
    return keys and f"note: {keys} of FID, which is not computed without evaluate.inception, change nothing"
