"""How long a step may run before the run has spent what it may."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

from dpt_ray.engine.errors import StageError
from dpt_ray.engine.progress import NOTHING, Report


@dataclass(frozen=True)
class Allowance:
    """The time until which a step may run, in seconds since 1970; infinite without a cap."""

    until: float
    error: str = ""

    @property
    def is_over(self) -> bool:
        """Whether the time is over, by this machine's clock."""
        return time.time() >= self.until

    def checking(self, progress: Report) -> Report:
        """Return `progress` that raises StageError where the time is over."""

        def checked(done: int, total: int, what: str = "", numbers: Mapping[str, float] = NOTHING) -> None:
            progress(done, total, what, numbers)
            if done < total and self.is_over:
                raise StageError(self.error)

        return checked


UNLIMITED = Allowance(math.inf)
