"""Stop a training whose loss is not finite or diverges. The counts are part of a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dpt_ray.store.records import LossState


class UnstableTraining(RuntimeError):  # noqa: N818
    """A training that cannot recover from `step` on; `what` describes the problem."""

    def __init__(self, step: int, what: str, when: str = "") -> None:
        super().__init__(
            f"{what}{when}: lower learning_rate, set grad_clip, or look for bad values in the data"
        )
        self.step, self.what = step, what


class NonFiniteLoss(UnstableTraining):
    """Too many steps in a row had a loss or gradient that is not finite; `step` is the last one."""


class Diverged(UnstableTraining):
    """The loss has stayed far above its earlier level; `step` is the last one checked."""


class BadSteps:
    """Count skipped steps, one step late, so that the host never waits for the running step."""

    def __init__(self, limit: int, skipped: int = 0, in_a_row: int = 0) -> None:
        self.limit, self.skipped, self.in_a_row = limit, skipped, in_a_row
        self._pending: tuple[int, Tensor, torch.cuda.Event | None] | None = None

    def add(self, step: int, bad: Tensor) -> None:
        """Queue the flag of `step` and count that of the previous step."""
        flag, ready = bad.to("cpu", non_blocking=True), None
        if bad.is_cuda:
            ready = torch.cuda.Event()
            ready.record()
        self.settle()
        self._pending = step, flag, ready

    def settle(self) -> None:
        """Count the pending flag. Raises NonFiniteLoss at `limit` bad steps in a row."""
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
    """Detect a loss that rises far above its earlier level and stays there.

    The input is the logged loss, a mean over the workers, so that all of them decide alike. A loss is
    high if it exceeds the first logged loss and `factor` x the lowest mean of WINDOW consecutive losses.
    WINDOW high losses in a row are a divergence; a single spike is not.
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
        """Add the logged loss of a step. Raises Diverged at the last of WINDOW high losses in a row."""
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

    def state(self) -> LossState:
        """Return the state for a checkpoint, as JSON values."""
        return {"first": self.first, "lowest": self.lowest, "recent": self.recent, "high": self.high}
