"""Paired gains over label draws and encoder seeds, with a standard error that respects both.

A gain is one method's accuracy minus another's on the same encoder seed and the same label draw.
Gains that share a seed are not independent, so S x D of them are fewer than S x D independent samples.

Balanced random effects, S seeds with D label draws each (Searle, Casella & McCulloch, Variance
Components, 1992, chapter 3; mean square MS_a of the seeds by analysis of variance):

    y_sd = mu + a_s + e_sd
    Var(mean) = sigma_a^2 / S + sigma_e^2 / (S D),  estimated by  MS_a / (S D) = Var(seed means) / S
    with S - 1 degrees of freedom.

With one seed only the draws vary: Var(mean) = Var(gains) / D with D - 1 degrees of freedom.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

Gain = tuple[Hashable, Hashable, float]


@dataclass(frozen=True)
class PairedGain:
    """Mean gain with its standard error, in the unit of the gains; see the module for the formula.

    A single gain has no standard error (None, 0 degrees of freedom). `positive` of `total` gains are
    above 0.
    """

    mean: float
    stderr: float | None
    degrees_of_freedom: int
    positive: int
    total: int


def paired_gain(gains: Iterable[Gain]) -> PairedGain:
    """Return mean and standard error of a balanced table of (encoder seed, draw, gain).

    Draws are nested in their seed, also where they share names. Raises ValueError for no gains, an
    unbalanced table, and a repeated or non-finite gain.
    """
    y = _table(list(gains))
    # Var(mean) = Var(seed means) / S; with one seed Var(gains) / D
    units = y.mean(axis=1) if len(y) > 1 else y[0]
    n = len(units)
    return PairedGain(
        mean=float(y.mean()),
        stderr=math.sqrt(units.var(ddof=1) / n) if n > 1 else None,
        degrees_of_freedom=n - 1,
        positive=int((y > 0).sum()),
        total=y.size,
    )


def binomial_stderr(accuracy: float, n: int) -> float:
    """Return the standard error sqrt(p (1 - p) / n) of an accuracy over n independent test images.

    It covers the sampling of test images only, not label draws or seeds.
    """
    if n < 1 or not 0 <= accuracy <= 1:
        raise ValueError(f"accuracy {accuracy} over n {n}; pass a fraction in [0, 1] and n >= 1")
    return math.sqrt(accuracy * (1 - accuracy) / n)


def half_interval(degrees_of_freedom: int) -> float:
    """Return half a two-sided Student-t confidence interval of a mean, in standard errors."""
    return float(stdtrit(degrees_of_freedom, 0.975))


def _table(gains: list[Gain]) -> np.ndarray:
    """Return the gains as (seeds, draws), in order of first appearance."""
    if not gains:
        raise ValueError("no gains; pass rows of (encoder seed, draw, gain)")
    for (seed, draw), times in Counter((seed, draw) for seed, draw, _ in gains).items():
        if times > 1:
            raise ValueError(f"encoder seed {seed!r}, draw {draw!r} occurs {times} times; keep one")
    rows: dict[Hashable, list[float]] = {}
    for seed, draw, gain in gains:
        if not math.isfinite(gain):
            raise ValueError(f"gain of encoder seed {seed!r}, draw {draw!r} is {gain}; rerun it")
        rows.setdefault(seed, []).append(gain)
    expected = max(len(row) for row in rows.values())
    for seed, row in rows.items():
        if len(row) != expected:
            raise ValueError(
                f"encoder seed {seed!r} has {len(row)} of {expected} draws; run the missing ones "
                "or leave the seed out"
            )
    return np.array(list(rows.values()))
