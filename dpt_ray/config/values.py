"""The kinds of values that settings have."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Counts = Annotated[tuple[Count, ...], Field(strict=False, min_length=1)]
# "auto": bfloat16 on a GPU, or on a processor where it is faster; else float32 (models/precision.py).
Precision = Literal["float32", "bfloat16", "auto"]
ResolvedPrecision = Literal["float32", "bfloat16"]
Augmentation = Literal["digits", "photographs"]
ViewsName = Literal["digits", "small_images", "photographs"]
