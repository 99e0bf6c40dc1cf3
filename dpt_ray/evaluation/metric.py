"""A metric of generated images, as tables show it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """One metric of the images `name`, with what a comparison needs: N, extractor, reference, resize.

    `spread` is the standard deviation over the subsets or splits that `metric` names. `n_reference` is
    None for a reference file without its count and for a metric without a reference.
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
