"""Checkpoints before a preempted machine is taken away."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ray.train import PreemptionInfo


class Notices:
    """Request a checkpoint when a node of this training is being preempted, and again until it is gone.

    Ray Train checks every 5 s whether nodes are being drained, lets the training continue until the
    deadline of the notice, and restarts it on the remaining nodes. Steps since the last checkpoint are
    lost, so one is requested every AGAIN seconds.
    """

    AGAIN = 10.0

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._notice: PreemptionInfo | None = None
        self._saved = -math.inf

    def saved(self) -> None:
        """Note that a checkpoint was just saved."""
        self._saved = time.monotonic()

    def __call__(self) -> bool:
        """Return whether to save now, by rank 0's clock. A barrier of all workers (2 to 17 ms)."""
        import ray.train

        notice = ray.train.get_preemption_info()
        if notice != self._notice:  # the first notice, or one for another node
            self._notice, self._saved = notice, -math.inf
        due = time.monotonic() - self._saved > self.AGAIN
        return self._rank == 0 and notice is not None and due
