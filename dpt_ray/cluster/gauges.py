"""Ray metrics of the running stages, for Prometheus and Grafana (monitoring/)."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ray.util.metrics import Gauge

# The metric, to which Ray prefixes "ray_", and its description, by the number that it shows.
METRICS = {
    "done": ("dpt_stage_done", "images, steps or settings that a stage has done"),
    "total": ("dpt_stage_total", "images, steps or settings that a stage has to do"),
    "rate": ("dpt_stage_rate", "images, steps or settings that a stage does in a second"),
    "seconds_left": ("dpt_stage_seconds_left", "seconds that a stage still takes at its rate"),
    "unreadable": ("dpt_stage_unreadable", "images that a stage could not read"),
    "loss": ("dpt_training_loss", "loss of a training, averaged over its workers"),
    "images_per_s": ("dpt_training_images_per_s", "images that a training sees in a second, all workers"),
    "mfu": ("dpt_training_mfu", "counted operations of a training over the measured peak, 0 to 1"),
    "data_wait": ("dpt_training_data_wait", "share of its time that a training waits for data, 0 to 1"),
}


class StageGauges:
    """Show the numbers of a run's stages, tagged by run and stage, while the driver has joined a cluster."""

    def __init__(self, run: str) -> None:
        self._run = run

    def __call__(self, stage: str, numbers: Mapping[str, float]) -> None:
        """Set the gauges of the numbers that have one."""
        ray = sys.modules.get("ray")
        if ray is None or not ray.is_initialized():
            return
        with suppress(Exception):  # of a cluster that is ending: what is shown ends no run
            for name in METRICS.keys() & numbers.keys():
                if math.isfinite(numbers[name]):
                    _gauge(name).set(float(numbers[name]), tags={"run": self._run, "stage": stage})


@cache
def _gauge(name: str) -> Gauge:
    """Return the one gauge of a number in this process: another of its name would never be exported."""
    from ray.util.metrics import Gauge

    metric, description = METRICS[name]
    return Gauge(metric, description, tag_keys=("run", "stage"))
