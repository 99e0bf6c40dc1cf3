"""The settings of a sweep, each with its trials on images of several seeds.

All trials of a sweep are measured on the same n validation images, with S seeds for a setting. Images and
seeds are two independent sources of chance, whose variances add:

    Var(mean) = p (1 - p) / n + s^2 / S

with the mean accuracy p and the standard deviation s of the S accuracies. More seeds make the second term
smaller and leave the first. On an image that some seeds are right on and others not both terms count the
same chance, so the sum is rather too large than too small. With one seed s is unknown, and the first term is
all there is.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from dpt_ray.store.records import TrialShard

# What a setting is; the trials of one differ in their seeds alone.
SETTING = ("method", "images_per_class", "real_weight", "l2", "min_confidence", "samples")


@dataclass(frozen=True)
class Swept:
    """A setting with its trials, that of the first seed first."""

    trials: tuple[TrialShard, ...]

    @property
    def first(self) -> TrialShard:
        """The trial of the first seed, that of a run without further ones."""
        return self.trials[0]

    @property
    def top1(self) -> float | None:
        """The mean validation accuracy over the seeds, None without validation images."""
        return _mean(trial["validation_top1"] for trial in self.trials)

    @property
    def nll(self) -> float | None:
        """The mean validation cross-entropy over the seeds, None without validation images."""
        return _mean(trial["validation_nll"] for trial in self.trials)

    @property
    def stderr(self) -> float | None:
        """The standard error of `top1` over the seeds, None with one seed or without validation images."""
        found = [top1 for trial in self.trials if (top1 := trial["validation_top1"]) is not None]
        return statistics.stdev(found) / math.sqrt(len(found)) if len(found) > 1 else None

    def error(self, n: int) -> float:
        """Return the standard error of `top1` over the `n` validation images and the seeds together."""
        # Var(mean) = p (1 - p) / n + s^2 / S
        p = self.top1 or 0.0
        return math.sqrt(p * (1 - p) / n + (self.stderr or 0.0) ** 2)


def by_setting(trials: Iterable[TrialShard]) -> list[Swept]:
    """Return the settings of trials, in the order of their first ones."""
    found: dict[tuple[object, ...], list[TrialShard]] = {}
    for trial in trials:
        found.setdefault(tuple(trial.get(key) for key in SETTING), []).append(trial)
    return [Swept(tuple(of_setting)) for of_setting in found.values()]


def best(trials: Iterable[TrialShard]) -> Swept:
    """Return the setting of highest mean accuracy; ties (validation is small) go to the lower mean NLL.

    Without validation images it is the first one: such a sweep has one setting of each method.
    """

    def quality(setting: Swept) -> tuple[float, float]:
        return setting.top1 or 0.0, -(setting.nll or 0.0)

    return max(by_setting(trials), key=quality)


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None
