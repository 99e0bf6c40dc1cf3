"""What stops a training that has gone wrong. Checkpoints hold the counts, so a resumed run knows them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class UnstableTraining(RuntimeError):  # noqa: N818
    """A training that goes nowhere from `step` on; `what` has happened."""

    def __init__(self, step: int, what: str, when: str = "") -> None:
        super().__init__(
            f"{what}{when}: lower learning_rate, set grad_clip, or look for bad values in the data"
        )
        self.step, self.what = step, what


class NonFiniteLoss(UnstableTraining):
    """Too many steps in a row had a loss or gradient that is not finite; `step` is the last one."""


class Diverged(UnstableTraining):
    """The loss has stayed far above what it was; `step` is the last one looked at."""


class BadSteps:
    """Counts the skipped steps, each one step late: the host never waits for the running step."""

    def __init__(self, limit: int, skipped: int = 0, in_a_row: int = 0) -> None:
        self.limit, self.skipped, self.in_a_row = limit, skipped, in_a_row
        self._pending: tuple[int, Tensor, torch.cuda.Event | None] | None = None

    def add(self, step: int, bad: Tensor) -> None:
        """Takes the flag of `step` and counts the one before it."""
        flag, ready = bad.to("cpu", non_blocking=True), None
        if bad.is_cuda:
            ready = torch.cuda.Event()
            ready.record()
        self.settle()
        self._pending = step, flag, ready

    def settle(self) -> None:
        """Counts what is pending; raises NonFiniteLoss at `limit` bad steps in a row."""
        if self._pending is None:
            return
        step, flag, ready = self._pending
        self._pending = None
        if ready is not None:
            ready.synchronize()
        bad = bool(flag)
        self.skipped += bad
        self.in_a_row = self.in_a_row + 1 if bad else 0
        if self.in_a_row >= self.limit:
            raise NonFiniteLoss(
                step, f"loss or gradient not finite at step {step}, the last of {self.in_a_row} in a row"
            )


class Divergence:
    """Notices a loss that rises far above what it was and stays there.

    Looks at the logged losses (means over the workers, so all of them see the same). One is high where it
    is above the first logged loss and above `factor` x the lowest mean of WINDOW neighbouring ones: a
    training that is worse than its beginning. WINDOW high ones in a row are a divergence; a spike is not.
    """

    WINDOW = 10

    def __init__(
        self,
        factor: float,
        *,
        first: float = 0.0,
        lowest: float = 0.0,
        recent: Sequence[float] = (),
        high: int = 0,
    ) -> None:
        self.factor, self.first, self.lowest, self.recent, self.high = factor, first, lowest, [*recent], high

    def add(self, step: int, loss: float) -> None:
        """Takes the logged loss of a step; raises Diverged at the last of WINDOW high ones in a row."""
        if not math.isfinite(loss):  # a skipped step, which `BadSteps` counts
            return
        if not self.recent:
            self.first = self.lowest = loss
        self.recent = [*self.recent, loss][-self.WINDOW :]
        if len(self.recent) == self.WINDOW:
            self.lowest = min(self.lowest, sum(self.recent) / self.WINDOW)
        self.high = self.high + 1 if loss > max(self.first, self.factor * self.lowest) else 0
        if self.high == self.WINDOW:
            raise Diverged(
                step,
                f"loss {loss:.3g} at step {step}, the last of {self.WINDOW} logged ones in a row above "
                f"diverged_above {self.factor:g} x what it was ({self.lowest:.3g})",
            )

    def state(self) -> dict[str, Any]:
        """What a resumed run must know, as JSON can hold it."""
        return {"first": self.first, "lowest": self.lowest, "recent": self.recent, "high": self.high}
