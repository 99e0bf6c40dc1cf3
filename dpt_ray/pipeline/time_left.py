"""How long the stages of a run that are still to be made will take on this machine."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress

from dpt_ray.cluster import session as cluster
from dpt_ray.config import Config, ConfigError
from dpt_ray.engine.node import Node
from dpt_ray.models.precision import resolve_precisions
from dpt_ray.pipeline.cost import costs, fit_shape, total, total_seconds
from dpt_ray.pipeline.network_cost import Cost
from dpt_ray.pipeline.speed import GUESS, Rates, machine_rates, training_device, training_threads
from dpt_ray.store.artifact import Store

SHORT = 300.0  # seconds: measuring the machine for a shorter run would be a notable part of it


def rates_for(
    config: Config, images: Mapping[str, int] | None, classes: int | None, missing: Mapping[str, Cost]
) -> Rates:
    """Return this machine's rates, measured now; that of the fits only where there are some to make."""
    shape = fit_shape(config, images, classes) if total(missing).fit else None
    return machine_rates(resolve_precisions(config), training_threads(config), shape)


class TimeLeft:
    """The seconds that nodes will still take, computed as `dpt plan` does and corrected while they are made.

    On a cluster that the run joins nothing is known: how many machines a stage will have can change.
    """

    def __init__(self, config: Config, index: Node, store: Store) -> None:
        self._config, self._index = config, index.artifact(store)
        self._missing: dict[str, Cost] | None = None
        self._rates: Rates | None = None
        self._first: tuple[float, float] = (0.0, 0.0)

    def __call__(self, nodes: Sequence[Node]) -> float | None:
        """Return the seconds of the nodes; None where they cannot be known, or for a short run."""
        if cluster.joins_another():
            return None
        if self._missing is None:
            if not self._index.published:
                return None
            self._measure([node.name for node in nodes])
        assert self._missing is not None
        if self._rates is None:
            return None
        names = {node.name for node in nodes}
        left = total_seconds({k: cost for k, cost in self._missing.items() if k in names}, self._rates)
        # t_left = computed left x (time passed / computed until now): a busy machine is slower. What an
        # earlier run did of a stage would make it look faster: the factor is at least 1.
        started, whole = self._first
        computed = whole - left
        if computed > 0.05 * whole:
            left *= max(1.0, (time.monotonic() - started) / computed)
        return left

    def _measure(self, names: Collection[str]) -> None:
        """Compute the costs of the nodes, and measure the machine if they are not small."""
        images = Counter[str]()
        for unit in self._index.manifest["units"]:
            images[unit["split"]] += unit["rows"]
        classes = self._index.manifest["classes"]
        found: dict[str, Cost] = {}
        with suppress(ConfigError):  # sizes that do not fit: told by the stage that finds it, or by the plan
            found = costs(self._config, images, classes)
        self._missing = {name: cost for name, cost in found.items() if name in names}
        operations = total(self._missing)
        networks = (operations.conv or 0.0) + (operations.transformer or 0.0)
        guess = networks / GUESS[training_device(self._config)] + (operations.fit or 0.0) / GUESS["fit"]
        if guess < SHORT:
            return
        self._rates = rates_for(self._config, images, classes, self._missing)
        self._first = time.monotonic(), total_seconds(self._missing, self._rates)
