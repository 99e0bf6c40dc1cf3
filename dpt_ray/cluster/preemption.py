"""Notices that a machine of the training will be taken away: a checkpoint before it goes."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ray.train import PreemptionInfo


class Notices:
    """Asks for a checkpoint when a node of this training is about to go, and again until it does.

    Ray Train looks every 5 s whether nodes are being drained, lets the training go on until the deadline
    of the notice, and starts it again on the nodes that are left. What was made since the last checkpoint
    is lost, so one is due every AGAIN seconds.
    """

    AGAIN = 10.0

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._notice: PreemptionInfo | None = None
        self._saved = -math.inf

    def saved(self) -> None:
        """Tells that a checkpoint has just been made."""
        self._saved = time.monotonic()

    def __call__(self) -> bool:
        """Whether to save now, by rank 0's clock. All workers call it, and wait for each other: 2-17 ms."""
        import ray.train

        notice = ray.train.get_preemption_info()
        if notice != self._notice:  # the first one, or one more node
            self._notice, self._saved = notice, -math.inf
        due = time.monotonic() - self._saved > self.AGAIN
        return self._rank == 0 and notice is not None and due
