"""A measure of images, as results and pages show it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """One measure of the images `name` and all that it takes to compare it: N, extractor, reference, resize.

    `spread` is the standard deviation over what `metric` names (subsets, splits). A count is None where a
    reference file does not tell it, or where a measure has no reference.
    """

    metric: str
    name: str
    value: float
    spread: float | None
    n_generated: int
    n_reference: int | None
    extractor: str
    reference: str
    resize: str
