"""Paired gains over label draws and encoder seeds, with a standard error that respects both.

A gain is one method's accuracy minus another's on the same encoder seed and the same label draw.
Gains that share a seed are not independent, so S x D of them do not carry S x D units of evidence.

Balanced random effects (Searle, Casella & McCulloch, Variance Components, 1992, chapters 3 and 4;
mean squares MS by analysis of variance, S seeds with D draws each):

nested, each seed with label draws of its own: y_sd = mu + a_s + e_sd
    Var(mean) = sigma_a^2 / S + sigma_e^2 / (S D),  estimated by  MS_a / (S D) = Var(seed means) / S
    with S - 1 degrees of freedom.

crossed, the same label draws under every seed: y_sd = mu + a_s + b_d + e_sd
    Var(mean) = sigma_a^2 / S + sigma_b^2 / D + sigma_e^2 / (S D),
    estimated by  (MS_a + MS_b - MS_e) / (S D),  a component estimated below 0 set to 0,
    with Satterthwaite's degrees of freedom, at least min(S, D) - 1.

With one seed only the draws vary, Var(mean) = Var(gains) / D; with one crossed draw only the seeds
do. `unit` says over what the interval generalises.
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

    `unit` is "encoder seeds", "draws" or "encoder seeds and draws"; `positive` of `total` gains are
    above 0.
    """

    mean: float
    stderr: float
    degrees_of_freedom: float
    unit: str
    encoder_seeds: int
    draws: int
    positive: int
    total: int

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Two-sided Student-t confidence interval of the mean gain."""
        half = self.stderr * float(stdtrit(self.degrees_of_freedom, (1 + level) / 2))
        return self.mean - half, self.mean + half


def paired_gain(gains: Iterable[Gain], *, crossed: bool) -> PairedGain:
    """Mean and standard error of a balanced table of (encoder seed, draw, gain).

    `crossed` says that equal draws under different seeds are the same label list; otherwise draws
    are nested in their seed, whatever they are called. Raises ValueError for an unbalanced table,
    a repeated or non-finite gain, and for fewer than two gains.
    """
    y = _table(list(gains), crossed=crossed)
    S, D = y.shape
    if y.size < 2:
        raise ValueError("one gain has no standard error; add label draws or encoder seeds")
    if S == 1:
        unit, variance, df = "draws", float(y.var(ddof=1)) / D, float(D - 1)
    elif crossed and D > 1:
        unit, (variance, df) = "encoder seeds and draws", _crossed_variance(y)
    else:
        unit, variance, df = "encoder seeds", float(y.mean(axis=1).var(ddof=1)) / S, float(S - 1)
    return PairedGain(
        mean=float(y.mean()),
        stderr=math.sqrt(variance),
        degrees_of_freedom=df,
        unit=unit,
        encoder_seeds=S,
        draws=D,
        positive=int((y > 0).sum()),
        total=y.size,
    )


def _crossed_variance(y: np.ndarray) -> tuple[float, float]:
    """Variance of the grand mean of a crossed table (S, D), and its degrees of freedom."""
    S, D = y.shape
    seeds, draws = y.mean(axis=1), y.mean(axis=0)
    df_a, df_b, df_e = S - 1, D - 1, (S - 1) * (D - 1)
    ms_a, ms_b = D * seeds.var(ddof=1), S * draws.var(ddof=1)
    residual = y - seeds[:, None] - draws[None, :] + y.mean()
    ms_e = float((residual**2).sum()) / df_e
    # MS_e + (MS_a - MS_e)^+ + (MS_b - MS_e)^+ is a sum of mean squares with these coefficients.
    a, b = float(ms_a > ms_e), float(ms_b > ms_e)
    e = 1 - a - b
    total = a * ms_a + b * ms_b + e * ms_e
    spread = (a * ms_a) ** 2 / df_a + (b * ms_b) ** 2 / df_b + (e * ms_e) ** 2 / df_e
    floor = float(min(df_a, df_b))
    return total / (S * D), max(floor, total**2 / spread) if spread > 0 else floor


def _table(gains: list[Gain], *, crossed: bool) -> np.ndarray:
    """Gains as (seeds, draws), rows and columns in order of first appearance."""
    if not gains:
        raise ValueError("no gains; pass rows of (encoder seed, draw, gain)")
    for (seed, draw), times in Counter((seed, draw) for seed, draw, _ in gains).items():
        if times > 1:
            raise ValueError(f"encoder seed {seed!r}, draw {draw!r} occurs {times} times; keep one")
    rows: dict[Hashable, dict[Hashable, float]] = {}
    for seed, draw, gain in gains:
        if not math.isfinite(gain):
            raise ValueError(f"gain of encoder seed {seed!r}, draw {draw!r} is {gain}; rerun it")
        rows.setdefault(seed, {})[draw] = gain
    draws = list(dict.fromkeys(draw for _, draw, _ in gains))
    expected = len(draws) if crossed else max(len(row) for row in rows.values())
    for seed, row in rows.items():
        if len(row) != expected:
            raise ValueError(
                f"encoder seed {seed!r} has {len(row)} of {expected} draws; run the missing ones "
                "or leave the seed out"
            )
    if crossed:
        return np.array([[row[draw] for draw in draws] for row in rows.values()])
    return np.array([list(row.values()) for row in rows.values()])
