"""Ray metrics of a training, for Prometheus and Grafana."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ray.util.metrics import Gauge

GAUGES = ("loss", "images_per_s", "data_wait")


def ray_gauges(stage: str) -> dict[str, Gauge]:
    """Return the gauges `ray_dpt_training_loss`, ..., tagged by stage."""
    from ray.util.metrics import Gauge

    gauges = {
        name: Gauge(f"dpt_training_{name}", f"{name} of a training", tag_keys=("stage",)) for name in GAUGES
    }
    for gauge in gauges.values():
        gauge.set_default_tags({"stage": stage})
    return gauges
