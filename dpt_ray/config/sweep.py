"""The sweep of stage 3: its grid, the other sets of generated images that it tries, and their seeds."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from dpt_ray.config.hashing import HashedIfSet, NotHashed, Section, Settings
from dpt_ray.config.sections import RealWeight, Solver
from dpt_ray.config.values import Count, Counts, Distinct, Fraction, Positive, Seed


class OtherSampling(Section):
    """How another set of images of the same denoiser is sampled: what differs from `generate`."""

    guidance: Positive | None = None
    guidance_interval: Annotated[tuple[Fraction, Fraction], Field(strict=False)] | None = None
    solver: Solver | None = None
    nfe: Count | None = None
    seed: Seed | None = None

    @model_validator(mode="after")
    def _differs(self) -> OtherSampling:
        if not self.changes:
            raise ValueError(f"give at least one of {', '.join(type(self).model_fields)}")
        return self

    @property
    def changes(self) -> dict[str, Any]:
        """The settings that are given."""
        return self.model_dump(exclude_none=True)

    @property
    def name(self) -> str:
        """The changes as text, such as guidance=1.5,nfe=50."""
        return ",".join(f"{key}={_text(value)}" for key, value in self.changes.items())


def set_name(sampled: str, seed: int | None) -> str:
    """Return the name of a set of images: how it is sampled, and its seed where that is another one."""
    return sampled if seed is None else f"{sampled},seed={seed}".removeprefix(",")


def _text(value: object) -> str:
    if isinstance(value, tuple):
        return "-".join(f"{part:g}" for part in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


class Sweep(Settings):
    """The grid of settings for stage 3 and its controls; the best is chosen on validation.

    `min_confidence` is that of `retrain`, here a list of values, null among them for all images. `generate`
    lists what else than the section `generate` the images are sampled with, such as `[{guidance: 1.5},
    {guidance: 2.0, nfe: 50}]`: each is a set of images of its own, and competes with the others.

    Each set, and the augmented images of the controls, is made with `seeds` seeds: `generate.seed` and the
    integers after it. A setting is tried on each of them, and judged by the mean. With more than one seed no
    set of `generate` has a `seed` of its own: as a competitor it would be a repetition of another one.

    With `trials` each method has at most so many settings, drawn at random from its grid, which find as good
    ones as a grid where few of the keys matter (Bergstra and Bengio, 2012). More trials add to those before.

    `max_iterations` ends each fit, as the paper's 100 ends stage 3. Without it a fit on the pseudo-labels of
    many images takes thousands of iterations: they come from such a classifier, so its loss falls on and on.
    """

    images_per_class: Counts
    real_weight: Annotated[tuple[RealWeight, ...], Field(strict=False, min_length=1), Distinct] = (1.0,)
    l2: Annotated[tuple[Positive, ...], Field(strict=False, min_length=1), Distinct] = (0.0025,)
    max_iterations: Annotated[Count | None, HashedIfSet] = None
    min_confidence: Annotated[
        Annotated[tuple[Fraction | None, ...], Field(strict=False, min_length=1), Distinct], HashedIfSet
    ] = (None,)
    trials: Annotated[Count | None, HashedIfSet] = None
    seeds: Annotated[Count, HashedIfSet] = 1
    # The sets of images are inputs of the sweep, and hashed as such.
    generate: Annotated[Annotated[tuple[OtherSampling, ...], Field(strict=False)], NotHashed] = ()

    @property
    def filters(self) -> bool:
        """Whether any setting leaves generated images out."""
        return any(least is not None for least in self.min_confidence)
