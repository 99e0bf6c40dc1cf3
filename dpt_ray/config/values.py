"""The kinds of values that settings have."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, Field

T = TypeVar("T", bound=Hashable)


def _distinct(values: tuple[T, ...]) -> tuple[T, ...]:
    """Return values of which none is listed twice: each would be counted as a seed or a run more."""
    for place, value in enumerate(values):
        if value in values[:place]:
            raise ValueError(f"{list(values)} has {value} twice; leave one out")
    return values


def _small_letters(splits: dict[str, SplitName]) -> dict[str, SplitName]:
    """Return the keys in small letters, as the names of a source are compared."""
    found: dict[str, SplitName] = {}
    for name, split in splits.items():
        if found.setdefault(name.lower(), split) != split:
            raise ValueError(f"{name} and {name.lower()} are one name: leave one out")
    return found


SplitName = Literal["train", "validation", "test"]
Splits = Annotated[dict[str, SplitName], AfterValidator(_small_letters)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Distinct = AfterValidator(_distinct)
Counts = Annotated[tuple[Count, ...], Field(strict=False, min_length=1), Distinct]
# "auto": bfloat16 on a GPU, or on a processor where it is faster; else float32 (models/precision.py).
Precision = Literal["float32", "bfloat16", "auto"]
ResolvedPrecision = Literal["float32", "bfloat16"]
Augmentation = Literal["digits", "photographs"]
ViewsName = Literal["digits", "small_images", "photographs"]
