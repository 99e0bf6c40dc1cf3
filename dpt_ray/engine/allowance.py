"""How long a step may run before the run has spent what it may.

The time is counted where the allowance was made, in the driver: wall clocks jump and differ between machines,
and a monotonic clock means nothing on another one. Workers are told when it is over (cluster/training.py).
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

from dpt_ray.engine.errors import StageError
from dpt_ray.engine.progress import NOTHING, Report


@dataclass(frozen=True)
class Allowance:
    """The time by `time.monotonic` until which a step may run; infinite without a cap."""

    until: float
    error: str = ""

    @property
    def is_limited(self) -> bool:
        """Whether there is a cap."""
        return math.isfinite(self.until)

    @property
    def is_over(self) -> bool:
        """Whether the time is over; to be asked in the driver alone."""
        return time.monotonic() >= self.until

    def checking(self, progress: Report) -> Report:
        """Return `progress` that raises StageError where the time is over."""

        def checked(done: int, total: int, what: str = "", numbers: Mapping[str, float] = NOTHING) -> None:
            progress(done, total, what, numbers)
            if done < total and self.is_over:
                raise StageError(self.error)

        return checked


UNLIMITED = Allowance(math.inf)
